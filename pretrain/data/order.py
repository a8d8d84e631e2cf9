"""Which samples a micro step reads: a pure function of (shards, seed, lanes, micro step, rank).

The epochs, each with its shards in a new random order, are joined into one endless sequence of samples. The
sequence is cut into rounds of `lanes * M` samples, M = num_samples // lanes; in a round each lane owns M
consecutive ones, reads them in sequence and permutes them in blocks of like size, `shuffle_block` at most. A
batch takes equally many samples from each lane, lane after lane, and a rank owns whole lanes. So no sample is
lost or doubled, a batch mixes `lanes` distant places of the data, and every world size that divides `lanes`
sees the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.randomness import bits, permutation
from pretrain.views.plan import ORDER_STREAM

SHARD_STREAM = ORDER_STREAM  # order of the shards in an epoch
BLOCK_STREAM = ORDER_STREAM + 1  # order of the samples in a block
NUM_EPOCHS_KEPT = 3  # a round reaches into two


class SampleRefs(NamedTuple):
    """Samples of one batch, and in which epoch each is read."""

    sample_ids: Tensor  # int64 (B,)
    epochs: Tensor  # int64 (B,)


class Run(NamedTuple):
    """Consecutive samples of one shard, `start` to `stop` (excluded)."""

    shard: int  # index into the shards of the split
    start: int
    stop: int
    epoch: int


class Block(NamedTuple):
    """What a lane reads at once, and the order in which it hands the samples out."""

    runs: tuple[Run, ...]
    permutation: Tensor  # int64 (n,): the sample handed out as i-th is the permutation[i]-th of the runs


class BlockSlice(NamedTuple):
    """The part of a block that a batch takes; the same for every lane."""

    round: int
    block: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)  # compared by identity, so that a long order is a cheap key of a cache
class Order:
    """The endless order of a split. `batch_size` counts the samples of one micro step over all ranks."""

    shard_sizes: Tensor  # int64 (shards,)
    first_sample_ids: Tensor  # int64 (shards,): sample id of each shard's first sample
    seed: int
    lanes: int
    shuffle_block: int
    batch_size: int
    _epochs: dict[int, tuple[Tensor, Tensor]] = field(init=False, repr=False, default_factory=dict)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}

    def __post_init__(self) -> None:
        if self.lanes > self.num_samples:
            raise ConfigError(
                f"data.lanes: {self.lanes} lanes cannot share {self.num_samples} samples; "
                f"use {self.num_samples} or fewer"
            )
        if self.batch_size % self.lanes:
            raise ConfigError(
                f"batch size: {self.batch_size} samples in a micro step over all ranks are not equally many "
                f"from each of {self.lanes} lanes (data.lanes); use {_multiples(self.batch_size, self.lanes)}"
            )

    @property
    def num_samples(self) -> int:
        return _num_samples(self)

    @property
    def samples_per_lane(self) -> int:
        """M: how many samples a lane reads in a round."""
        return self.num_samples // self.lanes

    @property
    def num_blocks(self) -> int:
        """Blocks of a lane in a round, all of one size or two that differ by one."""
        return -(-self.samples_per_lane // self.shuffle_block)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that a rank owns."""
        if self.lanes % world_size:
            raise ConfigError(
                f"data.lanes: {self.lanes} lanes cannot be shared equally by {world_size} ranks; "
                f"use {_multiples(self.lanes, world_size)}"
            )
        own = self.lanes // world_size
        return range(rank * own, (rank + 1) * own)

    def batch(self, micro_step: int, rank: int = 0, world_size: int = 1) -> SampleRefs:
        """The samples a rank reads in a micro step: (B,), lane after lane."""
        lanes = self.lanes_of(rank, world_size)
        first_of_lane = torch.arange(lanes.start, lanes.stop).unsqueeze(1) * self.samples_per_lane
        places = []
        for part in self.slices(micro_step):
            picked = _permutations(self, part.round, part.block)[
                lanes.start : lanes.stop, part.start : part.stop
            ]
            first = part.round * self.lanes * self.samples_per_lane + self._block_start(part.block)
            places.append(first + first_of_lane + picked)
        return self._samples_at(torch.cat(places, dim=1).flatten())

    def slices(self, micro_step: int) -> list[BlockSlice]:
        """The parts of blocks that a micro step takes from every lane, in reading order."""
        per_lane = self.batch_size // self.lanes
        place, end = micro_step * per_lane, (micro_step + 1) * per_lane
        slices = []
        while place < end:
            round_index, in_round = divmod(place, self.samples_per_lane)
            block = ((in_round + 1) * self.num_blocks - 1) // self.samples_per_lane
            start = in_round - self._block_start(block)
            stop = min(start + end - place, self._block_size(block))
            slices.append(BlockSlice(round_index, block, start, stop))
            place += stop - start
        return slices

    def block(self, lane: int, round_index: int, block: int) -> Block:
        """The runs that a block covers, and its permutation."""
        first = (round_index * self.lanes + lane) * self.samples_per_lane + self._block_start(block)
        place, end = first, first + self._block_size(block)
        runs = []
        while place < end:
            epoch, in_epoch = divmod(place, self.num_samples)
            shards, ends = _epoch(self, epoch)
            turn = int(torch.searchsorted(ends, in_epoch, right=True))
            shard = int(shards[turn])
            num_samples = int(self.shard_sizes[shard])
            start = in_epoch - int(ends[turn]) + num_samples
            stop = min(start + end - place, num_samples)
            runs.append(Run(shard, start, stop, epoch))
            place += stop - start
        return Block(tuple(runs), _permutations(self, round_index, block)[lane])

    def _block_start(self, block: int) -> int:
        return block * self.samples_per_lane // self.num_blocks

    def _block_size(self, block: int) -> int:
        return self._block_start(block + 1) - self._block_start(block)

    def _samples_at(self, places: Tensor) -> SampleRefs:
        """places: int64 (B,) positions in the endless sequence."""
        first, last = (int(place) // self.num_samples for place in places.aminmax())
        sample_ids, epochs = torch.empty_like(places), torch.empty_like(places)
        for epoch in range(first, last + 1):
            in_epoch = places - epoch * self.num_samples
            shards, ends = _epoch(self, epoch)
            turns = torch.searchsorted(ends, in_epoch, right=True).clamp_(max=len(ends) - 1)
            found = _last_sample_ids(self)[shards[turns]] + in_epoch - ends[turns]
            if first == last:
                return SampleRefs(found, epochs.fill_(epoch))
            chosen = (in_epoch >= 0) & (in_epoch < self.num_samples)
            sample_ids[chosen], epochs[chosen] = found[chosen], epoch
        return SampleRefs(sample_ids, epochs)


def _multiples(value: int, of: int) -> str:
    below = value // of * of
    return f"{below} or {below + of}" if below else f"{of}"


@lru_cache(maxsize=8)
def _num_samples(order: Order) -> int:
    return int(order.shard_sizes.sum())


@lru_cache(maxsize=8)
def _last_sample_ids(order: Order) -> Tensor:
    """Sample id after each shard's last: int64 (shards,)"""
    return order.first_sample_ids + order.shard_sizes


def _epoch(order: Order, epoch: int) -> tuple[Tensor, Tensor]:
    """The shards of an epoch in reading order, and the position where each ends: two int64 (shards,)"""
    found = order._epochs.get(epoch)
    if found is None:
        shards = permutation(order.seed, epoch, 0, SHARD_STREAM, len(order.shard_sizes))
        found = shards, order.shard_sizes[shards].cumsum(dim=0)
        for old in sorted(order._epochs)[: 1 - NUM_EPOCHS_KEPT]:
            order._epochs.pop(old, None)
        order._epochs[epoch] = found
    return found


@lru_cache(maxsize=64)
def _permutations(order: Order, round_index: int, block: int) -> Tensor:
    """The order within this block of every lane: int64 (lanes, n)"""
    keys = block * order.lanes + torch.arange(order.lanes)
    rounds = torch.full_like(keys, round_index)
    size = order._block_size(block)
    return torch.argsort(bits(order.seed, rounds, keys, BLOCK_STREAM, size), dim=1, stable=True)
