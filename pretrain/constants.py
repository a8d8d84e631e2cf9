"""Small tables of fixed numbers where they are needed: brought to a device once, then found there."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

Numbers = tuple[float, ...] | tuple[tuple[float, ...], ...]


def constant(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, which nobody may change.

    `torch.tensor` on a GPU would have the host wait for all that the device still has to do.
    """
    if torch.compiler.is_compiling():  # then it becomes a part of the graph
        return torch.tensor(numbers, dtype=dtype, device=device)
    return _made(numbers, dtype, device)


@cache
def _made(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or the first to ask, in that mode, would spoil it for the others
        return torch.tensor(numbers, dtype=dtype).to(device)
