"""What the loader hands to the trainer, and how it is configured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pretrain.data.manifest import Split
from pretrain.data.order import Order
from pretrain.views.plan import ViewConfig

NO_LABEL = -1


class DataConfig(BaseModel):
    """Where the images come from and how they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: Path  # folder with an index.json; relative to the working directory
    split: str = "train"
    lanes: Annotated[int, Field(gt=0)] = 64  # distant places of the data that every batch mixes
    shuffle_block: Annotated[int, Field(gt=0)] = 128  # samples of a lane that are permuted together
    resident: bool = False  # keep the whole split, decoded, on the device
    decode_threads: Annotated[int, Field(gt=0)] = 2  # per rank
    prefetch_batches: Annotated[int, Field(gt=0)] = 3  # finished ahead of the trainer
    max_bad_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = (
        0.001  # undecodable samples; one is always allowed
    )


@dataclass(frozen=True)
class Batch:
    """The samples of one rank in one micro step, all tensors on one device."""

    crops: tuple[
        Tensor, ...
    ]  # per crop size, in order of first use: uint8 (V, B, S, S, 3), views in recipe order
    sample_ids: Tensor  # int64 (B,): of the images shown, also where one replaces a bad one
    epochs: Tensor  # int64 (B,)
    labels: Tensor  # int64 (B,); -1 for none


class Batches(Protocol):
    """An endless sequence of batches. A batch is valid until the next one is asked for."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...

    @property
    def num_bad(self) -> int:
        """Distinct samples that did not decode."""

    @property
    def wait_seconds(self) -> float:
        """Time the trainer has spent waiting for batches."""


def crop_sizes(views: Sequence[ViewConfig]) -> tuple[int, ...]:
    """The distinct crop sizes in px, in order of first use."""
    return tuple(dict.fromkeys(view.size_px for view in views))


def crop_places(views: Sequence[ViewConfig]) -> list[tuple[int, int]]:
    """Per view: which of `Batch.crops` holds it, and at which index."""
    sizes = crop_sizes(views)
    return [
        (sizes.index(view.size_px), sum(other.size_px == view.size_px for other in views[:index]))
        for index, view in enumerate(views)
    ]


def order_of(config: DataConfig, split: Split, seed: int, batch_size: int) -> Order:
    """The order in which a split is read; `batch_size` counts one micro step over all ranks."""
    return Order(
        shard_sizes=split.shard_sizes,
        first_sample_ids=split.first_sample_ids,
        seed=seed,
        lanes=config.lanes,
        shuffle_block=config.shuffle_block,
        batch_size=batch_size,
    )


def pool_bytes(config: DataConfig, split: Split, num_lanes: int) -> int:
    """Memory of the encoded samples that `num_lanes` lanes hold: the block in use and the one read ahead."""
    samples_per_block = min(config.shuffle_block, split.num_samples // config.lanes)
    return 2 * num_lanes * samples_per_block * split.stored_bytes // split.num_samples


def ring_bytes(config: DataConfig, views: Sequence[ViewConfig], local_batch_size: int) -> int:
    """Shared memory of one rank's finished batches."""
    per_image = sum(3 * view.size_px**2 for view in views)
    return (config.prefetch_batches + 1) * local_batch_size * per_image
