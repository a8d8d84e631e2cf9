"""From crops to network input: draw the plan, apply it to the pixels, hide and damage parts, normalise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
    return crops[[same_size.index(name) for name in names]]


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
    view, side_px = views[0], views[0].size_px
    patches = recipe.patches
    if side_px != patches.grid[0] * patches.patch_px:
        side = side_px // patches.patch_px
        patches = PatchConfig((side, side), patches.patch_px)
    all_indices = stream_indices(recipe.views)
    indices = [all_indices[list(recipe.views).index(name)] for name in names]
    plan = draw_view_plan(views, patches, seed, epochs, sample_ids, indices, micro_step)
    flat = crops.flatten(0, 1)
    if plan.shift_px is not None:
        flat = pixels.shift(flat, plan.shift_px, view.shift_border)
    on_cpu = crops.device.type == "cpu"
    if on_cpu:
        clean = pixels_cpu.render(flat, plan)
    else:
        clean = pixels.render(flat, plan, blur=any(view.blur.prob > 0 for view in views))
    shown = clean
    if patches.total and view.corrupt:
        blank = torch.tensor(recipe.mean, device=crops.device) if recipe.blank_inpainting else None
        shown = corrupt(shown, plan, patches.patch_px, blank)
    if plan.patches.shuffled is not None:
        shown = shuffle_patches(shown, plan.patches.shuffled, patches.patch_px)
    if view.patch_augment and not view.legacy_jitter_after_norm:
        shown = augment_patches(shown, plan.tiles, patches.patch_px)
    normalize = pixels_cpu.normalize if on_cpu else pixels.normalize
    images = normalize(shown, recipe.mean, recipe.std)
    if view.patch_augment and view.legacy_jitter_after_norm:
        images = augment_patches(images, plan.tiles, patches.patch_px, normalized=True)
    is_untouched = shown is clean and not view.patch_augment
    whole = images if is_untouched else None
    if whole is None and (recipe.needs_whole or plan.local is not None):
        whole = normalize(clean, recipe.mean, recipe.std)
    changed = None
    if plan.local is not None:
        streams = torch.tensor(indices, device=crops.device) * STREAMS_PER_VIEW + Stream.NOISE

        def noise() -> Tensor:
            rows = epochs.repeat(len(views)), sample_ids.repeat(len(views))
            return standard_normal(
                seed, *rows, streams.repeat_interleave(len(sample_ids)), (3, side_px, side_px)
            )

        is_noise = view.local is not None and view.local.fill == "noise"
        images, changed = apply_local(
            images, plan.local, recipe.mean, recipe.std, noise if is_noise else None
        )
    return ViewGroup(names, images, clean, plan, whole, changed)


def with_labels(inputs: Inputs, labels: Tensor, moment: Moment) -> Inputs:
    return replace(inputs, labels=labels, moment=moment)
