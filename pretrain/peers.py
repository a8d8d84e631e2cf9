"""The ranks that share one global batch, handed to losses and normalisation layers as an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _same(local: Tensor) -> Tensor:
    return local


@dataclass(frozen=True)
class Peers:
    """The ranks that share one global batch; a world of one by default. `cluster.py` makes the real ones."""

    rank: int = 0
    world_size: int = 1
    # (B, ...) -> (world_size * B, ...) in rank order; its backward sums the gradients of all ranks
    gather: Callable[[Tensor], Tensor] = _same
    # elementwise sum over ranks, with gradient: its backward sums the gradients of all ranks
    sum: Callable[[Tensor], Tensor] = _same


ALONE = Peers()
