from __future__ import annotations

import math

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.models.positions import sincos_positions, sinusoid_positions


def test_the_two_orders_worked_by_hand() -> None:
    """Width 8 has two frequencies, 1 and 10000^(-1/2) = 0.01; patch 5 of a 2 x 3 grid is row 1, column 2."""
    of_column = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    of_row = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    mae, moco = (sincos_positions(8, (2, 3), order) for order in ("mae", "moco"))
    assert mae.shape == moco.shape == (6, 8)
    assert mae[5].tolist() == pytest.approx([*of_column, *of_row], abs=1e-7)
    assert moco[5].tolist() == pytest.approx([*of_row, *of_column], abs=1e-7)
    assert mae[0].tolist() == moco[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert mae.dtype == torch.float32


def test_patches_of_a_row_share_the_half_that_tells_the_row() -> None:
    table = sincos_positions(16, (3, 5), "moco").unflatten(0, (3, 5))
    assert torch.equal(table[:, :, :8], table[:, :1, :8].expand(3, 5, 8))
    assert torch.equal(table[:, :, 8:], table[:1, :, 8:].expand(3, 5, 8))
    other = sincos_positions(16, (3, 5), "mae").unflatten(0, (3, 5))
    assert torch.equal(other, torch.cat([table[:, :, 8:], table[:, :, :8]], dim=2))


@pytest.mark.parametrize("order", ["mae", "moco"])
def test_likeness_depends_on_the_distance_only_and_no_two_patches_are_equal(order: str) -> None:
    """sin a sin b + cos a cos b = cos(a - b), so moving both patches changes nothing."""
    table = sincos_positions(32, (7, 7), order).double()  # type: ignore[arg-type]
    likeness = (table @ table.T).unflatten(0, (7, 7)).unflatten(2, (7, 7))  # row, column, row, column
    torch.testing.assert_close(likeness[:-1, :-1, :-1, :-1], likeness[1:, 1:, 1:, 1:], rtol=0, atol=1e-5)
    flat = likeness.reshape(49, 49)
    torch.testing.assert_close(flat.diagonal(), torch.full((49,), 16.0, dtype=torch.float64))
    assert (flat - 16 * torch.eye(49)).max() < 16 - 1e-3


def test_the_slowest_frequency_is_close_to_one_turn_in_ten_thousand() -> None:
    table = sincos_positions(4 * 96, (1, 2), "mae")
    assert table[1, 95].item() == pytest.approx(10_000 ** (-95 / 96), rel=1e-6)


@pytest.mark.parametrize(("dim", "legal"), [(10, "8 or 12"), (3, "4")])
def test_a_width_that_cannot_be_divided_is_refused(dim: int, legal: str) -> None:
    with pytest.raises(ConfigError, match=rf"^embed_dim: {dim} .*; use {legal}$"):
        sincos_positions(dim, (2, 2), "mae")


def test_a_plain_sequence_alternates_sine_and_cosine() -> None:
    """Width 4: pairs of frequency 1 and 0.01; place 3 by hand."""
    table = sinusoid_positions(4, 5)
    assert table.shape == (5, 4)
    expected = [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]
    assert table[3].tolist() == pytest.approx(expected, abs=1e-7)
    assert table[0].tolist() == [0, 1, 0, 1]
    assert sinusoid_positions(5, 2)[1, 4].item() == pytest.approx(math.sin(10_000 ** (-4 / 5)), rel=1e-6)
