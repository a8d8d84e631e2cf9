from __future__ import annotations

import math

import pytest

from pretrain.schedules import cosine_momentum, cosine_with_warmup


def test_the_rate_rises_in_a_line_then_falls_along_half_a_cosine() -> None:
    rate = cosine_with_warmup(base=4.0, final=1.0, num_steps=14, warmup_steps=4)
    assert [rate(step) for step in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    # by hand: 1 + 3/2 (1 + cos(pi * k / 10)) at k = 0, 5, 10
    assert [rate(step) for step in (4, 9, 14)] == pytest.approx([4.0, 2.5, 1.0], abs=1e-12)
    assert rate(6) == pytest.approx(1 + 1.5 * (1 + math.cos(math.pi / 5)), rel=1e-12)
    values = [rate(step) for step in range(4, 15)]
    assert values == sorted(values, reverse=True)


def test_the_warm_up_may_start_above_zero_and_may_be_absent() -> None:
    assert cosine_with_warmup(2.0, 0.0, 10, 4, start=1.0)(0) == 1.0
    assert cosine_with_warmup(2.0, 0.0, 10, 4, start=1.0)(2) == 1.5
    assert cosine_with_warmup(2.0, 0.0, 10, 0)(0) == 2.0


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 1), (10, 10), (10, 50), (3, 2)])
def test_the_rate_stays_between_its_ends_at_every_step_of_any_run(num_steps: int, warmup_steps: int) -> None:
    rate = cosine_with_warmup(2.0, 0.5, num_steps, warmup_steps)
    assert all(0.0 <= rate(step) <= 2.0 for step in range(num_steps + 100))
    assert rate(num_steps + warmup_steps + 1) == 0.5  # and stays there


def test_the_momentum_goes_from_its_base_to_one_along_half_a_cosine() -> None:
    momentum = cosine_momentum(0.9, 10)
    assert [momentum(step) for step in (0, 5, 10, 11)] == pytest.approx([0.9, 0.95, 1.0, 1.0], abs=1e-12)
    # eq. of arXiv:2006.07733, section 3.2: 1 - (1 - base) (cos(pi k / K) + 1) / 2
    assert momentum(3) == pytest.approx(1 - 0.1 * (math.cos(0.3 * math.pi) + 1) / 2, rel=1e-12)
    values = [momentum(step) for step in range(12)]
    assert values == sorted(values)
    assert max(values) <= 1.0


@pytest.mark.parametrize("base", [0.0, 1.0])
def test_a_momentum_of_zero_or_one_is_allowed(base: float) -> None:
    momentum = cosine_momentum(base, 4)
    assert momentum(0) == base
    assert momentum(4) == 1.0
