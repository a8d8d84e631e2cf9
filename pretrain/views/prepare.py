"""From crops to network input: draw the plan, apply it to the pixels, hide and damage parts, normalise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pretrain.constants import constant
from pretrain.views import pixels, pixels_cpu
from pretrain.views.corrupt import augment_patches, corrupt, shuffle_patches
from pretrain.views.local import apply_local, standard_normal
from pretrain.views.plan import (
    STREAMS_PER_VIEW,
    PatchConfig,
    Stream,
    ViewConfig,
    ViewPlan,
    draw_view_plan,
    encoder_calls,
    stream_indices,
)

if TYPE_CHECKING:
    from pretrain.tasks.contract import TeacherViews


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the network sees of an image."""

    views: Mapping[str, ViewConfig]
    patches: PatchConfig  # of views of the model's own size; others have no patch tasks
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    blank_inpainting: bool = False  # show the masked patches as the mean colour instead of a learned token
    needs_whole: bool = False  # tasks or the teacher want the clean views normalised
    compiled: bool = False  # finish the pixels in one compiled graph, on whatever device


@dataclass(frozen=True)
class Moment:
    """Where in the run a step is."""

    step: int = 0  # steps finished before
    num_steps: int = 1
    epoch: float = 0.0  # times the data have been seen
    seed: int = 0  # of the run


@dataclass(frozen=True)
class ViewGroup:
    """V views of B images, ready for one encoder call; view-major, M = V * B rows."""

    names: tuple[str, ...]
    images: Tensor  # (M, 3, H, W) float32, corrupted and normalised
    clean: Tensor  # (M, 3, H, W) float32 in [0, 1]
    plan: ViewPlan
    whole: Tensor | None = None  # (M, 3, H, W) float32: `clean`, normalised; None where nobody asks for it
    changed: Tensor | None = None  # bool (M, 1, H, W): pixels that a local corruption changed

    def select(self, wanted: Collection[str]) -> ViewGroup | None:
        """The wanted views, and those that lie between them; None if there are none."""
        places = [place for place, name in enumerate(self.names) if name in wanted]
        if not places:
            return None
        places = list(range(places[0], places[-1] + 1))
        if len(places) == len(self.names):
            return self
        num_images = len(self.images) // len(self.names)
        rows = slice(places[0] * num_images, (places[-1] + 1) * num_images)
        return ViewGroup(
            tuple(self.names[place] for place in places),
            self.images[rows],
            self.clean[rows],
            self.plan.rows(rows),
            whole=None if self.whole is None else self.whole[rows],
            changed=None if self.changed is None else self.changed[rows],
        )


@dataclass(frozen=True)
class Inputs:
    """What one rank trains on in a micro step."""

    groups: tuple[ViewGroup, ...]
    sample_ids: Tensor  # int64 (B,)
    labels: Tensor | None = None  # int64 (B,); -1 for none
    moment: Moment = field(default_factory=Moment)
    teacher: TeacherViews | None = None

    @property
    def images(self) -> Tensor:
        """Of the first group: (M, 3, H, W)"""
        return self.groups[0].images

    @property
    def device(self) -> torch.device:
        return self.groups[0].images.device


@torch.no_grad()
def prepare(
    recipe: Recipe,
    seed: int,
    crops: Tensor | Sequence[Tensor],
    epochs: Tensor,
    sample_ids: Tensor,
    micro_step: int = 0,
) -> Inputs:
    """What the encoder is to see of a batch.

    crops: uint8 (V, B, S, S, 3) of each crop size, sizes in order of first use and views in recipe order;
    epochs and sample_ids: int64 (B,); all on one device. micro_step: as in `draw_view_plan`.
    """
    by_size = [crops] if isinstance(crops, Tensor) else list(crops)
    groups = [
        _prepare_group(recipe, names, seed, _crops_of(recipe, names, by_size), epochs, sample_ids, micro_step)
        for names in encoder_calls(recipe.views)
    ]
    return Inputs(tuple(groups), sample_ids)


def _crops_of(recipe: Recipe, names: Sequence[str], by_size: Sequence[Tensor]) -> Tensor:
    """The crops of some views of one size: uint8 (V, B, S, S, 3)"""
    sizes = list(dict.fromkeys(view.size_px for view in recipe.views.values()))
    size_px = recipe.views[names[0]].size_px
    same_size = [name for name, view in recipe.views.items() if view.size_px == size_px]
    crops = by_size[sizes.index(size_px)]
    if same_size == list(names):
        return crops
    return torch.stack([crops[same_size.index(name)] for name in names])


def _prepare_group(
    recipe: Recipe,
    names: tuple[str, ...],
    seed: int,
    crops: Tensor,
    epochs: Tensor,
    sample_ids: Tensor,
    micro_step: int,
) -> ViewGroup:
    views = [recipe.views[name] for name in names]
    patches, side_px = recipe.patches, views[0].size_px
    if side_px != patches.grid[0] * patches.patch_px:
        side = side_px // patches.patch_px
        patches = PatchConfig((side, side), patches.patch_px)
    all_indices = stream_indices(recipe.views)
    indices = [all_indices[list(recipe.views).index(name)] for name in names]
    plan = draw_view_plan(views, patches, seed, epochs, sample_ids, indices, micro_step)
    finishing = _finishing(recipe, views, patches, seed, tuple(indices))
    finish = _compiled_finish() if recipe.compiled else finish_views
    finished = finish(finishing, crops, plan, epochs, sample_ids)
    return ViewGroup(
        names, finished.images, finished.clean, plan, whole=finished.whole, changed=finished.changed
    )


@dataclass(frozen=True)
class Finishing:
    """What the views of one encoder call have in common beside their plan: plain values, cheap to compare."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_px: int
    shift_border: Literal["black", "mirror"]
    blur: bool  # some of the views
    corrupt: bool
    blank_inpainting: bool
    patch_augment: bool
    jitter_after_norm: bool
    needs_whole: bool
    noise: bool  # fills what a local corruption drops
    seed: int
    streams: tuple[int, ...]  # first random stream of each view
    for_cpu: bool  # a view at a time, by the code of `pixels_cpu`, where the device is one


@dataclass(frozen=True)
class Finished:
    """The pixels of a `ViewGroup`."""

    images: Tensor
    clean: Tensor
    whole: Tensor | None
    changed: Tensor | None


def _finishing(
    recipe: Recipe, views: Sequence[ViewConfig], patches: PatchConfig, seed: int, indices: tuple[int, ...]
) -> Finishing:
    view = views[0]
    return Finishing(
        recipe.mean,
        recipe.std,
        patches.patch_px,
        view.shift_border,
        blur=any(view.blur.prob > 0 for view in views),
        corrupt=bool(patches.total and view.corrupt),
        blank_inpainting=recipe.blank_inpainting,
        patch_augment=view.patch_augment,
        jitter_after_norm=view.legacy_jitter_after_norm,
        needs_whole=recipe.needs_whole,
        noise=view.local is not None and view.local.fill == "noise",
        seed=seed,
        streams=tuple(index * STREAMS_PER_VIEW for index in indices),
        for_cpu=not recipe.compiled,
    )


@cache
def _compiled_finish() -> Any:
    """`finish_views` as one graph for each kind of view; one that cannot be a graph is an error.

    The plan is drawn outside. It is mostly integer hashes and sorts, and too large a graph: that of two views
    of the core method has 1774 operations.
    """
    return torch.compile(finish_views, fullgraph=True, dynamic=False)


def finish_views(
    how: Finishing, crops: Tensor, plan: ViewPlan, epochs: Tensor, sample_ids: Tensor
) -> Finished:
    """Do to the pixels what the plan says. crops: uint8 (V, B, S, S, 3); epochs, sample_ids: int64 (B,)."""
    flat = crops.flatten(0, 1)
    if plan.shift_px is not None:
        flat = pixels.shift(flat, plan.shift_px, how.shift_border)
    on_cpu = how.for_cpu and crops.device.type == "cpu"
    clean = pixels_cpu.render(flat, plan) if on_cpu else pixels.render(flat, plan, blur=how.blur)
    shown = clean
    if how.corrupt:
        blank = constant(how.mean, torch.float32, crops.device) if how.blank_inpainting else None
        shown = corrupt(shown, plan, how.patch_px, blank)
    if plan.patches.shuffled is not None:
        shown = shuffle_patches(shown, plan.patches.shuffled, how.patch_px)
    if how.patch_augment and not how.jitter_after_norm:
        shown = augment_patches(shown, plan.tiles, how.patch_px)
    normalize = pixels_cpu.normalize if on_cpu else pixels.normalize
    images = normalize(shown, how.mean, how.std)
    if how.patch_augment and how.jitter_after_norm:
        images = augment_patches(images, plan.tiles, how.patch_px, normalized=True)
    is_untouched = shown is clean and not how.patch_augment
    whole = images if is_untouched else None
    if whole is None and (how.needs_whole or plan.local is not None):
        whole = normalize(clean, how.mean, how.std)
    changed = None
    if plan.local is not None:
        num_views, side_px = len(how.streams), crops.shape[2]

        def noise() -> Tensor:
            streams = constant(how.streams, torch.int64, crops.device) + Stream.NOISE
            rows = epochs.repeat(num_views), sample_ids.repeat(num_views)
            return standard_normal(
                how.seed, *rows, streams.repeat_interleave(len(sample_ids)), (3, side_px, side_px)
            )

        images, changed = apply_local(images, plan.local, how.mean, how.std, noise if how.noise else None)
    return Finished(images, clean, whole, changed)


def with_labels(inputs: Inputs, labels: Tensor, moment: Moment) -> Inputs:
    return replace(inputs, labels=labels, moment=moment)
