"""Counter-based random numbers: a pure function of (seed, epoch, sample, stream), the same on CPU and GPU.

Nothing here keeps state, so a number never depends on the batch a sample is in, on the number of ranks or
workers, or on where a run was resumed. The generator hashes the counters with the finaliser of SplitMix64
(Steele, Lea and Flood, OOPSLA 2014) in wrapping 64-bit integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    # plain numbers stay on the CPU, where they meet those of a GPU without it being waited for
    state = torch.as_tensor(seed, dtype=torch.int64)
    for counter in (stream, epoch, sample_id):
        state = _mix(state * _GOLDEN + torch.as_tensor(counter, dtype=torch.int64) + 1)
    index = torch.arange(1, n + 1, dtype=torch.int64, device=device)
    return _mix(state.unsqueeze(-1) + index * _GOLDEN)


def uniform(seed: int, epoch: Tensor | int, sample_id: Tensor | int, stream: int, n: int) -> Tensor:
    """n numbers per sample, uniform in [0, 1): float32 (B, n), multiples of 2^-24, so exact in float32."""
    return _shift_right(bits(seed, epoch, sample_id, stream, n), 40).to(torch.float32) * 2.0**-24


def uniform_of_streams(
    seed: int, epochs: Tensor, sample_ids: Tensor, streams: Tensor, counts: Sequence[int]
) -> list[Tensor]:
    """`uniform` of many streams at once, in about as many operations as it takes for one.

    epochs, sample_ids: int64 (B,); streams: int64 (S, V), where V streams are drawn from alike. Returns S
    tensors, float32 (V * B, n) for n numbers of each sample, the V streams one after the other.
    """
    state = _mix(torch.as_tensor(seed, dtype=torch.int64) * _GOLDEN + streams.unsqueeze(2) + 1)
    for counter in (epochs, sample_ids):
        state = _mix(state * _GOLDEN + counter + 1)  # (S, V, B)
    states = [of_stream.flatten() for of_stream in state]  # (V * B,) each
    index = torch.arange(1, max(counts) + 1, dtype=torch.int64, device=streams.device) * _GOLDEN
    rows = [of_stream.unsqueeze(1) + index[:count] for of_stream, count in zip(states, counts, strict=True)]
    hashed = _shift_right(_mix(torch.cat([of_stream.flatten() for of_stream in rows])), 40)
    numbers = torch.split(hashed.to(torch.float32) * 2.0**-24, [of_stream.numel() for of_stream in rows])
    return [of_stream.view_as(row) for of_stream, row in zip(numbers, rows, strict=True)]


def permutation(seed: int, epoch: int, key: int, stream: int, n: int) -> Tensor:
    """A random order of 0..n-1: int64 (n,)."""
    return torch.argsort(bits(seed, epoch, key, stream, n), stable=True)
