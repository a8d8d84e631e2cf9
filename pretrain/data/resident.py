"""Batches from a split that lies decoded on the device: for small images, where decoding costs most."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.batch import NO_LABEL, Batch, DataConfig, crop_places, crop_sizes
from pretrain.data.decode import BadImage, decode
from pretrain.data.mixture import Mixture
from pretrain.data.quarantine import CHECKSUM, Quarantine
from pretrain.data.reader import EncodedSample, read_split
from pretrain.data.side_by_side import side_by_side
from pretrain.data.sources import ShardOpener
from pretrain.errors import DataError
from pretrain.views.pixels import crop_resize
from pretrain.views.plan import ViewConfig, crop_boxes


class ResidentBatches:
    """The order of a stream, and its crops to within a grey level, cut on the device from one uint8 tensor.

    A bad image is replaced by the next good one of the split; a stream replaces it by one of its block.
    """

    process_ids: tuple[int, ...] = ()

    def __init__(
        self,
        config: DataConfig,
        mixture: Mixture,
        views: Sequence[ViewConfig],
        *,
        rank: int = 0,
        world_size: int = 1,
        start_micro_step: int = 0,
        device: torch.device | str = "cpu",
        quarantine_path: Path | None = None,
    ) -> None:
        mixture.lanes_of(rank, world_size)  # an impossible sharing is told before anything is read
        self.wait_seconds = 0.0
        self.mixture, self.views = mixture, tuple(views)
        self.rank, self.world_size, self.micro_step = rank, world_size, start_micro_step
        # every rank reads the whole split, and rank 0 alone records what is bad in it
        path = quarantine_path if rank == 0 else None
        quarantine = Quarantine(path, mixture.num_samples, config.max_bad_ratio, mixture.data_hash)
        opener = ShardOpener(config)
        images, samples, is_good = _decode_all(config, mixture, quarantine, opener)
        self.counts = opener.counts(quarantine.met_by_reason if rank == 0 else {})
        labels = [NO_LABEL if sample.label is None else sample.label for sample in samples]
        self.images = torch.from_numpy(images).to(device)  # uint8 (N, H, W, 3)
        self.sample_ids = torch.tensor([sample.sample_id for sample in samples])  # ascending
        self.labels = torch.tensor(labels)
        sizes = [source.num_samples for source in mixture.sources]
        self.shown = _next_good(torch.from_numpy(is_good), sizes)  # int64 (N,): the row shown for each

    def __iter__(self) -> ResidentBatches:
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        wanted = self.mixture.batch(self.micro_step, self.rank, self.world_size)
        self.micro_step += 1
        rows = self.shown[torch.searchsorted(self.sample_ids, wanted.sample_ids)]
        device = self.images.device
        sample_ids, epochs, labels, rows = (
            (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
            for values in (self.sample_ids[rows], wanted.epochs, self.labels[rows], rows)
        )
        batch = Batch(self._crops(rows, sample_ids, epochs), sample_ids, epochs, labels)
        self.wait_seconds += time.monotonic() - begin
        return batch

    def close(self) -> None:
        """Give the memory back: a run that goes back opens its data anew."""
        self.images = self.images[:0].clone()

    def _crops(self, rows: Tensor, sample_ids: Tensor, epochs: Tensor) -> tuple[Tensor, ...]:
        images = self.images[rows]  # (B, H, W, 3)
        heights, widths = (torch.full_like(rows, side) for side in images.shape[1:3])
        crops: list[list[Tensor]] = [[] for _ in crop_sizes(self.views)]
        for view_index, (view, (group, _)) in enumerate(
            zip(self.views, crop_places(self.views), strict=True)
        ):
            boxes = crop_boxes(view, self.mixture.seed, epochs, sample_ids, view_index, heights, widths)
            crops[group].append(crop_resize(images, boxes, view.size_px, view.interpolation))
        return tuple(torch.stack(views) for views in crops)


def _decode_all(
    config: DataConfig, mixture: Mixture, quarantine: Quarantine, open_shard: ShardOpener
) -> tuple[NDArray[np.uint8], list[EncodedSample], NDArray[np.bool_]]:
    """All images of all sources, uint8 (N, H, W, 3), their samples, and which of them decoded."""
    images: NDArray[np.uint8] | None = None
    samples: list[EncodedSample] = []
    is_good = np.zeros(mixture.num_samples, dtype=np.bool_)
    stored = (
        sample
        for source in mixture.sources
        for sample in read_split(source.split, open_shard, source.first_sample_id)
    )
    names = ", ".join(str(source.split.manifest.folder) for source in mixture.sources)
    decoded = side_by_side(
        lambda sample: _decode_sample(sample, config.max_pixels),
        stored,
        mixture.num_samples,
        num_bytes=0,
        num_workers=max(1, config.decode_threads),
    )
    for row, (sample, pixels) in enumerate(decoded):
        samples.append(replace(sample, data=b""))
        if isinstance(pixels, BadImage):
            quarantine.add(sample, pixels.reason)
            continue
        if images is None:
            images = _room_for(mixture.num_samples, pixels.shape, names)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{names}: data.resident needs images of one size, but there are "
                f"{_size(images[0])} and {_size(pixels)} px ({sample.key!r} in {sample.shard}); "
                "set data.resident: false"
            )
        images[row] = pixels
        is_good[row] = True
    if images is None:
        raise DataError(f"{names}: no image decodes; check the shards")
    return images, samples, is_good


def _room_for(num_images: int, shape: tuple[int, ...], names: str) -> NDArray[np.uint8]:
    num_bytes = num_images * math.prod(shape)
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > available:
        raise DataError(
            f"{names}: {num_images} images of {shape[0]} x {shape[1]} px need {num_bytes / 2**30:.0f} GiB, "
            f"this machine has {available / 2**30:.0f} GiB; set data.resident: false"
        )
    return np.zeros((num_images, *shape), dtype=np.uint8)


def _decode_sample(
    sample: EncodedSample, max_pixels: int
) -> tuple[EncodedSample, NDArray[np.uint8] | BadImage]:
    try:
        if not sample.is_intact:
            raise BadImage(CHECKSUM, "these are not the bytes that were indexed")
        return sample, decode(sample.image, max_pixels=max_pixels)
    except BadImage as bad:
        return sample, bad


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"


def _next_good(is_good: Tensor, sizes: Sequence[int]) -> Tensor:
    """For each row itself if it is good, else the next good one of its source, cyclically: int64 (N,)

    is_good: bool (N,), source after source; sizes: the rows of each.
    """
    shown = []
    for first, part in zip(np.cumsum([0, *sizes]).tolist(), torch.split(is_good, list(sizes)), strict=False):
        good = part.nonzero().squeeze(1)
        if not len(good):
            raise DataError("data.sources: of one source no image decodes; check its shards")
        following = torch.searchsorted(good, torch.arange(len(part)))
        shown.append(first + good[following % len(good)])
    return torch.cat(shown)
