"""Timing that is the same on a GPU and on a CPU: windows of calls, between two moments when all is done."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gpu.setting import Pace

MOST_CALLS = 1000
DIGITS = 4


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, a mean over each window."""

    seconds: tuple[float, ...]
    calls: int  # of a window

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, float | int]:
        return {
            "median": digits(self.median),
            "low": digits(min(self.seconds)),
            "high": digits(max(self.seconds)),
            "windows": len(self.seconds),
            "calls": self.calls,
        }


def timed(run: Callable[[], object], device: torch.device, pace: Pace) -> Timing:
    return turns({"": run}, device, pace)[""]


def turns(runs: Mapping[str, Callable[[], object]], device: torch.device, pace: Pace) -> dict[str, Timing]:
    """They take turns window by window, so that a drift of the machine's speed hits all of them."""
    calls = {name: _calls(run, device, pace) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(pace.num_windows):
        for name, run in runs.items():
            seconds[name].append(_window(run, device, calls[name]))
    return {name: Timing(tuple(seconds[name]), calls[name]) for name in runs}


def _calls(run: Callable[[], object], device: torch.device, pace: Pace) -> int:
    """Warm up, and see how many calls make a window."""
    for _ in range(pace.num_warmup):
        run()
    if not pace.window_seconds:
        return 1
    one = _window(run, device, 2)
    return min(MOST_CALLS, max(1, math.ceil(pace.window_seconds / max(one, 1e-9))))


def _window(run: Callable[[], object], device: torch.device, calls: int) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def ratio(above: Timing, below: Timing) -> dict[str, float]:
    """Of two that took turns, window by window."""
    ratios = sorted(a / b for a, b in zip(above.seconds, below.seconds, strict=True))
    return {
        "median": digits(statistics.median(ratios)),
        "low": digits(ratios[0]),
        "high": digits(ratios[-1]),
    }


def digits(number: float) -> float:
    """To five significant digits."""
    return float(f"{number:.{DIGITS}e}") if math.isfinite(number) else number
