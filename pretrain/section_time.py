"""Where the time of a step goes on this rank: one clock, read at the borders of its sections."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# in the order of a step; the last two lie between steps
SECTIONS = ("data", "transfer", "views", "teacher", "forward", "backward", "step", "checkpoint", "evaluation")


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


@dataclass(frozen=True)
class _Marked:
    """The borders of one step on a GPU's stream."""

    events: list[torch.cuda.Event]
    sections: list[str]  # between two of them

    def seconds(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for section, first, second in zip(self.sections, self.events, self.events[1:], strict=False):
            found[section] = found.get(section, 0.0) + first.elapsed_time(second) / 1000
        return found


class SectionTime:
    """Seconds of each section of a step.

    On a GPU the borders are events on its stream, so a section is the time the GPU takes for it, its waiting
    included. They are read once the device has passed them, which is a step or two later: nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._sections: list[str] = []
        self._events: list[torch.cuda.Event] = []
        self._unread: deque[_Marked] = deque()
        self._seconds: dict[str, float] = {}
        self._began = 0.0

    def enter(self, section: str) -> None:
        """The section before ends, and this one begins."""
        if self._on_gpu:
            self._events.append(_event())
        else:
            now = time.perf_counter()
            if self._sections:
                self._add(self._sections[-1], now - self._began)
            self._began = now
        self._sections.append(section)

    def _add(self, section: str, seconds: float) -> None:
        self._seconds[section] = self._seconds.get(section, 0.0) + seconds

    def finish(self) -> dict[str, float]:
        """The step ends. Seconds by section: of this step on a CPU; on a GPU of an earlier one, or none."""
        if not self._on_gpu:
            if self._sections:
                self._add(self._sections[-1], time.perf_counter() - self._began)
            found, self._seconds, self._sections = self._seconds, {}, []
            return found
        self._unread.append(_Marked([*self._events, _event()], self._sections))
        self._events, self._sections = [], []
        has_passed = self._unread[0].events[-1].query()  # type: ignore[no-untyped-call]
        return self._unread.popleft().seconds() if has_passed else {}


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Appends the wall time that the block took, in seconds."""
    seconds: list[float] = []
    began = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - began)
