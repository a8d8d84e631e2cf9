"""Counter-based random numbers: a pure function of (seed, epoch, sample, stream), the same on CPU and GPU.

Nothing here keeps state, so a number never depends on the batch a sample is in, on the number of ranks or
workers, or on where a run was resumed. The generator hashes the counters with the finaliser of SplitMix64
(Steele, Lea and Flood, OOPSLA 2014) in wrapping 64-bit integer arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not sign-extending) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def bits(seed: int, epoch: Tensor | int, sample_id: Tensor | int, stream: int, n: int) -> Tensor:
    """n hashed 64-bit integers per sample: int64 (B, n) for epoch and sample_id of (B,), or (n,) for scalars.

    `stream` names the use (which view, which decision), so that decisions about one sample are independent.
    """
    device = next((value.device for value in (epoch, sample_id) if isinstance(value, Tensor)), None)
    state = torch.as_tensor(seed, dtype=torch.int64, device=device)
    for counter in (stream, epoch, sample_id):
        state = _mix(state * _GOLDEN + torch.as_tensor(counter, dtype=torch.int64, device=device) + 1)
    index = torch.arange(1, n + 1, dtype=torch.int64, device=device)
    return _mix(state.unsqueeze(-1) + index * _GOLDEN)


def uniform(seed: int, epoch: Tensor | int, sample_id: Tensor | int, stream: int, n: int) -> Tensor:
    """n numbers per sample, uniform in [0, 1): float32 (B, n), multiples of 2^-24, so exact in float32."""
    return _shift_right(bits(seed, epoch, sample_id, stream, n), 40).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, key: int, stream: int, n: int) -> Tensor:
    """A random order of 0..n-1: int64 (n,)."""
    return torch.argsort(bits(seed, epoch, key, stream, n), stable=True)
