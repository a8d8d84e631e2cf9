"""Plans: pure functions of the counters, distributed as the method says."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import RandomResizedCrop

from pretrain.views.patch_plan import (
    derangements,
    neighbor_edges,
    permutation_set,
    take_block,
    take_neighbors,
)
from pretrain.views.plan import (
    BlurConfig,
    JitterConfig,
    PatchConfig,
    ViewConfig,
    ViewPlan,
    _asked_for,
    crop_boxes,
    draw_view_plan,
)

VIEW = ViewConfig(size_px=64, turn=True, blur=BlurConfig(prob=0.5), solarize_prob=0.2)
MIXED = PatchConfig(grid=(8, 8), patch_px=8, colorization=6, inpainting=10, pairs=4, jigsaw=8)
RECIPES = {
    "default of 64 patches": MIXED,
    "default of 196 patches": PatchConfig(
        grid=(14, 14), patch_px=16, colorization=20, inpainting=29, pairs=12, jigsaw=25
    ),
    "only neighbours, to the limit": PatchConfig(grid=(3, 5), patch_px=4, pairs=3),
    "any pairs and a block": PatchConfig(
        grid=(8, 8), patch_px=8, inpainting=9, inpainting_block=True, pairs=5, pair_mode="any", jigsaw=2
    ),
    "permset": PatchConfig(
        grid=(5, 7), patch_px=8, colorization=2, inpainting=2, pairs=2, jigsaw=9, jigsaw_mode="permset"
    ),
    "one task": PatchConfig(grid=(2, 3), patch_px=8, colorization=3),
    "no task": PatchConfig(grid=(8, 8), patch_px=8),
}


def _plan(
    patches: PatchConfig | None = MIXED, num_images: int = 64, seed: int = 5, epoch: int = 2
) -> ViewPlan:
    ids = torch.arange(100, 100 + num_images)
    return draw_view_plan([VIEW, VIEW], patches, seed, torch.full_like(ids, epoch), ids)


def _tensors(plan: object) -> Iterator[Tensor]:
    for field in fields(plan):  # type: ignore[arg-type]
        value = getattr(plan, field.name)
        if is_dataclass(value):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _all_sets(plan: ViewPlan) -> Tensor:
    sets = plan.patches
    return torch.cat([sets.colorization, sets.inpainting, sets.pairs.flatten(1), sets.jigsaw], dim=1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_patch_sets_are_disjoint_of_exact_size_and_in_range(recipe: str) -> None:
    """T-MT-1"""
    config = RECIPES[recipe]
    plan = _plan(config)
    sets = plan.patches
    assert sets.colorization.shape == (128, config.colorization)
    assert sets.inpainting.shape == (128, config.inpainting)
    assert sets.pairs.shape == (128, config.pairs, 2)
    assert sets.jigsaw.shape == sets.jigsaw_source.shape == (128, config.jigsaw)
    index = _all_sets(plan)
    assert index.numel() == 0 or (index.min() >= 0 and index.max() < config.num_patches)
    assert all(len(set(row)) == config.total for row in index.tolist())
    assert torch.equal(sets.jigsaw_source.sort(dim=1).values, sets.jigsaw.sort(dim=1).values)
    num_tiles = 2 * config.pairs + config.jigsaw
    assert torch.equal(plan.tiles.index, index[:, index.shape[1] - num_tiles :])
    assert plan.tiles.offset_px.shape == (128, num_tiles, 2)
    assert plan.tiles.jitter.factors.shape == (128 * num_tiles, 4)


def test_the_same_counters_give_the_same_plan() -> None:
    """T-MT-2, T-A-2"""
    first, second = _plan(), _plan()
    assert all(torch.equal(x, y) for x, y in zip(_tensors(first), _tensors(second), strict=True))
    for other in (_plan(seed=6), _plan(epoch=3)):
        assert not torch.equal(_all_sets(first), _all_sets(other))
        assert not torch.equal(first.jitter.factors, other.jitter.factors)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plan_does_not_depend_on_the_rest_of_the_batch(recipe: str) -> None:
    """T-A-2"""
    config, ids = RECIPES[recipe], torch.tensor([17, 3, 99, 4, 2**40])
    epochs = torch.tensor([0, 1, 0, 0, 7])
    rows = torch.tensor([3, 1])
    whole = draw_view_plan([VIEW, VIEW], config, 1, epochs, ids)
    part = draw_view_plan([VIEW, VIEW], config, 1, epochs[rows], ids[rows])
    both_views = torch.cat([rows, rows + 5])
    num_tiles = whole.tiles.index.shape[1]
    for mine, full in zip(_tensors(part), _tensors(whole), strict=True):
        if len(full) != 10:  # one row per tile
            full = full.view(10, num_tiles, *full.shape[1:])
        assert torch.equal(mine, full[both_views].view_as(mine))


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_hashed_together_are_those_hashed_one_by_one(recipe: str) -> None:
    _asked_for.cache_clear()
    one_by_one = _plan(RECIPES[recipe])
    for together in (_plan(RECIPES[recipe]), _plan(RECIPES[recipe], num_images=7)):
        for first, second in zip(_tensors(one_by_one), _tensors(together), strict=True):
            if len(second) == len(first):
                assert torch.equal(first, second)
    assert _asked_for.cache_info().hits == 2


def test_a_plan_takes_few_operations_once_it_is_known_what_is_drawn() -> None:
    """Each is launched by itself on a GPU: one by one the hashes alone are 1400."""
    for _ in range(2):
        with Counted() as counted:
            _plan()
    assert counted.num_operations < 600


class Counted(TorchDispatchMode):
    """Counts what is done with tensors, views of their memory included."""

    num_operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num_operations += 1
        return function(*args, **(kwargs or {}))


def test_a_view_drawn_alone_is_the_view_drawn_in_a_group() -> None:
    ids = torch.arange(6)
    epochs = torch.zeros_like(ids)
    group = draw_view_plan([VIEW, VIEW], MIXED, 1, epochs, ids)
    second = draw_view_plan([VIEW], MIXED, 1, epochs, ids, view_indices=[1])
    assert torch.equal(second.jitter.factors, group.jitter.factors[6:])
    assert torch.equal(_all_sets(second), _all_sets(group)[6:])
    assert not torch.equal(_all_sets(group)[:6], _all_sets(group)[6:])


def test_views_have_their_own_probabilities() -> None:
    ids = torch.arange(4000)
    strong = ViewConfig(size_px=64, flip_prob=1.0, blur=BlurConfig(prob=1.0), solarize_prob=0.2, turn=True)
    weak = ViewConfig(
        size_px=64, flip_prob=0.0, gray_prob=0.0, jitter=JitterConfig(brightness=0.0, hue=0.0, contrast=1.5)
    )
    plan = draw_view_plan([strong, weak], None, 0, torch.zeros_like(ids), ids)
    assert plan.flip.tolist() == [True] * 4000 + [False] * 4000
    assert not plan.gray[4000:].any()
    assert not plan.solarize[4000:].any()
    assert not plan.quarter_turns[4000:].any()
    assert not plan.blur_sigma_px[4000:].any()
    assert plan.blur_sigma_px[:4000].min() >= 0.1
    assert plan.blur_sigma_px[:4000].max() <= 2.0
    assert abs(plan.solarize[:4000].float().mean() - 0.2) < 0.03
    assert abs(plan.jitter.apply.float().mean() - 0.8) < 0.02
    counts = plan.quarter_turns[:4000].bincount(minlength=4)
    assert (counts - 1000).abs().max() < 150
    brightness, contrast, saturation, hue = plan.jitter.factors[4000:].unbind(1)
    assert (brightness == 1).all()
    assert (hue == 0).all()
    assert 0 <= contrast.min() < 0.05  # the range [1 - 1.5, 1 + 1.5] is cut at 0
    assert 2.45 < contrast.max() <= 2.5
    assert abs(saturation.mean() - 1) < 0.01
    orders = {tuple(row) for row in plan.jitter.order.tolist()}
    assert len(orders) == 24


def test_views_without_patch_tasks_have_empty_sets() -> None:
    clean = VIEW.model_copy(update={"corrupt": False})
    ids = torch.arange(3)
    for view, patches in ((clean, MIXED), (VIEW, None)):
        plan = draw_view_plan([view], patches, 0, torch.zeros_like(ids), ids)
        assert _all_sets(plan).shape == (3, 0)
        assert plan.tiles.offset_px.shape == (3, 0, 2)
        assert plan.patches.jigsaw_class.tolist() == [0, 0, 0]


def test_a_view_of_some_tasks_has_the_sets_that_they_have_among_all() -> None:
    ids = torch.arange(20)
    whole = draw_view_plan([VIEW], MIXED, 0, torch.zeros_like(ids), ids).patches
    some = VIEW.model_copy(update={"corrupt": ("relative_position", "jigsaw")})
    plan = draw_view_plan([some], MIXED, 0, torch.zeros_like(ids), ids)
    assert torch.equal(plan.patches.pairs, whole.pairs)
    assert torch.equal(plan.patches.jigsaw, whole.jigsaw)
    assert torch.equal(plan.patches.jigsaw_source, whole.jigsaw_source)
    assert plan.patches.colorization.shape == plan.patches.inpainting.shape == (20, 0)
    assert plan.tiles.index.shape[1] == 2 * MIXED.pairs + MIXED.jigsaw
    colored = VIEW.model_copy(update={"corrupt": ("colorization",)})
    plan = draw_view_plan([colored], MIXED, 0, torch.zeros_like(ids), ids)
    assert torch.equal(plan.patches.colorization, whole.colorization)
    assert plan.tiles.index.shape[1] == plan.patches.jigsaw.shape[1] == plan.patches.pairs.shape[1] == 0


def test_sets_that_may_overlap_are_drawn_independently() -> None:
    """Of exact size, and as often in common as chance has it."""
    ids = torch.arange(2000)
    overlapping = VIEW.model_copy(update={"disjoint": False})
    sets = draw_view_plan([overlapping], MIXED, 3, torch.zeros_like(ids), ids).patches
    members = {
        name: torch.zeros(2000, 64).scatter(1, index.flatten(1), 1.0)
        for name, index in (
            ("colorization", sets.colorization),
            ("inpainting", sets.inpainting),
            ("pairs", sets.pairs),
            ("jigsaw", sets.jigsaw),
        )
    }
    sizes = {name: int(member.sum(dim=1).unique().item()) for name, member in members.items()}
    assert sizes == {"colorization": 6, "inpainting": 10, "pairs": 8, "jigsaw": 8}
    for one, other in combinations(members, 2):
        expected = sizes[one] * sizes[other] / 64
        found = (members[one] * members[other]).sum(dim=1).mean().item()
        assert found == pytest.approx(expected, rel=0.15), (one, other)


def test_views_that_cannot_share_tensors_are_refused() -> None:
    ids = torch.arange(3)
    for change in (
        {"corrupt": False},
        {"size_px": 32},
        {"corrupt": ("jigsaw",)},
        {"disjoint": False},
    ):
        with pytest.raises(ValueError, match="must agree"):
            draw_view_plan([VIEW, VIEW.model_copy(update=change)], MIXED, 0, torch.zeros_like(ids), ids)


def test_neighbour_pairs_touch_and_come_in_all_eight_directions() -> None:
    config = RECIPES["default of 196 patches"]
    pairs = _plan(config).patches.pairs.flatten(0, 1)
    down = pairs[:, 1] // 14 - pairs[:, 0] // 14
    right = pairs[:, 1] % 14 - pairs[:, 0] % 14
    assert torch.maximum(down.abs(), right.abs()).eq(1).all()
    counts = (3 * (down + 1) + right + 1).bincount(minlength=9)
    assert counts[4] == 0
    assert counts[[0, 1, 2, 3, 5, 6, 7, 8]].min() > len(pairs) / 16


def test_each_edge_of_the_grid_is_listed_once() -> None:
    edges = {frozenset(edge) for edge in neighbor_edges((3, 4)).T.tolist()}
    assert neighbor_edges((3, 4)).shape[1] == len(edges) == 3 * 3 + 2 * 4 + 2 * (2 * 3)


def test_pairs_are_taken_by_priority_as_a_slow_loop_does() -> None:
    priority = torch.rand(5, neighbor_edges((4, 4)).shape[1], generator=torch.Generator().manual_seed(0))
    taken = torch.zeros(5, 16, dtype=torch.bool)
    taken[:, 5] = True
    pairs, after = take_neighbors(priority, taken, 3, (4, 4))
    edges = neighbor_edges((4, 4)).T.tolist()
    for row in range(5):
        used, expected = {5}, []
        for i in priority[row].argsort().tolist():
            if len(expected) < 3 and used.isdisjoint(edges[i]):
                expected.append(edges[i])
                used.update(edges[i])
        assert pairs[row].tolist() == expected
        assert set(after[row].nonzero().flatten().tolist()) == used


def test_a_block_holds_the_nearest_free_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    priority, tie_break = torch.rand(2, 20, 64, generator=generator)
    taken = torch.rand(20, 64, generator=generator) < 0.2
    block, after = take_block(priority, tie_break, taken, 9, columns=8)
    assert not taken.gather(1, block).any()
    assert torch.equal(after.sum(dim=1), taken.sum(dim=1) + 9)
    for row in range(20):
        free = (~taken[row]).nonzero().flatten()
        anchor = free[priority[row, free].argmin()]
        apart = torch.maximum((free // 8 - anchor // 8).abs(), (free % 8 - anchor % 8).abs())
        chosen = torch.isin(free, block[row])
        assert chosen[free == anchor].all()
        assert apart[chosen].max() <= apart[~chosen].min()


def test_slot_jigsaw_moves_every_patch_and_keeps_slots_in_order() -> None:
    sets = _plan().patches
    assert torch.equal(sets.jigsaw, sets.jigsaw.sort(dim=1).values)
    assert (sets.jigsaw != sets.jigsaw_source).all()


def test_derangements_never_fix_a_point_and_are_equally_likely() -> None:
    found = derangements(torch.rand(9000, 24, 4, generator=torch.Generator().manual_seed(0)))
    assert (found != torch.arange(4)).all()
    distinct, counts = found.unique(dim=0, return_counts=True)
    assert len(distinct) == 9  # subfactorial of 4
    assert (counts - 1000).abs().max() < 150
    two = derangements(torch.rand(5, 24, 2))
    assert two.tolist() == [[1, 0]] * 5


def test_derangements_fall_back_to_moving_round_by_one() -> None:
    in_order = torch.linspace(0, 0.9, 5).expand(1, 3, 5)
    assert derangements(in_order).tolist() == [[1, 2, 3, 4, 0]]


def test_a_single_item_cannot_be_deranged() -> None:
    with pytest.raises(ValueError, match="no derangement"):
        derangements(torch.rand(2, 3, 1))


@pytest.mark.parametrize("num_permutations", [100, 1000])
def test_permutations_are_distinct_and_far_apart(num_permutations: int) -> None:
    """METHODS B8.5: distinct, minimum Hamming distance at least 2; the inverse restores."""
    table = permutation_set(num_permutations)
    assert table.shape == (num_permutations, 9)
    assert torch.equal(table.sort(dim=1).values, torch.arange(9).expand_as(table))
    distance = (table.unsqueeze(0) != table.unsqueeze(1)).sum(dim=2)
    distance.fill_diagonal_(9)
    assert distance.min() >= 2
    assert distance.double().mean() > 8.0  # random permutations have 8
    assert torch.equal(table.gather(1, table.argsort(dim=1)), torch.arange(9).expand_as(table))
    assert torch.equal(permutation_set(num_permutations), table)


def test_the_first_nine_permutations_share_no_position() -> None:
    table = permutation_set(9)
    assert all(len(set(column)) == 9 for column in table.T.tolist())


def test_permset_puts_one_patch_in_each_cell_and_names_the_permutation() -> None:
    config = RECIPES["permset"]
    sets = _plan(config).patches
    cell = sets.jigsaw // 7 * 3 // 5 * 3 + sets.jigsaw % 7 * 3 // 7
    assert torch.equal(cell, torch.arange(9).expand_as(cell))
    permutation = permutation_set(config.num_permutations)[sets.jigsaw_class]
    assert torch.equal(sets.jigsaw_source, sets.jigsaw.gather(1, permutation))
    assert len(sets.jigsaw_class.unique()) > 50


def test_tile_crops_stay_inside_the_patch() -> None:
    """Offsets 0..P - round(P / 1.15), each equally likely: 0..2 for 16 px patches."""
    offsets = _plan(RECIPES["default of 196 patches"]).tiles.offset_px.flatten()
    counts = offsets.bincount()
    assert len(counts) == 3
    assert (counts / len(offsets) - 1 / 3).abs().max() < 0.02


@pytest.mark.parametrize("size", [(90, 120), (40, 400), (400, 40)])
def test_crops_are_distributed_as_torchvisions_random_resized_crop(size: tuple[int, int]) -> None:
    height, width = size
    config, num_samples = ViewConfig(scale=(0.2, 1.0)), 4000
    ids = torch.arange(num_samples)
    boxes = crop_boxes(
        config, 0, torch.zeros_like(ids), ids, 0, torch.full_like(ids, height), torch.full_like(ids, width)
    )
    top, left, box_height, box_width = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(num_samples)]
    )
    for mine, other in zip(boxes.double().unbind(1), theirs.double().unbind(1), strict=True):
        at = torch.cat([mine, other]).unique()
        mine_below = torch.searchsorted(mine.sort().values, at, right=True) / num_samples
        other_below = torch.searchsorted(other.sort().values, at, right=True) / num_samples
        assert (mine_below - other_below).abs().max() < 1.95 * (
            2 / num_samples
        ) ** 0.5  # Kolmogorov-Smirnov, 0.1 %
