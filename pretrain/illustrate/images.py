"""Some images of a split: which, and their pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.config import RunConfig
from pretrain.data.columns import NO_LABEL
from pretrain.data.decode import BadImage, decode
from pretrain.data.loader import open_splits
from pretrain.data.manifest import Split
from pretrain.data.order import Run
from pretrain.data.reader import SAMPLES_PER_READ, EncodedSample, ShardReader
from pretrain.errors import DataError, UserError
from pretrain.evaluate.shards import Role, find_split

FEWEST_OF_CLASS = 5  # images on average, below which classes make no groups
MAX_CLASSES = 20  # of an evaluation set, as many as a drawing can tell apart


@dataclass(frozen=True)
class Picked:
    """Decoded images and what is known of them."""

    pixels: tuple[NDArray[np.uint8], ...]  # (H, W, 3) each
    sample_ids: Tensor  # int64 (B,)
    labels: tuple[str | None, ...]  # class names
    classes: Tensor  # int64 (B,), -1 for none
    source: str  # in words


def split_of(shards: str, role: Role) -> Split:
    """What `DIR` or `DIR:split` names; a DataError where it is none."""
    found = find_split(shards, role)
    return found.manifest.split(found.name)


def split_of_run(config: RunConfig) -> tuple[Split | None, str]:
    """The first source the run trains on, or None and why it cannot be read here."""
    try:
        split = open_splits(config.data)[0]
        split.manifest.check_shards()
    except UserError as error:
        return None, f"the run's own shards cannot be read here ({error}); name images with --images SHARDS"
    return split, ""


def name_of(split: Split) -> str:
    return f"{Path(str(split.manifest.folder)).name}:{split.name}"


def spread_rows(num_samples: int, count: int) -> list[int]:
    """`count` places, the middles of as many equal parts; all of them where there are no more."""
    count = min(count, num_samples)
    return [(2 * place + 1) * num_samples // (2 * count) for place in range(count)]


def labels_of(split: Split) -> Tensor:
    """The class of every sample, -1 for none: int64 (N,)"""
    columns = [split.samples(split.shard(place)).labels for place in range(split.num_shards)]
    return torch.from_numpy(np.concatenate(columns).astype(np.int64))


def balanced_rows(labels: Tensor, count: int, seed: int) -> list[int]:
    """About `count` rows in ascending order, the same number of every class; of more than 20 classes, of 20
    drawn from the seed. Without labels, or with a handful of images a class, they are spread evenly.

    labels: int64 (N,)
    """
    known = labels[labels != NO_LABEL]
    if not len(known):
        return spread_rows(len(labels), count)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.unique(known)
    if len(classes) > MAX_CLASSES:
        classes = classes[torch.randperm(len(classes), generator=generator)[:MAX_CLASSES]].sort().values
    quota = max(1, count // len(classes))
    held = int(torch.isin(labels, classes).sum())
    if held < FEWEST_OF_CLASS * len(classes):
        return spread_rows(len(labels), count)
    chosen: list[int] = []
    for label in classes.tolist():
        rows = (labels == label).nonzero().squeeze(1)
        chosen += rows[torch.randperm(len(rows), generator=generator)[:quota]].tolist()
    return sorted(chosen)


def read_rows(split: Split, rows: Sequence[int]) -> Iterator[EncodedSample]:
    """Samples by their place in the split; ascending, so that compressed shards are read once."""
    with contextlib.closing(ShardReader(split)) as reader:
        for run in _runs(split, rows):
            yield from reader.read([run])


def _runs(split: Split, rows: Sequence[int]) -> Iterator[Run]:
    """Rows that follow each other in a shard, together."""
    ends = np.cumsum(split.shard_sizes)
    begun: Run | None = None
    for row in rows:
        place = int(np.searchsorted(ends, row, side="right"))
        start = row - int(ends[place] - split.shard_sizes[place])
        if begun and begun.shard == place and begun.stop == start and start - begun.start < SAMPLES_PER_READ:
            begun = begun._replace(stop=start + 1)
            continue
        if begun:
            yield begun
        begun = Run(place, start, start + 1, epoch=0)
    if begun:
        yield begun


def pick(split: Split, count: int) -> Picked:
    """Images spread evenly over the split; one that is damaged is replaced by the next that is not."""
    pixels: list[NDArray[np.uint8]] = []
    samples: list[EncodedSample] = []
    for row in spread_rows(split.num_samples, count):
        stop = min(row + 3, split.num_samples)
        for sample in read_rows(split, range(row, stop)):
            try:
                if not sample.is_intact:
                    continue
                pixels.append(decode(sample.image))
            except BadImage:
                continue
            samples.append(sample)
            break
    if not pixels:
        raise DataError(f"{name_of(split)}: none of the images that were tried can be decoded")
    names = split.manifest.class_names
    classes = [NO_LABEL if sample.label is None else sample.label for sample in samples]
    return Picked(
        tuple(pixels),
        torch.tensor([sample.sample_id for sample in samples]),
        tuple(class_name(label, names) for label in classes),
        torch.tensor(classes),
        name_of(split),
    )


def class_name(label: int, names: Sequence[str]) -> str | None:
    if label == NO_LABEL:
        return None
    return names[label] if 0 <= label < len(names) else f"class {label}"
