"""Which image goes into which shard: a pure function of the number of images, their bytes and the seed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.randomness import bits
from pretrain.views.plan import ORDER_STREAM

BUILD_STREAM = ORDER_STREAM + 64  # apart from the streams that the data order uses
DEFAULT_SHARD_MIB = 256
MAX_SAMPLES_PER_SHARD = 10_000
MIN_SHARDS = 16  # where there are enough samples: runs shuffle shards, and hold them on several nodes
MIN_SAMPLES_PER_SHARD = 64
HEADER_BYTES = 512 + 256  # of a member: its header, and half a block of padding
MIB = 1 << 20
_NUM_ROUNDS = 6


@dataclass(frozen=True)
class ShardPlan:
    """The images of one shard: places [first, stop) in the shuffled order of its split."""

    split: str
    split_number: int
    number: int
    first: int
    stop: int


def num_shards_for(
    num_samples: int, num_bytes: int, samples_per_shard: int | None, shard_mib: int | None
) -> tuple[int, str]:
    """How many shards a split of so many (estimated) bytes gets, and why."""
    if samples_per_shard is not None:
        return -(-num_samples // samples_per_shard), f"at most {samples_per_shard} samples each"
    by_bytes = -(-num_bytes // ((shard_mib or DEFAULT_SHARD_MIB) * MIB))
    if shard_mib is not None:
        return max(1, min(by_bytes, num_samples)), f"about {shard_mib} MiB each"
    by_samples = -(-num_samples // MAX_SAMPLES_PER_SHARD)
    by_spread = min(MIN_SHARDS, -(-num_samples // MIN_SAMPLES_PER_SHARD))
    return max(
        (min(by_bytes, num_samples), f"about {DEFAULT_SHARD_MIB} MiB each"),
        (by_samples, f"at most {MAX_SAMPLES_PER_SHARD} samples each"),
        (by_spread, f"small data: {MIN_SHARDS} shards, or {MIN_SAMPLES_PER_SHARD} samples each"),
    )


def plan_shards(split: str, split_number: int, num_samples: int, num_shards: int) -> list[ShardPlan]:
    """Cut a split into shards whose sample counts differ by one at most."""
    cuts = [number * num_samples // num_shards for number in range(num_shards + 1)]
    return [
        ShardPlan(split, split_number, number, first, stop)
        for number, (first, stop) in enumerate(itertools.pairwise(cuts))
    ]


def shuffled_places(
    seed: int, split_number: int, first: int, stop: int, num_samples: int
) -> NDArray[np.int64]:
    """Items at places [first, stop) of a random order of all, without ever holding the whole order.

    A Feistel network permutes the numbers below the next power of four; a number that lands beyond the last
    item is permuted again until it lands on one, which leaves a permutation of the items.
    """
    half_bits = max(1, (max(1, num_samples - 1).bit_length() + 1) // 2)
    places = _feistel(seed, split_number, torch.arange(first, stop), half_bits)
    while (beyond := places >= num_samples).any():
        places[beyond] = _feistel(seed, split_number, places[beyond], half_bits)
    return places.numpy()


def _feistel(seed: int, split_number: int, values: torch.Tensor, half_bits: int) -> torch.Tensor:
    mask = (1 << half_bits) - 1
    left, right = values >> half_bits, values & mask
    for number in range(_NUM_ROUNDS):
        noise = bits(seed, split_number * _NUM_ROUNDS + number, right, BUILD_STREAM, 1)[:, 0]
        left, right = right, left ^ ((noise >> 20) & mask)
    return left << half_bits | right
