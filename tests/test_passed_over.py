from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import CheckpointError
from pretrain.passed_over import PassedOver, passed_over_from_json

LENGTH = 80


@st.composite
def rollbacks(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Windows of training steps, as a run meets them: each after some rollback, in any order."""
    firsts = draw(st.lists(st.integers(0, 30), max_size=6))
    return [(first, first + draw(st.integers(0, 8))) for first in firsts]


def added(windows: list[tuple[int, int]]) -> PassedOver:
    passed = PassedOver()
    for first, last in windows:
        passed = passed.add(first, last)
    return passed


def steps_of(passed: PassedOver, num: int = LENGTH) -> list[int]:
    return [passed.data_step(step) for step in range(num)]


def test_a_run_that_passes_nothing_over_reads_the_data_in_order() -> None:
    assert steps_of(PassedOver()) == list(range(LENGTH))


def test_a_window_is_left_out_and_the_rest_moves_up() -> None:
    """Row 19: steps 3 and 4 were not finite; the run goes back and takes data steps 5, 6 ... there."""
    assert steps_of(PassedOver().add(3, 4), 6) == [0, 1, 2, 5, 6, 7]


def test_a_second_window_is_counted_in_the_steps_of_the_run_that_met_it() -> None:
    """Row 19: after (3, 4) is left out, training steps 5 and 6 use data steps 7 and 8."""
    passed = PassedOver().add(3, 4).add(5, 6)
    assert passed.windows == ((3, 4), (7, 8))
    assert steps_of(passed, 7) == [0, 1, 2, 5, 6, 9, 10]


def test_windows_that_touch_or_enclose_others_become_one() -> None:
    assert PassedOver().add(3, 4).add(3, 3).windows == ((3, 5),)
    assert PassedOver().add(3, 4).add(1, 2).windows == ((1, 4),)
    assert PassedOver().add(3, 4).add(2, 3).windows == ((2, 5),)
    assert PassedOver(((2, 3), (6, 7), (10, 11))).add(1, 4).windows == ((1, 8), (10, 11))


@settings(max_examples=100, deadline=None)
@given(rollbacks())
def test_data_steps_rise_and_are_exactly_those_outside_the_windows(windows: list[tuple[int, int]]) -> None:
    passed = added(windows)
    left_out = {step for first, last in passed.windows for step in range(first, last + 1)}
    used = steps_of(passed)
    assert used == [step for step in range(max(used) + 1) if step not in left_out]
    assert len(left_out) == sum(last - first + 1 for first, last in windows)


@settings(max_examples=100, deadline=None)
@given(rollbacks(), st.integers(0, 40), st.integers(0, 8))
def test_adding_a_window_removes_its_data_and_nothing_else(
    windows: list[tuple[int, int]], first: int, extra: int
) -> None:
    """Steps before keep theirs, those of the window are gone, and what follows takes their places."""
    before = added(windows)
    after, last = before.add(first, first + extra), first + extra
    old = steps_of(before)
    new = steps_of(after, LENGTH - extra - 1)
    assert new == old[:first] + old[last + 1 :]
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(after.windows)]
    assert all(gap >= 2 for gap in gaps)  # merged as far as they can be


@settings(max_examples=50, deadline=None)
@given(rollbacks())
def test_json_keeps_everything(windows: list[tuple[int, int]]) -> None:
    passed = added(windows)
    assert passed_over_from_json(json.loads(json.dumps(passed.to_json()))) == passed


def test_a_checkpoint_without_windows_passes_nothing_over() -> None:
    assert passed_over_from_json(None) == passed_over_from_json([]) == PassedOver()


@pytest.mark.parametrize(
    "value",
    [
        "windows", 3, {"first": 1}, [1, 2], [[1]], [[1, 2, 3]], [[1, "2"]], [[1.0, 2.0]], [[True, True]],
        [[-1, 2]], [[4, 3]], [[5, 6], [1, 2]], [[1, 4], [3, 6]], [[1, 2], [3, 4]],
    ],
)  # fmt: skip
def test_a_malformed_list_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(CheckpointError, match="passed over is malformed") as caught:
        passed_over_from_json(value)
    assert "\n" not in str(caught.value)
