"""Several sources read as one: each lane belongs to one source, so a batch has the same share of each.

A source is read by its own `Order` over its own lanes, exactly as if it were alone: nothing is lost or
doubled in it, and the step is all there is to resume. The lanes of the sources are spread evenly over all
lanes, so that every rank reads a like share. One source is a mixture of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain.data.manifest import Split
from pretrain.data.order import Order, SampleRefs
from pretrain.errors import ConfigError

MAX_WEIGHT_ERROR = 0.1  # of a source's weight, where the lanes cannot be shared exactly


@dataclass(frozen=True)
class Source:
    """A split of some shards, and its place in the mixture."""

    split: Split
    order: Order  # of this source alone; its sample ids are those of the mixture
    first_sample_id: int  # what the mixture adds to the split's own sample ids

    @property
    def num_samples(self) -> int:
        return self.order.num_samples


@dataclass(frozen=True)
class Mixture:
    """The order in which several sources are read together."""

    sources: tuple[Source, ...]
    owners: tuple[tuple[int, int], ...]  # of each lane: its source, and which of that source's lanes it is

    @property
    def num_samples(self) -> int:
        """Of all sources; as many images are an epoch of the mixture."""
        return sum(source.num_samples for source in self.sources)

    @property
    def lanes(self) -> int:
        return len(self.owners)

    @property
    def batch_size(self) -> int:
        """Samples of a micro step over all ranks."""
        return sum(source.order.batch_size for source in self.sources)

    @property
    def seed(self) -> int:
        return self.sources[0].order.seed

    @property
    def data_hash(self) -> str:
        """Says which data the sample ids are of."""
        names = [f"{source.split.manifest.hash} {source.split.name}" for source in self.sources]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each source in every batch."""
        return tuple(source.order.lanes / self.lanes for source in self.sources)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that a rank owns."""
        if self.lanes % world_size:
            below = self.lanes // world_size * world_size
            nearest = f"{below} or {below + world_size}" if below else str(world_size)
            raise ConfigError(
                f"data.lanes: {self.lanes} lanes cannot be shared equally by {world_size} ranks; "
                f"use {nearest}"
            )
        own = self.lanes // world_size
        return range(rank * own, (rank + 1) * own)

    def batch(self, micro_step: int, rank: int = 0, world_size: int = 1) -> SampleRefs:
        """The samples a rank reads in a micro step: (B,), lane after lane."""
        lanes = self.lanes_of(rank, world_size)
        if len(self.sources) == 1:
            return self.sources[0].order.batch(micro_step, rank, world_size)
        per_lane = self.batch_size // self.lanes
        rows = [source.order.batch(micro_step) for source in self.sources]
        by_lane = [
            SampleRefs(refs.sample_ids.view(-1, per_lane), refs.epochs.view(-1, per_lane)) for refs in rows
        ]
        own = [self.owners[lane] for lane in lanes]
        return SampleRefs(
            torch.cat([by_lane[source].sample_ids[lane] for source, lane in own]),
            torch.cat([by_lane[source].epochs[lane] for source, lane in own]),
        )


def mix(
    splits: Sequence[Split],
    weights: Sequence[float | None],
    *,
    seed: int,
    lanes: int,
    shuffle_block: int,
    batch_size: int,
) -> Mixture:
    """Share the lanes by weight. Where no source has a weight, it is the number of its samples.

    batch_size: samples of one micro step over all ranks.
    """
    if batch_size % lanes:
        below = batch_size // lanes * lanes
        nearest = f"{below} or {below + lanes}" if below else str(lanes)
        raise ConfigError(
            f"batch size: {batch_size} samples in a micro step over all ranks are not equally many "
            f"from each of {lanes} lanes (data.lanes); use {nearest}"
        )
    counts = _share(_weights(splits, weights), lanes)
    sources = []
    first_sample_id = 0
    for place, (split, count) in enumerate(zip(splits, counts, strict=True)):
        if count > split.num_samples and len(splits) > 1:
            raise ConfigError(
                f"data.sources[{place}]: its {count} of {lanes} lanes cannot share {split.num_samples} "
                "samples; use fewer data.lanes, or a smaller weight"
            )
        order = Order(
            shard_sizes=torch.from_numpy(split.shard_sizes),
            first_sample_ids=torch.from_numpy(split.first_sample_ids) + first_sample_id,
            seed=seed,
            lanes=count,
            shuffle_block=shuffle_block,
            batch_size=batch_size // lanes * count,
        )
        sources.append(Source(split, order, first_sample_id))
        first_sample_id += split.manifest.num_samples
    return Mixture(tuple(sources), _spread(counts))


def _weights(splits: Sequence[Split], weights: Sequence[float | None]) -> list[float]:
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [float(split.num_samples) for split in splits]
    if len(given) < len(weights):
        raise ConfigError("data.sources: some have a weight and some have none; give it to all or to none")
    return given


def _share(weights: Sequence[float], lanes: int) -> list[int]:
    """Whole lanes in proportion to the weights, the largest remainders rounded up."""
    exact = [weight / sum(weights) * lanes for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: lanes - sum(counts)]:
        counts[place] += 1
    for place, (count, share) in enumerate(zip(counts, exact, strict=True)):
        if abs(count - share) > MAX_WEIGHT_ERROR * share:
            raise ConfigError(
                f"data.sources[{place}].weight: a share of {share / lanes:.4f} cannot be had with {lanes} "
                f"lanes ({count} would be {count / lanes:.4f}); use more data.lanes or other weights"
            )
    return counts


def _spread(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Lanes of all sources, each source's evenly among the others'."""
    places = [
        ((lane + 0.5) / count, source, lane) for source, count in enumerate(counts) for lane in range(count)
    ]
    return tuple((source, lane) for _, source, lane in sorted(places))
