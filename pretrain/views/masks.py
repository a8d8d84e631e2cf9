"""Which patches of a view are hidden: at random, in blocks, or all but a context beside blocks to predict.

Decided for M views at once. Every shape follows from the config, the grid and, for blocks to predict, from
numbers that all images of a micro step share; never from the images that happen to be in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.randomness import uniform
from pretrain.views.patch_plan import mark, take_first

Draw = Callable[[int], Tensor]  # n -> float32 (M, n), uniform in [0, 1): a row of numbers for each view
Shared = Callable[[int], Tensor]  # n -> float32 (n,), the same for all images of a micro step on all ranks
Grid = tuple[int, int]  # patches as (rows, columns); sizes of blocks, too
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]

BLOCK_TRIES = 10  # for one block, as BEiT and MaskFeat
BLOCK_ROUNDS = 16  # blocks of one mask; at 40 % of 14 x 14 patches, one mask in 1000 needs more than 9
_BLOCK_ASPECT = 1 / 0.3  # blocks are at most this much wider than high or higher than wide
_MAX_BLOCK_RATIO = 0.75  # the area of a first block beyond this seldom fits
TARGET_TRIES = 20  # placements of one image, as I-JEPA
_SURVEYED = 4096  # placements from which the size of a context is learned
_SURVEY_SEED = 0
_HOW = {"random": "drop", "block": "token", "multiblock": "drop"}
_RATIO = {"random": 0.75, "block": 0.4}
_OF_MULTIBLOCK = ("num_targets", "target_scale", "target_aspect", "context_scale", "min_context")


class MaskConfig(BaseModel):
    """What is hidden of one view, and how.

    random: any patches, the same number of each image (MAE, He et al., 2021, arXiv:2111.06377). block: blocks
    until about that many are hidden (BEiT, arXiv:2106.08254; MaskFeat, Wei et al., 2021, arXiv:2112.09133).
    multiblock: everything but a context, from which blocks are predicted (I-JEPA, Assran et al., 2023,
    arXiv:2301.08243).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["random", "block", "multiblock"] = "random"
    # drop: the encoder gets the other patches only; token: a mask token stands in. By default as published
    how: Literal["drop", "token"] = "drop"
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # of the patches, hidden: 0.75, block 0.4
    num_targets: Annotated[int, Field(gt=0)] = 4  # this and all below: of multiblock
    target_scale: tuple[Share, Share] = (0.15, 0.2)  # area of a block to predict as a ratio of the view's
    target_aspect: tuple[Positive, Positive] = (0.75, 1.5)  # its height / width
    context_scale: tuple[Share, Share] = (0.85, 1.0)  # area of the block that the context is cut out of
    min_context: Annotated[int, Field(gt=0)] = 11  # patches

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, settings: Any) -> Any:
        """Fill in what depends on the kind."""
        if not isinstance(settings, dict):
            return settings
        kind = settings.get("kind", "random")
        own = {"how": _HOW.get(kind), "ratio": _RATIO.get(kind)} if isinstance(kind, str) else {}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        return {name: value for name, value in own.items() if value is not None} | given

    @model_validator(mode="after")
    def _makes_sense(self) -> MaskConfig:
        if self.kind == "block" and self.how == "drop":
            raise ValueError("block masks hide more of one image than of another; use how 'token'")
        if self.kind == "multiblock" and self.how == "token":
            raise ValueError("multiblock masks are for an encoder that gets the context only; use how 'drop'")
        if (self.ratio is None) != (self.kind == "multiblock"):
            told = "follows from the scales; leave it out" if self.kind == "multiblock" else "is required"
            raise ValueError(f"the ratio of a {self.kind} mask {told}")
        if self.kind == "block" and self.ratio is not None and self.ratio > _MAX_BLOCK_RATIO:
            raise ValueError(f"block masks hide at most {_MAX_BLOCK_RATIO}, not {self.ratio}, of a view")
        for name in _OF_MULTIBLOCK:
            value = getattr(self, name)
            if self.kind != "multiblock" and value != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' has no meaning for a {self.kind} mask; use kind 'multiblock'")
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"'{name}' is a range from low to high, not {list(value)}")
        return self


@dataclass(frozen=True)
class MaskPlan:
    """Hidden patches of M views; patches are counted row by row."""

    hidden: Tensor  # bool (M, N): patches whose content the encoder does not get
    kept: Tensor | None  # int64 (M, K), ascending: patches the encoder gets; None where a token stands in
    targets: Tensor  # int64 (M, T, n): blocks to predict, each row by row; (M, 0, 0) unless multiblock


def num_kept(config: MaskConfig, grid: Grid) -> int:
    """How many patches of a view are not hidden: of random masks exactly, of blocks at least, else at most.

    Raises ConfigError where the grid is too small for the mask, so it is the question to ask before a run.
    """
    rows, columns = grid
    count = rows * columns
    if config.kind == "multiblock":
        contexts = list(_sizes(config.context_scale, (1.0, 1.0), grid))
        blocks = list(_sizes(config.target_scale, config.target_aspect, grid))
        return max(_context_count(config, grid, block, context) for block in blocks for context in contexts)
    assert config.ratio is not None
    if config.kind == "block":
        kept = count - _num_hidden(config.ratio, grid)
        if min(grid) < 3 or kept == count:
            raise ConfigError(f"mask: a grid of {rows} x {columns} patches is too small for block masks")
        return kept
    kept = int(count * (1 - config.ratio))
    if not 0 < kept < count:
        raise ConfigError(
            f"mask: ratio {config.ratio} keeps {kept} of {count} patches; some must be, not all"
        )
    return kept


def draw_mask(config: MaskConfig, grid: Grid, draw: Draw, shared: Shared) -> MaskPlan:
    """Hide patches of M views. Results are on the device of what `draw` gives.

    Sizes of blocks to predict are numbers of the host: there, what `shared` gives had better be on the CPU.
    """
    if config.kind == "multiblock":
        return _draw_multiblock(config, grid, draw, shared)
    if config.kind == "block":
        hidden = _draw_blocks(config, grid, draw)
    else:
        noise = draw(grid[0] * grid[1])
        kept, visible = take_first(noise, torch.zeros_like(noise, dtype=torch.bool), num_kept(config, grid))
        hidden = ~visible
    no_targets = torch.zeros(len(hidden), 0, 0, dtype=torch.int64, device=hidden.device)
    return MaskPlan(hidden, kept.sort(dim=1).values if config.how == "drop" else None, no_targets)


# --- blocks of BEiT and MaskFeat


def _num_hidden(ratio: float, grid: Grid) -> int:
    return round(ratio * grid[0] * grid[1])


def _draw_blocks(config: MaskConfig, grid: Grid, draw: Draw) -> Tensor:
    """Add blocks until the count is reached or none of ten fits: bool (M, N).

    A block has the area U(a fifth of the count, what is missing) and fits if it adds at least one patch and
    not too many. In float64, where no rounding of `exp` on some device turns one size into another.
    """
    rows, columns = grid
    num_kept(config, grid)  # is the grid large enough?
    assert config.ratio is not None
    count = _num_hidden(config.ratio, grid)
    least = max(1, count // 5)
    draws = draw(BLOCK_ROUNDS * 4 * BLOCK_TRIES).double().view(-1, BLOCK_ROUNDS, 4, BLOCK_TRIES)
    hidden = torch.zeros(len(draws), rows, columns, dtype=torch.bool, device=draws.device)
    going_on = torch.ones(len(draws), 1, dtype=torch.bool, device=draws.device)
    for i in range(BLOCK_ROUNDS):
        area_draw, aspect_draw, top_draw, left_draw = draws[:, i].unbind(1)  # (M, tries)
        missing = count - hidden.flatten(1).sum(dim=1, keepdim=True)  # (M, 1)
        area = least + (missing - least) * area_draw
        aspect = torch.exp((2 * aspect_draw - 1) * math.log(_BLOCK_ASPECT))
        height, width = ((area * ratio).sqrt().round().clamp(min=1).long() for ratio in (aspect, 1 / aspect))
        fits = (height < rows) & (width < columns)
        height, width = height.clamp(max=rows), width.clamp(max=columns)
        top = (top_draw * (rows - height + 1)).long()
        left = (left_draw * (columns - width + 1)).long()
        new = height * width - _count_inside(hidden, top, left, height, width)
        fits &= going_on & (new > 0) & (new <= missing)
        going_on = fits.any(dim=1, keepdim=True)
        first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
        top, left, height, width = (value.gather(1, first) for value in (top, left, height, width))
        block = _within(top, height, rows).unsqueeze(2) & _within(left, width, columns).unsqueeze(1)
        hidden |= block & going_on.unsqueeze(2)
    return hidden.flatten(1)


def _within(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Which of 0..side-1 are in [start, start + length): (M, 1), (M, 1) -> bool (M, side)"""
    place = torch.arange(side, device=start.device)
    return (place >= start) & (place < start + length)


def _count_inside(hidden: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Hidden patches in each of several blocks: bool (M, rows, columns), (M, tries)... -> int64 (M, tries)"""
    columns = hidden.shape[2] + 1
    before = torch.nn.functional.pad(hidden.long().cumsum(dim=1).cumsum(dim=2), (1, 0, 1, 0)).flatten(1)
    bottom, right = top + height, left + width

    def corner(row: Tensor, column: Tensor) -> Tensor:
        return before.gather(1, row * columns + column)  # hidden patches above and to the left

    return corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)


# --- blocks to predict, of I-JEPA


def _block_size(scale: float, aspect: float, grid: Grid) -> Grid:
    """Rows and columns of a block: no more than `scale` of the patches, and less than the grid each way."""
    area = int(grid[0] * grid[1] * scale)
    sides = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return max(1, min(sides[0], grid[0] - 1)), max(1, min(sides[1], grid[1] - 1))


def _sizes(scales: tuple[float, float], aspects: tuple[float, float], grid: Grid) -> Iterator[Grid]:
    """Every size that a block may have, but for some that are drawn less than once in 100 times."""
    steps = torch.linspace(0, 1, 101, dtype=torch.float64).tolist()
    found = {
        _block_size(scales[0] + (scales[1] - scales[0]) * i, aspects[0] + (aspects[1] - aspects[0]) * j, grid)
        for i in steps
        for j in steps
    }
    return iter(sorted(found))


def _place(draws: Tensor, grid: Grid, sizes: list[Grid]) -> Tensor:
    """Put blocks anywhere on the grid: (..., K, 2) draws -> int64 (..., K, 2), top and left of each."""
    rows, columns = (
        [draws[..., block, axis] * (grid[axis] - sides[axis] + 1) for block, sides in enumerate(sizes)]
        for axis in (0, 1)
    )
    return torch.stack([torch.stack(rows, dim=-1), torch.stack(columns, dim=-1)], dim=-1).long()


def _blocks(corners: Tensor, size: Grid, grid: Grid) -> Tensor:
    """The patches of blocks: int64 (..., 2) -> bool (..., N)"""
    rows, columns = (
        _within(corners[..., i : i + 1], torch.full_like(corners[..., :1], size[i]), grid[i]) for i in (0, 1)
    )
    return (rows.unsqueeze(-1) & columns.unsqueeze(-2)).flatten(-2)


def _contexts(corners: Tensor, block: Grid, context: Grid, grid: Grid) -> Tensor:
    """The context's block without the others: int64 (..., T + 1, 2), the context last -> bool (..., N)"""
    left = _blocks(corners[..., -1, :], context, grid)
    for i in range(corners.shape[-2] - 1):
        left &= ~_blocks(corners[..., i, :], block, grid)
    return left


def _context_count(config: MaskConfig, grid: Grid, block: Grid, context: Grid) -> int:
    """How many patches the encoder gets where blocks have these sizes, the same in every batch.

    The release cuts all contexts of a batch to its shortest; this is the 1st percentile over placements,
    about what the shortest of a hundred images has.
    """
    count, passing = _survey(grid, block, context, config.num_targets, config.min_context)
    if passing < 0.5:  # then 20 tries would fail more often than once in a million times
        raise ConfigError(
            f"mask: {config.num_targets} blocks of {block[0]} x {block[1]} patches seldom leave a context of "
            f"{config.min_context} on a grid of {grid[0]} x {grid[1]}; lower num_targets, target_scale or "
            "min_context"
        )
    return count


@cache
def _survey(grid: Grid, block: Grid, context: Grid, num_targets: int, least: int) -> tuple[int, float]:
    """The size that 99 in 100 contexts reach, but at least `least`; and the ratio of those that reach it."""
    placement = torch.arange(_SURVEYED)
    draws = uniform(_SURVEY_SEED, 0, placement, 0, 2 * (num_targets + 1)).view(_SURVEYED, -1, 2)
    corners = _place(draws, grid, [block] * num_targets + [context])
    counts = _contexts(corners, block, context, grid).sum(dim=1).sort().values
    count = max(least, int(counts[_SURVEYED // 100]))
    return count, float((counts >= count).float().mean())


def _draw_multiblock(config: MaskConfig, grid: Grid, draw: Draw, shared: Shared) -> MaskPlan:
    """Blocks to predict, which may overlap, and a context of a fixed count that holds none of their patches.

    Each image takes the first of 20 placements whose context is large enough, and of that context a random
    subset. If none is, which is all but impossible, the blocks share one place and the rest is the context.
    """
    rows, columns = grid
    scale, aspect, wider = shared(3).tolist()
    block = _block_size(_between(config.target_scale, scale), _between(config.target_aspect, aspect), grid)
    context = _block_size(_between(config.context_scale, wider), 1.0, grid)
    count, num_targets = _context_count(config, grid, block, context), config.num_targets
    draws = draw(TARGET_TRIES * (num_targets + 1) * 2 + rows * columns)
    priority, draws = draws[:, : rows * columns], draws[:, rows * columns :]
    corners = _place(
        draws.view(-1, TARGET_TRIES, num_targets + 1, 2), grid, [block] * num_targets + [context]
    )
    contexts = _contexts(corners, block, context, grid)  # (M, tries, N)
    last_resort = corners[:, -1:, :1].expand(-1, 1, num_targets + 1, 2)
    corners = torch.cat([corners, last_resort], dim=1)
    contexts = torch.cat([contexts, ~_blocks(last_resort[:, :, 0], block, grid)], dim=1)
    first = (contexts.sum(dim=2) >= count).to(torch.int8).argmax(dim=1)  # (M,)
    image = torch.arange(len(first), device=first.device)
    kept, _ = take_first(priority, ~contexts[image, first], count)
    top, left = corners[image, first, :num_targets].unsqueeze(2).unbind(3)  # (M, T, 1)
    step = torch.arange(block[0] * block[1], device=first.device)
    targets = (top + step // block[1]) * columns + left + step % block[1]
    hidden = ~mark(torch.zeros_like(priority, dtype=torch.bool), kept)
    return MaskPlan(hidden, kept.sort(dim=1).values, targets)


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw
