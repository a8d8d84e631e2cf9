"""How long each rank works in a step by itself, before it first waits for the others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pretrain.peers import Peers


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class WorkTime:
    """Seconds from the start of a step to its first meeting with the other ranks.

    All ranks leave a step together, so the slow one is the one that comes late to the first meeting of the
    next. On a GPU the meeting is an event on its stream, read once the device has passed it, which is a step
    or two later: nothing waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began = self._seconds = 0.0
        self._has_met = True
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """A step begins."""
        if self._on_gpu:
            if self._events and not self._has_met:
                self._events.pop()
            while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
                began, met = self._events.popleft()
                self._seconds = began.elapsed_time(met) / 1000
            self._events.append((_event(), _event()))
            self._events[-1][0].record()
        self._began, self._has_met = time.perf_counter(), False

    def meet(self) -> None:
        """About to wait for the other ranks; counts once a step."""
        if self._has_met:
            return
        self._has_met = True
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds = time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        """Of this step on a CPU, of an earlier one on a GPU."""
        return self._seconds

    def watching(self, peers: Peers) -> Peers:
        """The same ranks; the first time anything is asked of them in a step is the meeting."""

        def noted(ask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def asked(local: Tensor) -> Tensor:
                self.meet()
                return ask(local)

            return asked

        if peers.world_size == 1:
            return peers
        return replace(peers, gather=noted(peers.gather), sum=noted(peers.sum))
