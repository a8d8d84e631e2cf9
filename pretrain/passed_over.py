"""Which parts of the data a run passes over, such as the samples on which its loss was not finite.

A training step and the data it reads are numbered alike until something is left out: the data step of a
training step is its place in the endless order of the data. Both count from 0, and training step `s` is the
one that follows `s` finished ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pretrain.errors import CheckpointError


@dataclass(frozen=True)
class PassedOver:
    """Data steps that no training step uses: (first, last) of each window, in order, with a gap between."""

    windows: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        assert _in_order(self.windows), f"windows are out of order, overlap or touch: {self.windows}"

    def data_step(self, step: int) -> int:
        """The data step that a training step uses: the `step`-th of those that are not left out."""
        place = step
        for first, last in self.windows:
            if place < first:
                break
            place += last - first + 1
        return place

    def add(self, first_step: int, last_step: int) -> PassedOver:
        """Leave out, from now on, the data that training steps first_step to last_step used until now.

        The steps before keep theirs; first_step takes what last_step + 1 used.
        """
        assert 0 <= first_step <= last_step
        first, last = self.data_step(first_step), self.data_step(last_step)
        apart = []
        for other in self.windows:
            if other[1] < first - 1 or other[0] > last + 1:
                apart.append(other)
            else:  # within it, or touching
                first, last = min(first, other[0]), max(last, other[1])
        return PassedOver(tuple(sorted([*apart, (first, last)])))

    def to_json(self) -> list[list[int]]:
        return [list(window) for window in self.windows]


def passed_over_from_json(value: object) -> PassedOver:
    """Read what `to_json` gave; a checkpoint that has none passes over nothing."""
    if value is None:
        return PassedOver()
    pairs: list[Any] = value if isinstance(value, list) else [value]
    are_pairs = all(
        isinstance(pair, list) and len(pair) == 2 and all(type(place) is int for place in pair)
        for pair in pairs
    )
    windows = tuple((pair[0], pair[1]) for pair in pairs) if are_pairs else ()
    if not are_pairs or not _in_order(windows):
        raise CheckpointError(
            f"the checkpoint's list of data that were passed over is malformed ({str(value)[:60]}); use "
            "another checkpoint"
        )
    return PassedOver(windows)


def _in_order(windows: tuple[tuple[int, int], ...]) -> bool:
    """Whether each window holds a data step, and at least one lies between it and the window before."""
    ends = [-2, *(last for _, last in windows)]
    return all(end + 2 <= first <= last for end, (first, last) in zip(ends, windows, strict=False))
