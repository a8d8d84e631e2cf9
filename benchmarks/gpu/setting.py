"""Where a benchmark runs, how large, and for how long a thing is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Pace:
    """How long something is timed."""

    num_windows: int  # that a median is taken of
    window_seconds: float  # the least length of one
    num_warmup: int  # calls before


STEADY = Pace(num_windows=5, window_seconds=1.5, num_warmup=4)
QUICK = Pace(num_windows=5, window_seconds=0.2, num_warmup=3)
TOY = Pace(num_windows=2, window_seconds=0.0, num_warmup=1)


@dataclass(frozen=True)
class Setting:
    """Everything that a slice is told."""

    device: torch.device
    is_toy: bool
    out: Path  # folder of the results
    shards: Path | None = None  # of photographs, indexed
    cifar: Path | None = None  # of images of 32 px, indexed

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def steady(self) -> Pace:
        """For training steps."""
        return TOY if self.is_toy else STEADY

    @property
    def quick(self) -> Pace:
        """For single operations."""
        return TOY if self.is_toy else QUICK


Measured = dict[str, Any]  # what goes into the JSON


@dataclass(frozen=True)
class Variant:
    """One line of a slice's table."""

    measure: Callable[[], Measured]
    expected_seconds: float = 45.0  # on a GPU, a guess: it is not begun with less time left


@dataclass(frozen=True)
class Slice:
    """Variants that belong together."""

    what: str
    variants: Callable[[Setting], dict[str, Variant]]
    summary: Callable[[Setting, Mapping[str, Measured]], Measured] | None = None  # of those without a problem
