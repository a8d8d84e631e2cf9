"""Cyclic garbage goes at the steps it should, and the collector is left as it was found."""

from __future__ import annotations

import gc
import weakref

import pytest

from pretrain.garbage import EVERY_STEPS, collect, collected_on_time


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_a_cycle_lives_until_the_step_that_collects() -> None:
    with collected_on_time():
        gone = weakref.ref(Node())
        [[] for _ in range(100_000)]  # many times what starts a collection by itself
        for step in range(1, EVERY_STEPS):
            collect(step)
        assert gone() is not None
        collect(EVERY_STEPS)
        assert gone() is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_is_left_as_it_was(fails: bool) -> None:
    assert gc.isenabled()
    kept = gc.get_freeze_count()
    try:
        with collected_on_time():
            assert not gc.isenabled()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert gc.isenabled()
    assert gc.get_freeze_count() <= kept
