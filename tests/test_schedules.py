from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from pretrain.schedules import (
    Schedule,
    constant,
    cosine_between,
    cosine_momentum,
    cosine_over_all,
    cosine_with_warmup,
    linear_momentum,
    linear_ramp,
    quarter_cosine,
)


def test_the_rate_rises_in_a_line_then_falls_along_half_a_cosine() -> None:
    rate = cosine_with_warmup(base=4.0, final=1.0, num_steps=14, warmup_steps=4)
    assert [rate(step) for step in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    # by hand: 1 + 3/2 (1 + cos(pi * k / 10)) at k = 0, 5, 10
    assert [rate(step) for step in (4, 9, 14)] == pytest.approx([4.0, 2.5, 1.0], abs=1e-12)
    assert rate(6) == pytest.approx(1 + 1.5 * (1 + math.cos(math.pi / 5)), rel=1e-12)
    values = [rate(step) for step in range(4, 15)]
    assert values == sorted(values, reverse=True)


def test_the_warm_up_may_start_above_zero_and_may_be_absent() -> None:
    for shape in (cosine_with_warmup, cosine_over_all):
        assert shape(2.0, 0.0, 10, 4, start=1.0)(0) == 1.0
        assert shape(2.0, 0.0, 10, 4, start=1.0)(2) == 1.5
        assert shape(2.0, 0.0, 10, 0)(0) == 2.0
    assert constant(2.0, 4, start=1.0)(2) == 1.5
    assert quarter_cosine(2.0, 0.0, 10, 0)(0) == 2.0


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 1), (10, 10), (10, 50), (3, 2)])
def test_the_rate_stays_between_its_ends_at_every_step_of_any_run(num_steps: int, warmup_steps: int) -> None:
    for shape in (cosine_with_warmup, cosine_over_all, quarter_cosine):
        rate = shape(2.0, 0.5, num_steps, warmup_steps)
        assert all(0.0 <= rate(step) <= 2.0 for step in range(num_steps + 100))
        assert rate(num_steps + warmup_steps + 1) == pytest.approx(0.5, abs=1e-12)  # and stays there


def test_the_cosine_over_all_steps_is_entered_late_and_ends_as_the_other() -> None:
    """METHODS A3, cos_timm: min + (base - min) (1 + cos pi t / T) / 2 after the warm-up."""
    rate = cosine_over_all(base=4.0, final=1.0, num_steps=12, warmup_steps=3, start=1.0)
    assert [rate(step) for step in range(3)] == [1.0, 2.0, 3.0]
    # by hand: 1 + 3/2 (1 + cos(pi / 4)), (1 + cos(pi / 3)), (1 + 0)
    assert [rate(step) for step in (3, 4, 6, 12)] == pytest.approx([3.5606602, 3.25, 2.5, 1.0], abs=1e-6)
    other = cosine_with_warmup(base=4.0, final=1.0, num_steps=12, warmup_steps=3, start=1.0)
    assert all(rate(step) < other(step) for step in range(3, 12))
    assert rate(12) == other(12)


def test_the_quarter_cosine_is_at_071_half_way_and_drops_a_little_after_the_warm_up() -> None:
    """METHODS A3, quarter_cos, on RelViT's 19 600 steps with its end of 1.25e-6."""
    base, final, num_steps = 5e-4, 1.25e-6, 19_600
    rate = quarter_cosine(base, final, num_steps, num_steps // 10)
    assert rate(980) == pytest.approx(base / 2)
    assert rate(1959) / base == pytest.approx(1959 / 1960)
    assert 1 - rate(1960) / base == pytest.approx(0.0123, abs=5e-5)  # 1 - cos(0.05 pi), less the end's part
    share = math.sqrt(0.5)
    assert rate(9800) == pytest.approx(base * share + final * (1 - share), rel=1e-12)
    assert rate(9800) / base == pytest.approx(0.707, abs=1e-3)
    assert rate(num_steps) == pytest.approx(final, rel=1e-9)


def test_the_warm_up_of_the_quarter_cosine_ends_at_a_tenth_rounded_down() -> None:
    """F 36: with 19 steps the threshold is 1, so step 1 is already on the cosine."""
    rate = quarter_cosine(1.0, 0.0, 19, 19 // 10)
    assert [rate(0), rate(1)] == pytest.approx([0.0, math.cos(math.pi / 38)])


def test_a_constant_rate_is_constant_after_its_warm_up() -> None:
    assert [constant(4.0, 2)(step) for step in range(4)] == [0.0, 2.0, 4.0, 4.0]
    assert {constant(4.0)(step) for step in range(100)} == {4.0}


def test_weight_decay_rises_along_half_a_cosine() -> None:
    """DINO's 0.04 to 0.4; by hand, a quarter of the way: 0.4 - 0.18 (1 + cos(pi / 4))."""
    decay = cosine_between(0.04, 0.4, 8)
    assert [decay(step) for step in (0, 4, 8, 9)] == pytest.approx([0.04, 0.22, 0.4, 0.4])
    assert decay(2) == pytest.approx(0.0927208, abs=1e-7)
    assert cosine_between(0.4, 0.04, 8)(2) == pytest.approx(0.44 - decay(2))


@pytest.mark.parametrize("shape", [cosine_momentum, linear_momentum])
def test_the_momentum_goes_from_its_base_to_one(shape: Callable[[float, int], Schedule]) -> None:
    momentum = shape(0.9, 10)
    assert [momentum(step) for step in (0, 5, 10, 11)] == pytest.approx([0.9, 0.95, 1.0, 1.0], abs=1e-12)
    values = [momentum(step) for step in range(12)]
    assert values == sorted(values)
    assert max(values) <= 1.0


def test_the_momentum_follows_half_a_cosine_or_a_line() -> None:
    # eq. of arXiv:2006.07733, section 3.2: 1 - (1 - base) (cos(pi k / K) + 1) / 2
    expected = 1 - 0.1 * (math.cos(0.3 * math.pi) + 1) / 2
    assert cosine_momentum(0.9, 10)(3) == pytest.approx(expected, rel=1e-12)
    assert linear_momentum(0.9, 10)(3) == pytest.approx(0.93, rel=1e-12)


@pytest.mark.parametrize("shape", [cosine_momentum, linear_momentum])
@pytest.mark.parametrize("base", [0.0, 1.0])
def test_a_momentum_of_zero_or_one_is_allowed(shape: Callable[[float, int], Schedule], base: float) -> None:
    momentum = shape(base, 4)
    assert momentum(0) == base
    assert momentum(4) == 1.0


def test_the_temperature_reaches_its_end_at_index_29_of_30() -> None:
    """DINO's teacher: 0.04 to 0.07 in 30 epochs, both ends included."""
    temperature = linear_ramp(0.04, 0.07, 30)
    assert temperature(0) == 0.04
    assert temperature(28) == pytest.approx(0.07 - 0.03 / 29)
    assert [temperature(29), temperature(30), temperature(500)] == pytest.approx([0.07, 0.07, 0.07])
    assert temperature(1) - temperature(0) == pytest.approx(0.03 / 29)


def test_a_ramp_of_no_epochs_is_its_end_and_one_of_a_single_epoch_its_start() -> None:
    assert linear_ramp(0.04, 0.07, 0)(0) == 0.07
    assert [linear_ramp(0.04, 0.07, 1)(epoch) for epoch in (0, 1)] == [0.04, 0.07]
