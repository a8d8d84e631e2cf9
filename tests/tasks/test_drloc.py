"""Dense relative localization: which pairs are drawn, what is asked of them, how the loss comes and goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pydantic
import pytest
import torch
from example_views import LAYOUT, SITE, example_views, rows_of, with_patches, with_plan
from torch import Tensor, nn

from pretrain.peers import ALONE
from pretrain.tasks.contract import EncodedViews, TaskOutput
from pretrain.tasks.drloc import DrlocConfig, DrlocTask, best_constant_error, draw_pairs, pair_distances, ramp
from pretrain.tokens import TokenLayout
from pretrain.views.prepare import Moment


def run(views: EncodedViews, head: nn.Module | None = None, **settings: Any) -> TaskOutput:
    torch.manual_seed(0)
    task = DrlocTask(DrlocConfig(**{"ramp_epochs": 0.0, **settings}), SITE).double()
    if head is not None:
        task.head = head
    return task(views, ALONE)


class Ruler(nn.Module):
    """Reads (row, column) from the first two numbers of each token: distances down and across."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, joined: Tensor) -> Tensor:
        first, second = joined.chunk(2, dim=-1)
        return (first - second)[..., :2].abs() / self.unit


# --- the ramp


def test_the_ramp_rises_over_20_epochs_and_is_gone_at_300() -> None:
    """B4.7: 0 at epoch 0, 1 at 20, halfway down at 160."""
    config = DrlocConfig()
    expected = {0.0: 0.0, 5.0: 0.25, 20.0: 1.0, 160.0: 0.5, 300.0: 0.0, 400.0: 0.0}
    assert {epoch: ramp(config, epoch) for epoch in expected} == pytest.approx(expected)
    assert ramp(DrlocConfig(end_epochs=None), 1e6) == 1.0
    assert ramp(DrlocConfig(ramp_epochs=0.0), 0.0) == 1.0


def test_a_ramp_that_ends_before_it_has_risen_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="end_epochs, 20, must be after ramp_epochs, 20"):
        DrlocConfig(end_epochs=20.0)


def test_the_ramp_multiplies_the_loss_and_leaves_the_error_as_it_is() -> None:
    views = example_views()
    whole = run(views)
    early = run(replace(views, moment=Moment(epoch=5.0)), ramp_epochs=20.0)
    assert early.loss.item() == pytest.approx(whole.loss.item() / 4)
    assert early.metrics["error"] == whole.metrics["error"] == whole.loss
    assert early.metrics["ramp"].item() == 0.25


def test_before_the_ramp_every_parameter_has_a_gradient_of_zero() -> None:
    task = DrlocTask(DrlocConfig(), SITE).double()
    task(example_views(), ALONE).loss.backward()
    for parameter in task.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


# --- targets


def test_targets_are_worked_by_hand() -> None:
    """F 34: the first component is down, the second across. Patches 0, 7, 14 are (0, 0), (1, 3), (3, 2)."""
    pairs = torch.tensor([[[0, 7], [14, 7], [5, 5]]])
    raw = pair_distances(pairs, (4, 4), raw=True)
    assert raw.tolist() == [[[1.0, 3.0], [2.0, 1.0], [0.0, 0.0]]]
    torch.testing.assert_close(pair_distances(pairs, (4, 4), raw=False), raw / 3)


def test_targets_follow_the_contents_of_a_shuffled_view() -> None:
    """Places 0 and 1 show the patches 7 and 14."""
    source = torch.arange(16).unsqueeze(0)
    source[0, :2] = torch.tensor([7, 14])
    found = pair_distances(torch.tensor([[[0, 1]]]), (4, 4), raw=True, source=source)
    assert found.tolist() == [[[2.0, 1.0]]]


@pytest.mark.parametrize("raw", [False, True])
def test_exact_distances_cost_nothing_and_are_in_range(raw: bool) -> None:
    """B4.7, F 24: in sides of the grid less one they fill 0..1, raw ones 0..k-1."""
    layout = TokenLayout((4, 4), LAYOUT.registers)
    places = layout.positions().double()
    views = with_patches(example_views(16), places.repeat(1, 24).expand(32, 16, 48))
    output = run(views, Ruler(1.0 if raw else 3.0), raw=raw)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-7)
    pairs = draw_pairs(views, 64, 16)
    target = pair_distances(pairs, (4, 4), raw)
    assert target.min() == 0.0
    assert target.max() == (3.0 if raw else 1.0)


def test_shuffled_views_are_measured_by_their_contents() -> None:
    views = example_views()
    order = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    contents = LAYOUT.positions().double()[order].repeat(1, 1, 24)
    views = with_plan(with_patches(views, contents), patches=replace(views.plan.patches, shuffled=order))
    assert run(views, Ruler(3.0)).loss.item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (3, 6)])
def test_chance_is_the_error_of_the_best_constant(grid: tuple[int, int], raw: bool) -> None:
    """By trying constants: none does better, one does as well."""
    num_places = grid[0] * grid[1]
    place = torch.arange(num_places)
    pairs = torch.stack(torch.meshgrid(place, place, indexing="ij"), dim=-1).flatten(0, 1).unsqueeze(0)
    target = pair_distances(pairs, grid, raw).double()[0]  # (N^2, 2)
    errors = [
        min((target[:, axis] - guess).abs().mean().item() for guess in target[:, axis].unique())
        for axis in range(2)
    ]
    assert best_constant_error(grid, raw) == pytest.approx(sum(errors) / 2, abs=1e-6)


# --- draws


def test_pairs_are_uniform_and_independent() -> None:
    """Of 2000 images times 64 pairs every ordered pair of 9 patches, itself included, comes 1 in 81 times."""
    views = replace(example_views(), sample_ids=torch.arange(2000))
    pairs = draw_pairs(views, 64, 9)
    assert pairs.shape == (2 * 2000, 64, 2)
    counts = (pairs[..., 0] * 9 + pairs[..., 1]).flatten().bincount(minlength=81).double()
    expected = pairs[..., 0].numel() / 81
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 80 + 5 * (2 * 80) ** 0.5


def test_pairs_follow_sample_step_and_view_and_nothing_else() -> None:
    """T-A-2: a half batch draws what these samples draw in the whole one."""
    views = example_views(6)
    pairs = draw_pairs(views, 64, 16)
    rows = torch.tensor([1, 4, 7, 10])
    assert torch.equal(draw_pairs(rows_of(views, rows), 64, 16), pairs[rows])
    later = draw_pairs(replace(views, moment=Moment(step=1)), 64, 16)
    for other in (later, pairs.roll(6, dims=0), pairs.roll(1, dims=0)):
        assert (other != pairs).flatten(1).any(dim=1).all()


def test_the_tokens_of_both_places_are_joined_in_order() -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, joined: Tensor) -> Tensor:
            seen.append(joined)
            return joined[..., :2]

    views = with_patches(example_views(), torch.arange(16.0).reshape(1, 16, 1).expand(8, 16, 48))
    run(views, Recorder(), num_pairs=5)
    assert torch.equal(seen[0][..., [0, 48]].long(), draw_pairs(views, 5, 16))
