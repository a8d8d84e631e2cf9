"""What the loader hands to the trainer, and how it is configured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pretrain.data.columns import NO_LABEL
from pretrain.data.decode import MAX_PIXELS
from pretrain.data.mixture import Mixture
from pretrain.read_counts import ReadCounts
from pretrain.views.plan import ViewConfig

__all__ = ["NO_LABEL", "Batch", "Batches", "CacheSettings", "DataConfig", "SourceConfig"]


class SourceConfig(BaseModel):
    """One of several sources that are read together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # a folder with an index.json: a path relative to the working directory, http(s)://, s3://, gs://, hf://
    shards: str
    split: str = "train"
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None  # None: its number of samples


class CacheSettings(BaseModel):
    """A folder on this node that keeps whole shards, for all ranks and jobs of the node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    max_gib: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class DataConfig(BaseModel):
    """Where the images come from and how they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: str = ""  # as in a source; either this or `sources`
    split: str = "train"
    sources: tuple[SourceConfig, ...] = ()  # several, mixed in every batch
    lanes: Annotated[int, Field(gt=0)] = 64  # distant places of the data that every batch mixes
    shuffle_block: Annotated[int, Field(gt=0)] = 128  # samples of a lane that are permuted together
    resident: bool = False  # keep the whole split, decoded, on the device
    decode_threads: Annotated[int, Field(ge=0)] = 2  # per rank; 0: no loader process, to debug
    prefetch_batches: Annotated[int, Field(gt=0)] = 3  # finished ahead of the trainer
    max_bad_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.001  # of the samples; one is always allowed
    max_pixels: Annotated[int, Field(gt=0)] = MAX_PIXELS  # an image that claims more is bad
    timeout_seconds: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = (
        60.0  # of one read, before a retry
    )
    cache: CacheSettings | None = None

    @model_validator(mode="after")
    def _one_way_to_name_them(self) -> DataConfig:
        if bool(self.shards) == bool(self.sources):
            raise ValueError("give either 'shards' or 'sources'")
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, also where there is but one."""
        return self.sources or (SourceConfig(shards=self.shards, split=self.split),)


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
    def counts(self) -> ReadCounts:
        """What was read so far, and what of it was no good."""

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Processes that work for this rank alone."""

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


def pool_bytes(config: DataConfig, mixture: Mixture, num_lanes: int) -> int:
    """Memory of the encoded samples that `num_lanes` lanes hold: the block in use and the one read ahead."""
    per_lane = [
        2
        * min(config.shuffle_block, source.order.samples_per_lane)
        * source.split.stored_bytes
        // max(1, source.num_samples)
        * share
        for source, share in zip(mixture.sources, mixture.shares, strict=True)
    ]
    return round(num_lanes * sum(per_lane))


def ring_bytes(config: DataConfig, views: Sequence[ViewConfig], local_batch_size: int) -> int:
    """Shared memory of one rank's finished batches."""
    per_image = sum(3 * view.size_px**2 for view in views)
    return (config.prefetch_batches + 1) * local_batch_size * (per_image + 3 * 8)
