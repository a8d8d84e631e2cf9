"""One lane of the order: its blocks read in sequence, each while the one before is being used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pretrain.data.mixture import Mixture
from pretrain.data.order import Order
from pretrain.data.reader import EncodedSample, OpenShard, ShardReader


@dataclass(frozen=True)
class LoadedBlock:
    """The encoded samples of a block, in the order they are handed out."""

    round: int
    block: int
    samples: list[EncodedSample]
    epochs: list[int]


@dataclass(frozen=True)
class Pick:
    """A sample of a batch, and where it stands, as what follows replaces it if it cannot be used."""

    lane: Lane
    block: LoadedBlock
    place: int

    @property
    def sample(self) -> EncodedSample:
        return self.block.samples[self.place]

    @property
    def epoch(self) -> int:
        return self.block.epochs[self.place]

    def successors(self) -> Iterator[Pick]:
        """The other samples of the block, cyclically, then those of the lane's next blocks, once round."""
        num_samples = len(self.block.samples)
        for step in range(1, num_samples):
            yield Pick(self.lane, self.block, (self.place + step) % num_samples)
        block = self.block
        for _ in range(self.lane.order.num_blocks):
            block = self.lane.read_after(block)
            for place in range(len(block.samples)):
                yield Pick(self.lane, block, place)


class Lane:
    """One lane's blocks in sequence, the next one always being read."""

    def __init__(
        self, order: Order, lane: int, reader: ShardReader, start_micro_step: int, readers: ThreadPoolExecutor
    ) -> None:
        self.lane = lane  # of the order, so of one source
        self.order = order
        self.reader = reader
        self.readers = readers
        first = order.slices(start_micro_step)[0]
        self.current: tuple[int, int] | None = None
        self.ahead = first.round, first.block
        self.loading = readers.submit(self._load, *self.ahead)

    def picks(self, micro_step: int) -> list[Pick]:
        """The samples this lane gives to a batch."""
        return [
            Pick(self, block, place)
            for part in self.order.slices(micro_step)
            for block in [self.block(part.round, part.block)]
            for place in range(part.start, part.stop)
        ]

    def block(self, round_index: int, block: int) -> LoadedBlock:
        """A block, in memory: the current one or the one that follows it."""
        if (round_index, block) != self.current:
            assert (round_index, block) == self.ahead, "blocks are read in sequence"
            self.loaded = self.loading.result()
            self.current = self.ahead
            self.ahead = self._after(round_index, block)
            self.loading = self.readers.submit(self._load, *self.ahead)
        return self.loaded

    def is_ready(self, micro_step: int) -> bool:
        """Whether a batch's samples can be had without waiting for storage."""
        needed = {(part.round, part.block) for part in self.order.slices(micro_step)}
        return needed <= {self.current} or (needed <= {self.current, self.ahead} and self.loading.done())

    def read_after(self, block: LoadedBlock) -> LoadedBlock:
        """The block that follows, read anew: rare, and not in the way of what is read ahead."""
        reader = self.reader.another()
        try:
            return self._read(reader, *self._after(block.round, block.block))
        finally:
            reader.close()

    def _after(self, round_index: int, block: int) -> tuple[int, int]:
        return (round_index + 1, 0) if block + 1 == self.order.num_blocks else (round_index, block + 1)

    def _load(self, round_index: int, block: int) -> LoadedBlock:
        return self._read(self.reader, round_index, block)

    def _read(self, reader: ShardReader, round_index: int, block: int) -> LoadedBlock:
        runs, permutation = self.order.block(self.lane, round_index, block)
        samples = reader.read(runs)
        epochs = [run.epoch for run in runs for _ in range(run.start, run.stop)]
        places = permutation.tolist()
        return LoadedBlock(
            round_index, block, [samples[place] for place in places], [epochs[place] for place in places]
        )


def open_lanes(
    mixture: Mixture,
    lanes: range,
    start_micro_step: int,
    readers: ThreadPoolExecutor,
    open_shard: OpenShard,
) -> list[Lane]:
    """Some lanes of a mixture, each already reading its first block."""
    opened = []
    for source_index, lane in (mixture.owners[lane] for lane in lanes):
        source = mixture.sources[source_index]
        reader = ShardReader(source.split, open_shard, source.first_sample_id)
        opened.append(Lane(source.order, lane, reader, start_micro_step, readers))
    return opened
