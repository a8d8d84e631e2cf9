"""Masks: of the count that was asked for, of each image on its own, and as the papers draw them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.randomness import uniform
from pretrain.views.masks import MaskConfig, MaskPlan, draw_mask, num_kept

GRIDS = [(8, 8), (14, 14), (9, 12)]
KINDS = ["random", "block", "multiblock"]


def _draw(num_views: int = 256, epoch: int = 0, rows: Tensor | None = None) -> Callable[[int], Tensor]:
    ids = torch.arange(num_views) if rows is None else rows
    return lambda n: uniform(1, epoch, ids, 15, n)


def _shared(*numbers: float) -> Callable[[int], Tensor]:
    def shared(n: int) -> Tensor:
        return torch.tensor(numbers[:n])

    return shared


def _step(micro_step: int) -> Callable[[int], Tensor]:
    return lambda n: uniform(1, 0, micro_step, 16, n)


def _plan(config: MaskConfig, grid: tuple[int, int], num_views: int = 256, epoch: int = 0) -> MaskPlan:
    return draw_mask(config, grid, _draw(num_views, epoch), _step(0))


@pytest.mark.parametrize(
    ("grid", "ratio", "expected"),
    [((14, 14), 0.75, 49), ((8, 8), 0.75, 16), ((9, 12), 0.6, 43), ((14, 14), 0.9, 19)],
)
def test_random_masks_keep_an_exact_count_and_each_patch_is_kept_or_hidden(
    grid: tuple[int, int], ratio: float, expected: int
) -> None:
    """T-MAE-1"""
    config, count = MaskConfig(ratio=ratio), grid[0] * grid[1]
    plan = _plan(config, grid)
    assert plan.kept is not None
    assert num_kept(config, grid) == expected
    assert plan.kept.shape == (256, expected)
    assert plan.targets.shape == (256, 0, 0)
    for kept, hidden in zip(plan.kept.tolist(), plan.hidden, strict=True):
        assert kept == sorted(set(kept))
        assert sorted(kept + hidden.nonzero().flatten().tolist()) == list(range(count))


def test_random_masks_put_every_patch_back_where_it_was() -> None:
    """T-MAE-1: the order of kept and hidden patches can be inverted"""
    plan = _plan(MaskConfig(), (8, 8))
    assert plan.kept is not None
    order = plan.hidden.to(torch.int8).argsort(dim=1, stable=True)  # kept first, as the decoder gets them
    assert torch.equal(order[:, :16], plan.kept)
    restore = order.argsort(dim=1)
    assert torch.equal(order.gather(1, restore), torch.arange(64).expand(256, 64))


def test_random_masks_differ_between_images_and_epochs_and_can_be_drawn_again() -> None:
    """T-MAE-7"""
    first, again, later = (_plan(MaskConfig(), (14, 14), epoch=epoch).hidden for epoch in (3, 3, 4))
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) == 256
    assert not (first == later).all(dim=1).any()
    often = _plan(MaskConfig(), (8, 8), num_views=8000).hidden.float().mean(dim=0)
    assert (often - 0.75).abs().max() < 0.025  # no patch is preferred; 5 standard deviations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_mask_does_not_depend_on_the_rest_of_the_batch(kind: str, grid: tuple[int, int]) -> None:
    """T-A-2"""
    config, rows = MaskConfig(kind=kind), torch.tensor([77, 3, 140])
    whole, part = _plan(config, grid), draw_mask(config, grid, _draw(rows=rows), _step(0))
    assert torch.equal(part.hidden, whole.hidden[rows])
    assert torch.equal(part.targets, whole.targets[rows])
    if whole.kept is not None:
        assert torch.equal(part.kept, whole.kept[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_drawn_once(kind: str) -> None:
    calls = []

    def draw(n: int) -> Tensor:
        calls.append(n)
        return _draw(4)(n)

    draw_mask(MaskConfig(kind=kind), (8, 8), draw, _step(0))
    assert len(calls) == 1


def test_a_token_can_stand_in_for_random_patches() -> None:
    drop, token = (_plan(MaskConfig(how=how, ratio=0.6), (8, 8)) for how in ("drop", "token"))
    assert token.kept is None
    assert torch.equal(token.hidden, drop.hidden)


# --- blocks


def _slow_blocks(draws: Tensor, rows: int, columns: int, count: int) -> list[list[bool]]:
    """One mask, block by block and try by try: float64 (rounds, 4, tries) draws."""
    hidden = [[False] * columns for _ in range(rows)]
    for numbers in draws.tolist():
        missing = count - sum(map(sum, hidden))
        for area_draw, aspect_draw, top_draw, left_draw in zip(*numbers, strict=True):
            least = count // 5
            area = least + (missing - least) * area_draw
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * aspect_draw)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(top_draw * (rows - height + 1)), int(left_draw * (columns - width + 1))
            block = [(i, j) for i in range(top, top + height) for j in range(left, left + width)]
            new = sum(not hidden[i][j] for i, j in block)
            if 0 < new <= missing:
                for i, j in block:
                    hidden[i][j] = True
                break
        else:
            break  # none of the tries fits
    return hidden


@pytest.mark.parametrize("grid", GRIDS)
def test_block_masks_are_those_of_a_slow_loop(grid: tuple[int, int]) -> None:
    config = MaskConfig(kind="block")
    plan = _plan(config, grid)
    draws = _draw()(16 * 4 * 10).double().view(256, 16, 4, 10)
    slow = [_slow_blocks(row, *grid, round(0.4 * grid[0] * grid[1])) for row in draws]
    assert torch.equal(plan.hidden.view(256, *grid), torch.tensor(slow))


def test_block_masks_hide_something_and_at_most_40_percent() -> None:
    """T-MF-1"""
    config = MaskConfig(kind="block")
    plan = _plan(config, (14, 14), num_views=4000)
    count = plan.hidden.sum(dim=1)
    assert plan.kept is None
    assert num_kept(config, (14, 14)) == 196 - 78
    assert count.min() >= 1
    assert count.max() == 78
    assert 0.6 < (count == 78).float().mean() < 0.8  # of the authors' loop: 0.71
    assert count.float().mean() > 77


def test_block_masks_hang_together() -> None:
    """A hidden patch's right neighbour is hidden far more often than the 40 % of scattered patches."""
    hidden = _plan(MaskConfig(kind="block"), (14, 14)).hidden.view(256, 14, 14)
    assert hidden[:, :, 1:][hidden[:, :, :-1]].float().mean() > 0.7
    often = hidden.float().mean(dim=0)
    assert often.min() > 0  # corners, too, if seldom


# --- blocks to predict


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("micro_step", range(4))
def test_a_context_holds_no_patch_of_a_block_to_predict(grid: tuple[int, int], micro_step: int) -> None:
    """T-IJ-1"""
    config = MaskConfig(kind="multiblock")
    plan = draw_mask(config, grid, _draw(512), _step(micro_step))
    assert plan.kept is not None
    assert plan.targets.shape[:2] == (512, 4)
    assert plan.kept.shape[1] > 10
    assert plan.kept.shape[1] <= num_kept(config, grid)
    for kept, hidden, targets in zip(plan.kept.tolist(), plan.hidden, plan.targets.flatten(1), strict=True):
        assert kept == sorted(set(kept))
        assert not set(kept) & set(targets.tolist())
        assert (~hidden).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("grid", GRIDS)
def test_blocks_to_predict_are_filled_rectangles_of_the_given_scale_and_aspect(grid: tuple[int, int]) -> None:
    """T-IJ-2"""
    sizes, count = set(), grid[0] * grid[1]
    for micro_step in range(12):
        plan = draw_mask(MaskConfig(kind="multiblock"), grid, _draw(64), _step(micro_step))
        rows, columns = plan.targets // grid[1], plan.targets % grid[1]
        height = rows.amax(dim=2) - rows.amin(dim=2) + 1
        width = columns.amax(dim=2) - columns.amin(dim=2) + 1
        assert height.unique().numel() == width.unique().numel() == 1  # of all images of a micro step
        high, wide = int(height[0, 0]), int(width[0, 0])
        assert high * wide == plan.targets.shape[2]
        assert (plan.targets.diff(dim=2) > 0).all()  # row by row, no patch twice
        ideal = [int(count * 0.15), int(count * 0.2)]  # before each side is rounded by up to half a patch
        assert (high - 0.5) * (wide - 0.5) <= ideal[1]
        assert (high + 0.5) * (wide + 0.5) >= ideal[0]
        assert (high - 0.5) / (wide + 0.5) <= 1.5
        assert (high + 0.5) / (wide - 0.5) >= 0.75
        sizes.add((high, wide))
    assert len(sizes) > 2  # scale and aspect are drawn on their own


def test_a_block_size_worked_by_hand() -> None:
    """15 % of 196 patches are 29; at aspect 1 that is 5 x 5, at 1.5 it is 7 x 4 (6.6 and 4.4)."""
    config = MaskConfig(kind="multiblock")
    square = draw_mask(config, (14, 14), _draw(2000), _shared(0.0, 1 / 3, 0.5))
    assert square.targets.shape == (2000, 4, 25)
    assert square.targets[..., 0].amin() == 0
    assert square.targets[..., 0].amax() == 9 * 14 + 9  # the last offset occurs
    upright = draw_mask(config, (14, 14), _draw(20), _shared(0.0, 0.99999, 0.5))
    assert torch.equal((upright.targets[0, 0] - upright.targets[0, 0, 0])[:5], torch.tensor([0, 1, 2, 3, 14]))
    assert upright.targets.shape == (20, 4, 28)


def test_blocks_to_predict_may_overlap_and_the_kept_patches_prefer_no_row() -> None:
    plan = draw_mask(MaskConfig(kind="multiblock"), (14, 14), _draw(4000), _shared(0.5, 0.3, 0.9))
    assert plan.kept is not None
    num_targets = torch.tensor([len(set(row)) for row in plan.targets.flatten(1).tolist()])
    assert (num_targets < plan.targets[0].numel()).float().mean() > 0.5
    assert abs((plan.kept // 14).float().mean() - 6.5) < 0.1  # raster-order prefixes would give less
    assert abs((plan.kept % 14).float().mean() - 6.5) < 0.1


@pytest.mark.parametrize("grid", GRIDS)
def test_the_last_resort_is_not_needed_in_practice(grid: tuple[int, int]) -> None:
    """It puts all blocks in one place, which four independent ones in this many images never are."""
    for micro_step in range(4):
        plan = draw_mask(MaskConfig(kind="multiblock"), grid, _draw(1000), _step(micro_step))
        assert not (plan.targets == plan.targets[:, :1]).all(dim=(1, 2)).any()


def test_when_every_placement_leaves_too_little_the_context_is_all_but_one_block() -> None:
    """T-IJ-1: blocks of 7 x 6 in all corners leave 26 patches of the context, always; 38 are needed."""
    numbers = torch.tensor([[0.0, 0.0], [0.0, 0.999], [0.999, 0.0], [0.999, 0.999], [0.0, 0.0]]).flatten()

    def draw(n: int) -> Tensor:
        return torch.cat([uniform(0, 0, torch.arange(3), 0, 196), numbers.repeat(3, 20)], dim=1)[:, :n]

    plan = draw_mask(MaskConfig(kind="multiblock"), (14, 14), draw, _shared(0.99999, 0.6, 0.9))
    assert plan.kept is not None
    assert plan.kept.shape == (3, 38)
    block = [14 * row + column for row in range(7) for column in range(6)]
    assert plan.targets.tolist() == [[block] * 4] * 3
    assert not any(set(kept) & set(block) for kept in plan.kept.tolist())


def test_few_contexts_are_smaller_than_the_fixed_count() -> None:
    """The first placement serves 99 in 100 images: their blocks are where the first numbers put them."""
    plan = draw_mask(MaskConfig(kind="multiblock"), (14, 14), _draw(4000), _shared(0.0, 1 / 3, 0.5))
    numbers = _draw(4000)(196 + 200)[:, 196:].view(4000, 20, 5, 2)
    top, left = (numbers[:, 0, :4] * 10).long().unbind(2)
    is_first = (plan.targets[..., 0] == top * 14 + left).all(dim=1).float().mean()
    assert 0.98 < is_first < 1


# --- settings


def test_settings_follow_the_kind() -> None:
    assert MaskConfig() == MaskConfig(kind="random", how="drop", ratio=0.75)
    assert MaskConfig(kind="block") == MaskConfig(kind="block", how="token", ratio=0.4)
    multiblock = MaskConfig(kind="multiblock")
    assert (multiblock.how, multiblock.ratio, multiblock.num_targets) == ("drop", None, 4)
    for kind in KINDS:
        assert MaskConfig.model_validate(MaskConfig(kind=kind).model_dump(mode="json")) == MaskConfig(
            kind=kind
        )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "block", "how": "drop"}, "use how 'token'"),
        ({"kind": "multiblock", "how": "token"}, "use how 'drop'"),
        ({"kind": "multiblock", "ratio": 0.5}, "leave it out"),
        ({"ratio": None}, "is required"),
        ({"ratio": 1.0}, "less than 1"),
        ({"kind": "block", "ratio": 0.8}, "at most 0.75"),
        ({"num_targets": 2}, "'num_targets' has no meaning for a random mask"),
        ({"kind": "block", "min_context": 3}, "'min_context' has no meaning"),
        ({"kind": "multiblock", "target_scale": [0.3, 0.2]}, "a range from low to high"),
        ({"kind": "squares"}, "'random', 'block' or 'multiblock'"),
        ({"rate": 0.5}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match="1 validation error") as error:
        MaskConfig.model_validate(settings)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (MaskConfig(ratio=0.9), (3, 3)),
        (MaskConfig(kind="block"), (2, 8)),
        (MaskConfig(kind="block", ratio=0.01), (6, 6)),
        (MaskConfig(kind="multiblock"), (4, 4)),
        (MaskConfig(kind="multiblock", min_context=40), (8, 8)),
    ],
)
def test_a_grid_that_is_too_small_is_refused(config: MaskConfig, grid: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"^mask: "):
        num_kept(config, grid)
    with pytest.raises(ConfigError, match=r"^mask: "):
        draw_mask(config, grid, _draw(2), _step(0))
