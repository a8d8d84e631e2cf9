"""Labelled images of a split in any order: encoded in memory where they fit, else read from plain tars.

Also which of them a small share of the labels is, and what their colours are on average.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pretrain.data.manifest import Split
from pretrain.data.order import Run
from pretrain.data.reader import EncodedSample, ShardReader, read_split
from pretrain.errors import DataError, UserError
from pretrain.evaluate.encoder import CentreCrop
from pretrain.evaluate.shards import LabelledSplit, decode_and_crop

IN_MEMORY_BYTES = 8 * 2**30  # of encoded images, and of decoded ones
NUM_COLOUR_IMAGES = 10_000  # that the average colour is taken of
PREPARED_AT_ONCE = 512


@dataclass(frozen=True)
class ImageSet:
    """Some rows of a split: their encoded images on request, and their labels as they are stored."""

    split: Split
    rows: Tensor  # (N,) int64, ascending places in the split
    labels: Tensor  # (N,) int64
    kept: tuple[EncodedSample, ...] | None  # in the order of the rows; None: read on request

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int) -> EncodedSample:
        if self.kept is not None:
            return self.kept[index]
        (found,) = ShardReader(self.split).read(runs_of(self.split, self.rows[index : index + 1]))
        return found

    def prepare(self, indices: Sequence[int], crop: CentreCrop) -> Tensor:
        """uint8 (B, 3, size, size), decoded by threads."""
        images = torch.empty(len(indices), 3, crop.size_px, crop.size_px, dtype=torch.uint8)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            cropped = pool.map(lambda index: decode_and_crop(self.sample(index), crop), indices)
            for place, image in enumerate(cropped):
                images[place] = image
        return images


def open_images(
    labelled: LabelledSplit, ratio: float = 1.0, seed: int = 0, in_memory_bytes: int = IN_MEMORY_BYTES
) -> ImageSet:
    """A share of every class of a split (`balanced_rows`); 1 takes all of it."""
    split = labelled.manifest.split(labelled.name)
    labels = labelled.labels()
    rows = torch.arange(len(labels)) if ratio == 1 else balanced_rows(labels, ratio, seed)
    kept: tuple[EncodedSample, ...] | None = None
    if split.stored_bytes * len(rows) / len(labels) <= in_memory_bytes:
        kept = tuple(map(_alone, read_split(split) if len(rows) == len(labels) else read_rows(split, rows)))
    elif any(shard.name.endswith("gz") for shard in split.shards):
        raise DataError(
            f"{labelled.manifest.folder}:{labelled.name}: too large for memory, and compressed shards "
            "cannot be read in random order; unpack them to plain .tar and index them again"
        )
    return ImageSet(split, rows, labels[rows], kept)


def runs_of(split: Split, rows: Tensor) -> list[Run]:
    """Where the samples of some rows lie, each on its own. rows: int64 (N,), places in the split."""
    ends = np.cumsum(split.shard_sizes)
    places = np.searchsorted(ends, rows.numpy(), side="right")
    starts = rows.numpy() - (ends - split.shard_sizes)[places]
    return [
        Run(int(place), int(start), int(start) + 1, epoch=0)
        for place, start in zip(places, starts, strict=True)
    ]


def read_rows(split: Split, rows: Tensor) -> Iterator[EncodedSample]:
    """The samples of ascending rows alone; of a compressed shard the others are passed over."""
    with contextlib.closing(ShardReader(split)) as reader:
        for run in runs_of(split, rows):
            yield from reader.read([run])


def balanced_rows(labels: Tensor, ratio: float, seed: int) -> Tensor:
    """Rows of the same share of every class, ascending: at least one of each class, drawn from `seed`.

    labels: int64 (N,). With one seed, a smaller share lies within every larger one.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"--fraction {ratio:g}: a share of the labels is above 0 and at most 1")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in torch.unique(labels).tolist():
        rows = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(rows), generator=generator)
        chosen.append(rows[order[: max(1, round(ratio * len(rows)))]])
    return torch.cat(chosen).sort().values


def spread_rows(labels: Tensor, classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` rows of some classes, one of each class after the other until there are enough.

    labels: int64 (N,). With generators of one seed, fewer rows are the first ones of more.
    """
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.isin(labels[order], classes)]
    turn = torch.zeros(len(order), dtype=torch.int64)  # how many of its class come before
    for label in classes:
        own = labels[order] == label
        turn[own] = torch.arange(int(own.sum()))
    return order[torch.argsort(turn, stable=True)][:count]


def colours(images: ImageSet, crop: CentreCrop) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels in [0, 1], of up to 10,000 images spread evenly."""
    count = min(len(images), NUM_COLOUR_IMAGES)
    chosen = [index * len(images) // count for index in range(count)]
    total, squares, num_pixels = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for first in range(0, count, PREPARED_AT_ONCE):
        pixels = images.prepare(chosen[first : first + PREPARED_AT_ONCE], crop).double() / 255
        total += pixels.sum(dim=(0, 2, 3))
        squares += pixels.square().sum(dim=(0, 2, 3))
        num_pixels += pixels[:, 0].numel()
    mean = total / num_pixels
    std = (squares / num_pixels - mean.square()).clamp(min=0).sqrt()
    if not (std > 0).all():
        raise DataError("--normalization-of-data: a channel is the same in all pixels; give --mean and --std")
    return tuple(mean.tolist()), tuple(std.tolist())


@dataclass(frozen=True)
class Prepared:
    """Images cut to one size: held decoded where they fit, else decoded again each time."""

    images: ImageSet
    crop: CentreCrop
    held: Tensor | None  # uint8 (N, 3, size, size)

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """int64 (B,) -> uint8 (B, 3, size, size) on the device"""
        if self.held is None:
            return self.images.prepare(indices.tolist(), self.crop).to(device)
        return self.held[indices.to(self.held.device)].to(device)


def prepare_images(
    images: ImageSet, crop: CentreCrop, device: torch.device, in_memory_bytes: int = IN_MEMORY_BYTES
) -> Prepared:
    """Decode once and hold on the device, if all fit into `in_memory_bytes`."""
    if len(images) * 3 * crop.size_px**2 > in_memory_bytes:
        return Prepared(images, crop, None)
    held = torch.empty(len(images), 3, crop.size_px, crop.size_px, dtype=torch.uint8, device=device)
    for first in range(0, len(images), PREPARED_AT_ONCE):
        part = range(first, min(first + PREPARED_AT_ONCE, len(images)))
        held[part.start : part.stop] = images.prepare(part, crop).to(device)
    return Prepared(images, crop, held)


def _alone(sample: EncodedSample) -> EncodedSample:
    """Without the other samples that were read in the same go."""
    return replace(
        sample,
        data=sample.data[sample.begin : sample.end],
        begin=0,
        end=sample.end - sample.begin,
        image_begin=sample.image_begin - sample.begin,
        image_end=sample.image_end - sample.begin,
    )
