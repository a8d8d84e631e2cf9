"""Every random decision about a view, as plain numbers: drawn here, applied in `pixels` and `corrupt`.

A plan is a pure function of (recipe, seed, epoch, sample ids): the recipe for the pixels and, at the same
time, the label for the tasks that predict geometry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import IntEnum
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pretrain.constants import constant
from pretrain.randomness import uniform, uniform_of_streams
from pretrain.views import patch_plan
from pretrain.views.local import LocalConfig, LocalPlan, draw_local
from pretrain.views.masks import MaskConfig, MaskPlan, draw_mask

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
CROP_TRIES = 10  # as torchvision's RandomResizedCrop


class Stream(IntEnum):
    """What a random number is for. A view adds `view_index * STREAMS_PER_VIEW`."""

    CROP = 0
    FLIP = 1
    JITTER = 2
    GRAY = 3
    BLUR = 4
    SOLARIZE = 5
    TURN = 6
    PAIRS = 7
    PATCHES = 8
    JIGSAW = 9
    TILE_CROP = 10
    TILE_JITTER = 11
    TILE_GRAY = 12
    SHIFT = 13
    SHUFFLE = 14
    MASK = 15
    SHARED_MASK = 16  # common to all images of a micro step
    LOCAL = 17
    NOISE = 18


STREAMS_PER_VIEW = 64
ORDER_STREAM = 1 << 20  # first of the streams that belong to the data order; views stay below


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JitterConfig(_Settings):
    """As torchvision's ColorJitter, in random order: factors from [max(0, 1-x), 1+x], hue from [-x, x]."""

    prob: Ratio = 0.8
    brightness: Annotated[float, Field(ge=0.0)] = 0.4
    contrast: Annotated[float, Field(ge=0.0)] = 0.4
    saturation: Annotated[float, Field(ge=0.0)] = 0.2
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1


class BlurConfig(_Settings):
    """Gaussian blur with a kernel of a tenth of the side (odd, at least 3) and sigma from [low, high] px."""

    prob: Ratio = 0.0
    sigma_px: tuple[float, float] = (0.1, 2.0)


class ViewConfig(_Settings):
    """How one view of an image is made, in this order: crop, shift, flip, colours, blur, solarize, turn, then
    what hides or damages parts of it: patch tasks, patch augmentation, shuffling, local corruption, mask."""

    # takes the random numbers of this other view, given by name or place: the same crop, colours and turn
    like: str | Annotated[int, Field(ge=0)] | None = None
    size_px: Annotated[int, Field(gt=0)] = 224
    scale: tuple[float, float] = (0.2, 1.0)  # area of the crop as a ratio of the image's
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    # move the crop by up to so many px each way, over a border of black or of mirrored pixels; with a scale
    # of 1 this is a random crop of the padded image
    shift_px: Annotated[int, Field(ge=0)] = 0
    shift_border: Literal["black", "mirror"] = "black"
    flip_prob: Ratio = 0.5
    jitter: JitterConfig = JitterConfig()
    gray_prob: Ratio = 0.2
    blur: BlurConfig = BlurConfig()
    solarize_prob: Ratio = 0.0
    turn: bool = False  # rotate by a random quarter turn
    fixed_turn: Annotated[int, Field(ge=0, le=3)] = 0  # quarter turns that are always added
    # apply the patch-level tasks to this view: all, none, or only those named, each to the patches it would
    # have among all of them; views that differ in this are encoded in calls of their own
    corrupt: bool | tuple[str, ...] = True
    disjoint: bool = True  # no patch belongs to two tasks; false: each task chooses from all patches
    patch_augment: bool = False  # crop and resize back, jitter and grey every patch on its own
    legacy_jitter_after_norm: bool = False  # jitter those patches after normalisation, as RelViT's release
    shuffle: bool = False  # move the patches to random places
    local: LocalConfig | None = None  # damage parts of the view, which a task repairs
    mask: MaskConfig | None = None  # hide patches from the encoder

    @property
    def shape(self) -> tuple[object, ...]:
        """What views must agree on to be encoded in one call."""
        patches = (self.corrupt, self.patch_augment, self.legacy_jitter_after_norm, self.shuffle)
        border = self.shift_border if self.shift_px else None
        return (self.size_px, *patches, self.disjoint, self.local, self.mask, border)


def encoder_calls(views: Mapping[str, ViewConfig]) -> tuple[tuple[str, ...], ...]:
    """The views that are encoded in one call, by name; calls and views in order of first mention."""
    shapes: dict[tuple[object, ...], list[str]] = {}
    for name, view in views.items():
        shapes.setdefault(view.shape, []).append(name)
    return tuple(tuple(names) for names in shapes.values())


def stream_indices(views: Mapping[str, ViewConfig]) -> tuple[int, ...]:
    """Whose random numbers each view takes, by place: its own, or those of the view it is `like`, which may
    be like another in turn. ValueError where views are like each other."""
    names, all_views = list(views), list(views.values())

    def followed(place: int, seen: tuple[int, ...] = ()) -> int:
        like = all_views[place].like
        like = names.index(like) if isinstance(like, str) else like
        if like is None or like == place:
            return place
        if place in seen:
            raise ValueError(f"{' and '.join(names[i] for i in sorted(set(seen)))} are like each other")
        return followed(like, (*seen, place))

    return tuple(followed(place) for place in range(len(names)))


def in_places(views: Mapping[str, ViewConfig]) -> list[ViewConfig]:
    """The views in order, without names: what they are `like` is given by place."""
    return [
        view if view.like is None else view.model_copy(update={"like": place})
        for view, place in zip(views.values(), stream_indices(views), strict=True)
    ]


def crop_boxes(
    config: ViewConfig,
    seed: int,
    epochs: Tensor,
    sample_ids: Tensor,
    view_index: int,
    heights: Tensor,
    widths: Tensor,
) -> Tensor:
    """Place one crop per image, distributed as torchvision's RandomResizedCrop.get_params.

    epochs, sample_ids, heights, widths: int64 (B,); sizes in px.
    Returns int64 (B, 4): top, left, height, width.
    """
    stream = (config.like if isinstance(config.like, int) else view_index) * STREAMS_PER_VIEW + Stream.CROP
    draws = uniform(seed, epochs, sample_ids, stream, 2 * CROP_TRIES + 2).double()
    height, width = heights.double().unsqueeze(1), widths.double().unsqueeze(1)
    low, high = config.scale
    area = height * width * (low + (high - low) * draws[:, :CROP_TRIES])  # (B, tries)
    log_low, log_high = math.log(config.aspect[0]), math.log(config.aspect[1])
    aspect = torch.exp(log_low + (log_high - log_low) * draws[:, CROP_TRIES : 2 * CROP_TRIES])
    crop_width, crop_height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)  # the first that fits, as torchvision's loop
    # no try fits: the largest central crop within the aspect limits
    ratio = width / height
    central_width = torch.where(ratio > config.aspect[1], (height * config.aspect[1]).round(), width)
    central_height = torch.where(ratio < config.aspect[0], (width / config.aspect[0]).round(), height)
    any_fits = fits.any(dim=1, keepdim=True)
    central_width = central_width.clamp(min=1).minimum(width)
    central_height = central_height.clamp(min=1).minimum(height)
    crop_width = torch.where(any_fits, crop_width.gather(1, first), central_width)
    crop_height = torch.where(any_fits, crop_height.gather(1, first), central_height)
    free_height, free_width = height - crop_height, width - crop_width
    top_draw, left_draw = draws[:, -2:-1], draws[:, -1:]
    top = torch.where(any_fits, top_draw * (free_height + 1), free_height / 2).floor()
    left = torch.where(any_fits, left_draw * (free_width + 1), free_width / 2).floor()
    return torch.cat([top, left, crop_height, crop_width], dim=1).long()


@dataclass(frozen=True)
class PatchConfig:
    """How many patches of a view each patch-level task works on."""

    grid: tuple[int, int]
    patch_px: int
    disjoint: bool = True  # no patch is in two sets
    colorization: int = 0
    inpainting: int = 0
    inpainting_block: bool = False  # one contiguous region instead of scattered patches
    pairs: int = 0  # relative position; each pair holds two patches
    pair_mode: Literal["neighbor", "any"] = "neighbor"
    jigsaw: int = 0
    jigsaw_mode: Literal["slot", "permset"] = "slot"
    num_permutations: int = 100  # of the permset mode

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def total(self) -> int:
        return self.colorization + self.inpainting + 2 * self.pairs + self.jigsaw


@dataclass(frozen=True)
class PatchSets:
    """Sets of patch indices (row by row) of M views, disjoint unless they are drawn to overlap."""

    colorization: Tensor  # int64 (M, colorization)
    inpainting: Tensor  # int64 (M, inpainting)
    pairs: Tensor  # int64 (M, pairs, 2)
    jigsaw: Tensor  # int64 (M, jigsaw): slots; ascending in slot mode, cell by cell in permset mode
    jigsaw_source: Tensor  # int64 (M, jigsaw): slot a receives the content of this patch
    jigsaw_class: Tensor  # int64 (M,): which permutation, in permset mode; else 0
    shuffled: Tensor | None = None  # int64 (M, N): place i shows the content of this patch; None: its own
    overlapping: bool = False  # a patch may be in several sets

    def only(self, tasks: Sequence[str]) -> PatchSets:
        """The sets of these tasks as they are; those of the others are empty."""
        kept = {name for task in tasks for name in PATCH_TASKS[task]}
        others = {name for names in PATCH_TASKS.values() for name in names} - kept
        return replace(self, **{name: getattr(self, name)[:, :0] for name in others})


# which sets a patch-level task works on
PATCH_TASKS: Mapping[str, tuple[str, ...]] = {
    "colorization": ("colorization",),
    "inpainting": ("inpainting",),
    "relative_position": ("pairs",),
    "jigsaw": ("jigsaw", "jigsaw_source"),
}


@dataclass(frozen=True)
class JitterPlan:
    """Numbers of a colour jitter for M images."""

    apply: Tensor  # bool (M,)
    factors: Tensor  # float32 (M, 4): brightness, contrast, saturation factor, hue shift in turns
    order: Tensor  # int64 (M, 4): the operations (0..3, numbered as in `factors`), first to last


@dataclass(frozen=True)
class TilePlan:
    """Augmentation of single patches: crop and resize back, colour jitter, grey. T patches per view."""

    index: Tensor  # int64 (M, T): which patches: those of the pairs, then those of the jigsaw
    offset_px: Tensor  # int64 (M, T, 2): top and left of the crop of round(patch_px / 1.15) px
    jitter: JitterPlan  # of M * T
    gray: Tensor  # bool (M, T)


@dataclass(frozen=True)
class ViewPlan:
    """All numbers of M views of one shape (view-major: all images of the first view, then of the next)."""

    flip: Tensor  # bool (M,)
    jitter: JitterPlan
    gray: Tensor  # bool (M,)
    blur_sigma_px: Tensor  # float32 (M,); 0 where the view is not blurred
    solarize: Tensor  # bool (M,)
    quarter_turns: Tensor  # int64 (M,) in 0..3, clockwise
    patches: PatchSets
    tiles: TilePlan
    shift_px: Tensor | None = None  # int64 (M, 2): down and right; None where no view is moved
    local: LocalPlan | None = None
    mask: MaskPlan | None = None

    def rows(self, index: Tensor | slice) -> ViewPlan:
        """The numbers of some of the views: int64 (K,), or a slice."""
        chosen: ViewPlan = _rows(self, index, len(self.flip))
        return chosen


def _rows(value: Any, index: Tensor | slice, num_rows: int) -> Any:
    """Some rows of all tensors of a plan, however deep; single patches have several rows for each view."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{part.name: _rows(getattr(value, part.name), index, num_rows) for part in fields(value)}
        )
    if not isinstance(value, Tensor) or len(value) == 0:
        return value
    if len(value) == num_rows:
        return value[index]
    of_views = value.reshape(num_rows, -1, *value.shape[1:])
    return of_views[index].reshape(-1, *value.shape[1:])


TILE_ZOOM = 1.15  # a tile is a crop of 1 / TILE_ZOOM of a patch, resized back
TILE_JITTER = JitterConfig(prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
TILE_GRAY_PROB = 0.2

Draw = Callable[[Stream, int], Tensor]  # (what for, n) -> n numbers per view, uniform in [0, 1): (M, n)


def tile_crop_px(patch_px: int) -> int:
    """Side of the crop of a tile before it is resized back to the whole patch."""
    return round(patch_px / TILE_ZOOM)


def _jitter(draws: Tensor, prob: Tensor | float, strengths: Tensor) -> JitterPlan:
    """A jitter from draws (R, 9); strengths: (R or 1, 4), of brightness, contrast, saturation and hue."""
    center = constant((1.0, 1.0, 1.0, 0.0), torch.float32, draws.device)
    least = constant((0.0, 0.0, 0.0, -0.5), torch.float32, draws.device)
    low = torch.maximum(center - strengths, least)
    factors = torch.lerp(low, center + strengths, draws[:, 1:5])
    apply = draws[:, :1] < prob
    return JitterPlan(apply.squeeze(1), factors, order=draws[:, 5:].argsort(dim=1, stable=True))


def _strengths(config: JitterConfig) -> tuple[float, ...]:
    return config.brightness, config.contrast, config.saturation, config.hue


def draw_patch_sets(config: PatchConfig, draw: Draw) -> PatchSets:
    """Share out the patches in this order: permset jigsaw, pairs, colorization, inpainting, slot jigsaw.

    Sets that may overlap are drawn independently, each from all patches.
    """
    count, columns = config.num_patches, config.grid[1]
    assert config.total <= count // 2, "patch tasks may take at most half of the patches"
    draws = draw(Stream.PATCHES, (2 if config.disjoint else 4) * count)
    priority, tie_break = draws[:, :count], draws[:, count : 2 * count]
    of_inpainting = priority if config.disjoint else draws[:, 2 * count : 3 * count]
    of_jigsaw = priority if config.disjoint else draws[:, 3 * count :]
    none = torch.zeros_like(priority, dtype=torch.bool)  # (M, N)
    taken = none
    jigsaw_class = torch.zeros_like(taken[:, 0], dtype=torch.int64)
    permset = config.jigsaw > 0 and config.jigsaw_mode == "permset"
    if permset:
        assert config.jigsaw == 9, "permset jigsaw permutes 9 patches"
        draws = draw(Stream.JIGSAW, count + 1)
        jigsaw, taken = patch_plan.take_cells(draws[:, 1:], taken, config.grid)
        taken = taken if config.disjoint else none
        jigsaw_class = (draws[:, 0] * config.num_permutations).long()
        permutation = patch_plan.permutation_set_on(draws.device, config.num_permutations)[jigsaw_class]
    if config.pair_mode == "neighbor":
        num_edges = patch_plan.neighbor_edges(config.grid).shape[1]
        draws = draw(Stream.PAIRS, num_edges + config.pairs)
        pairs, taken = patch_plan.take_neighbors(draws[:, config.pairs :], taken, config.pairs, config.grid)
    else:
        draws = draw(Stream.PAIRS, count + config.pairs)
        index, taken = patch_plan.take_first(draws[:, config.pairs :], taken, 2 * config.pairs)
        pairs = index.view(len(index), config.pairs, 2)
    turned = (draws[:, : config.pairs] < 0.5).unsqueeze(2)  # either patch of a pair may come first
    pairs = torch.where(turned, pairs.flip(2), pairs)
    taken = taken if config.disjoint else none
    colorization, taken = patch_plan.take_first(priority, taken, config.colorization)
    taken = taken if config.disjoint else none
    if config.inpainting_block:
        inpainting, taken = patch_plan.take_block(of_inpainting, tie_break, taken, config.inpainting, columns)
    else:
        inpainting, taken = patch_plan.take_first(of_inpainting, taken, config.inpainting)
    taken = taken if config.disjoint else none
    if not permset:
        index, taken = patch_plan.take_first(of_jigsaw, taken, config.jigsaw)
        jigsaw = index.sort(dim=1).values
        num_tries = patch_plan.DERANGEMENT_TRIES
        draws = draw(Stream.JIGSAW, num_tries * config.jigsaw)
        permutation = patch_plan.derangements(draws.view(len(draws), num_tries, config.jigsaw))
    source = jigsaw.gather(1, permutation)
    return PatchSets(
        colorization, inpainting, pairs, jigsaw, source, jigsaw_class, overlapping=not config.disjoint
    )


def draw_tile_plan(index: Tensor, patch_px: int, draw: Draw) -> TilePlan:
    """The augmentation of the patches `index`, int64 (M, T), each on its own."""
    num_tiles = index.shape[1]
    num_offsets = patch_px - tile_crop_px(patch_px) + 1
    jitter = _jitter(
        draw(Stream.TILE_JITTER, 9 * num_tiles).view(-1, 9),
        TILE_JITTER.prob,
        constant((_strengths(TILE_JITTER),), torch.float32, index.device),
    )
    return TilePlan(
        index=index,
        offset_px=(draw(Stream.TILE_CROP, 2 * num_tiles) * num_offsets).long().view(*index.shape, 2),
        jitter=jitter,
        gray=draw(Stream.TILE_GRAY, num_tiles) < TILE_GRAY_PROB,
    )


@cache
def _asked_for(views: tuple[ViewConfig, ...], patches: PatchConfig) -> dict[Stream, int]:
    """How many numbers of each stream views of one kind need: found out when they are drawn first."""
    return {}


def _draw_from(
    asked: dict[Stream, int], seed: int, epochs: Tensor, sample_ids: Tensor, first_streams: tuple[int, ...]
) -> Draw:
    """Numbers of all views, those of the streams in `asked` hashed together; others are added to it.

    The same numbers as one by one. On a GPU, where each operation has to be launched, hashing them one by
    one takes longer than a step of a small model.
    """
    device, drawn = sample_ids.device, {}
    if asked:
        numbers = tuple(tuple(first + stream for first in first_streams) for stream in asked)
        table = constant(numbers, torch.int64, device)
        together = uniform_of_streams(seed, epochs, sample_ids, table, tuple(asked.values()))
        drawn = dict(zip(asked, together, strict=True))

    def draw(stream: Stream, n: int) -> Tensor:
        if stream in drawn and n <= drawn[stream].shape[1]:
            return drawn[stream][:, :n].contiguous()
        asked[stream] = max(n, asked.get(stream, 0))
        return torch.cat([uniform(seed, epochs, sample_ids, first + stream, n) for first in first_streams])

    return draw


def draw_view_plan(
    views: Sequence[ViewConfig],
    patches: PatchConfig | None,
    seed: int,
    epochs: Tensor,
    sample_ids: Tensor,
    view_indices: Sequence[int] | None = None,
    micro_step: int = 0,
) -> ViewPlan:
    """Decide everything about V views of B images but where to crop (`crop_boxes`); view-major, M = V * B.

    epochs, sample_ids: int64 (B,). The views are those of one encoder call: they agree on `ViewConfig.shape`,
    because their patch sets share rectangular tensors. Without patch tasks all sets have width 0. The numbers
    of view v come from the streams of `view_indices[v]` (by default v), so how views are grouped changes none
    of them. micro_step: counts the micro steps of the run; from it come numbers that all images share.
    """
    if len({view.shape for view in views}) != 1:
        raise ValueError("views drawn together must agree on their shape; draw a plan for each group")
    grid, patch_px = (patches.grid, patches.patch_px) if patches is not None else ((1, 1), 1)
    if patches is None or not views[0].corrupt or not patches.total:
        patches = PatchConfig(grid=(1, 1), patch_px=1)  # no tasks
    patches = replace(patches, disjoint=views[0].disjoint)
    streams = range(len(views)) if view_indices is None else view_indices

    asked = _asked_for(tuple(views), patches)
    draw = _draw_from(asked, seed, epochs, sample_ids, tuple(v * STREAMS_PER_VIEW for v in streams))

    def shared(n: int) -> Tensor:
        """Numbers that all images of this micro step have in common, on every rank. On the CPU: they decide
        about shapes, and asking a GPU for those would make it wait."""
        counter = torch.tensor(micro_step)
        return uniform(seed, 0, counter, streams[0] * STREAMS_PER_VIEW + Stream.SHARED_MASK, n)

    settings = tuple(
        (
            *(view.flip_prob, view.gray_prob, view.blur.prob, *view.blur.sigma_px, view.solarize_prob),
            *(4.0 * view.turn, view.jitter.prob, *_strengths(view.jitter)),
        )
        for view in views
    )
    device = sample_ids.device
    rows = constant(settings, torch.float32, device).repeat_interleave(len(sample_ids), dim=0)
    flip, gray, blur, sigma_low, sigma_high, solarize, turns, jitter = rows[:, :8].unbind(1)
    blur_draws = draw(Stream.BLUR, 2)
    sigma_px = torch.lerp(sigma_low, sigma_high, blur_draws[:, 1])
    sets = draw_patch_sets(patches, draw)
    if isinstance(views[0].corrupt, tuple):
        sets = sets.only(views[0].corrupt)
    view, num_patches = views[0], grid[0] * grid[1]
    if view.shuffle:
        order = draw(Stream.SHUFFLE, num_patches).argsort(dim=1, stable=True)
        sets = replace(sets, shuffled=order)
    augmented = torch.cat([sets.pairs.flatten(1), sets.jigsaw], dim=1)
    if view.patch_augment:
        augmented = torch.arange(num_patches, device=sample_ids.device).expand(len(rows), -1)
    fixed = constant(tuple(view.fixed_turn for view in views), torch.int64, device)
    fixed = fixed.repeat_interleave(len(sample_ids))
    reach = constant(tuple(view.shift_px for view in views), torch.int64, device)
    reach = reach.repeat_interleave(len(sample_ids)).unsqueeze(1)
    shift = None
    if any(view.shift_px for view in views):
        shift = (draw(Stream.SHIFT, 2) * (2 * reach + 1)).long() - reach
    return ViewPlan(
        flip=draw(Stream.FLIP, 1)[:, 0] < flip,
        jitter=_jitter(draw(Stream.JITTER, 9), jitter.unsqueeze(1), rows[:, 8:]),
        gray=draw(Stream.GRAY, 1)[:, 0] < gray,
        blur_sigma_px=torch.where(blur_draws[:, 0] < blur, sigma_px, 0.0),
        solarize=draw(Stream.SOLARIZE, 1)[:, 0] < solarize,
        quarter_turns=((draw(Stream.TURN, 1)[:, 0] * turns).long() + fixed) % 4,
        patches=sets,
        tiles=draw_tile_plan(augmented, patch_px, draw),
        shift_px=shift,
        local=None
        if view.local is None
        else draw_local(
            view.local,
            num_images=len(sample_ids),
            num_views=len(views),
            side_px=view.size_px,
            patch_px=patch_px,
            draw=lambda n: draw(Stream.LOCAL, n),
        ),
        mask=None
        if view.mask is None
        else draw_mask(view.mask, grid, lambda n: draw(Stream.MASK, n), shared),
    )
