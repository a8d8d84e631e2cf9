"""Intervals are the published ones."""

from __future__ import annotations

import pytest

from pretrain.evaluate.intervals import accuracy_of, over_seeds, student_quantile, wilson_interval


def test_the_interval_of_a_share_is_wilsons() -> None:
    """For 81 of 263, a worked example: 0.2553 to 0.3662 (Newcombe, 1998)."""
    low, high = wilson_interval(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(1.0, 100)[1] == 1.0
    assert wilson_interval(0.0, 100)[0] == 0.0


@pytest.mark.parametrize(
    ("degrees", "tabled"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_quantiles_are_those_of_students_table(degrees: int, tabled: float) -> None:
    assert student_quantile(degrees) == pytest.approx(tabled, abs=5e-4)
    assert student_quantile(5, 0.95) == pytest.approx(2.015, abs=5e-4)


def test_three_seeds_give_mean_deviation_and_interval() -> None:
    """By hand: mean 0.8, deviation 0.02, half width 4.303 * 0.02 / sqrt(3)."""
    found = over_seeds([0.78, 0.80, 0.82])
    assert found["mean"] == pytest.approx(0.8)
    assert found["std"] == pytest.approx(0.02)
    assert found["interval_95"] == pytest.approx([0.8 - 0.04968, 0.8 + 0.04968], abs=1e-5)
    assert over_seeds([0.1, 0.9])["interval_95"] == [0.0, 1.0]  # no share lies beyond


def test_one_seed_has_the_interval_of_its_test_set() -> None:
    assert accuracy_of([0.5], 100) == {
        "top1_ratio": 0.5,
        "top1_ratio_std": None,
        "top1_ratio_95": list(wilson_interval(0.5, 100)),
        "interval": "Wilson, of one test set",
    }
    assert accuracy_of([0.5, 0.6], 100)["interval"] == "Student, over 2 seeds"
