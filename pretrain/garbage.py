"""Cyclic garbage is collected at the same steps on all ranks, not whenever one of them has made enough."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100


@contextmanager
def collected_on_time() -> Iterator[None]:
    """No collection but by `collect`. What exists when it is entered is never looked through again.

    A collection stops the interpreter for tens of milliseconds; ranks that do so at different steps wait for
    one another at each.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect(step: int) -> None:
    """After training step `step`, counted from 1."""
    if step % EVERY_STEPS == 0:
        gc.collect()
