"""The sets of an evaluation with several read-outs: each is encoded once, for all features."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from pretrain.data.reader import EncodedSample
from pretrain.errors import UserError
from pretrain.evaluate.encoder import Encoder
from pretrain.evaluate.feature import FeatureName
from pretrain.evaluate.features import Features, extract
from pretrain.evaluate.frozen import rounding
from pretrain.evaluate.image_set import read_rows, spread_rows
from pretrain.evaluate.shards import LabelledSplit, decode_and_crop

CHOICE_SEED = 0  # of the images of a small budget: every run of a study is measured on the same ones

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedSet:
    """Features of a set's images, and their keys where those were asked for."""

    split: LabelledSplit
    features: Features  # all features of the encoder, side by side
    keys: tuple[str, ...]
    seconds: float

    def of(self, encoder: Encoder, feature: FeatureName) -> Features:
        """One feature alone, which is not copied."""
        return replace(self.features, features=self.features.features[:, encoder.columns(feature)])


def rows_of(split: LabelledSplit, count: int | None, flag: str) -> Tensor:
    """Which images of a split are used, ascending: all, or up to `count`, as many of each class.

    int64 (N,). The choice follows from the labels and the count alone, and fewer images are among more.
    """
    labels = split.labels()
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    classes = torch.unique(labels)
    if count < len(classes):
        raise UserError(
            f"{flag} {count}: {split.manifest.folder}:{split.name} has {len(classes)} classes; give at least "
            "that many images"
        )
    generator = torch.Generator().manual_seed(CHOICE_SEED)
    return spread_rows(labels, classes, count, generator).sort().values


def encode_set(
    encoder: Encoder,
    split: LabelledSplit,
    rows: Tensor | None,
    batch_size: int,
    accelerator: Accelerator,
    *,
    with_keys: bool,
) -> EncodedSet:
    """rows: ascending places in the split, int64 (N,); None: all of it."""
    num_images = split.num_samples if rows is None else len(rows)
    keys: list[str] = []
    began = time.perf_counter()
    images = split.samples() if rows is None or num_images == split.num_samples else _chosen(split, rows)
    width = sum(encoder.reading(feature).num_features for feature in (encoder.feature, *encoder.besides))
    features = extract(
        encoder,
        _noted(images, keys) if with_keys else images,
        partial(decode_and_crop, crop=encoder.crop),
        batch_size,
        num_images=num_images,
        keep=rounding(4 * num_images * width, for_knn_only=False),
        accelerator=accelerator,
    )
    return EncodedSet(split, features, tuple(keys), time.perf_counter() - began)


def _chosen(split: LabelledSplit, rows: Tensor) -> Iterator[tuple[EncodedSample, int]]:
    for sample in read_rows(split.manifest.split(split.name), rows):
        assert sample.label is not None, sample.key  # `rows_of` has seen them all
        yield sample, sample.label


def _noted(
    images: Iterator[tuple[EncodedSample, int]], keys: list[str]
) -> Iterator[tuple[EncodedSample, int]]:
    """The same images, their keys being written down on the way: an index has none."""
    for sample, label in images:
        keys.append(sample.key)
        yield sample, label


def pairs_of(one: EncodedSet, other: EncodedSet) -> tuple[Tensor, Tensor]:
    """Places of the images that are in both sets by their key: int64 (M,) each, in the order of `one`.

    A key that a set has twice pairs nothing. Where the classes of a key differ, the two sets number different
    images alike, and nothing is paired.
    """
    place_in_one, place_in_other = _places(one.keys), _places(other.keys)
    shared = [key for key in place_in_one if key in place_in_other]
    first = torch.tensor([place_in_one[key] for key in shared], dtype=torch.int64)
    second = torch.tensor([place_in_other[key] for key in shared], dtype=torch.int64)
    if not torch.equal(one.features.labels[first], other.features.labels[second]):
        logger.warning(
            "%s:%s and %s:%s have %d keys in common, but other classes under them: they number different "
            "images alike, and none are compared one by one",
            *(one.split.manifest.folder, one.split.name, other.split.manifest.folder, other.split.name),
            len(shared),
        )
        return first[:0], second[:0]
    return first, second


def _places(keys: Sequence[str]) -> Mapping[str, int]:
    """Of the keys that occur once."""
    place_of: dict[str, int] = {}
    twice = set()
    for place, key in enumerate(keys):
        if key in place_of:
            twice.add(key)
        place_of[key] = place
    return {key: place for key, place in place_of.items() if key not in twice}
