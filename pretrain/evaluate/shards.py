"""The labelled shards of an evaluation: which split a name means, and its images as a stream."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.columns import NO_LABEL
from pretrain.data.decode import BadImage, decode
from pretrain.data.manifest import Manifest
from pretrain.data.reader import EncodedSample, read_split
from pretrain.errors import DataError, UserError
from pretrain.evaluate.encoder import CentreCrop

Role = Literal["train", "test"]

ALSO_FLAG = "--also-test"
USUAL_SPLITS: dict[Role, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}  # best first

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)")


@dataclass(frozen=True)
class LabelledSplit:
    """One split of a folder of shards."""

    manifest: Manifest
    name: str

    def samples(self) -> Iterator[tuple[EncodedSample, int]]:
        """Every sample and its class, in the order they are stored."""
        for sample in read_split(self.manifest.split(self.name)):
            if sample.label is None:
                raise DataError(
                    f"{sample.shard}: sample '{sample.key}' has no label; an evaluation needs labels"
                )
            yield sample, sample.label

    @property
    def num_samples(self) -> int:
        return self.manifest.split(self.name).num_samples

    def labels(self) -> Tensor:
        """Of every sample, as the index has them: int64 (N,). DataError if one has none."""
        split = self.manifest.split(self.name)
        columns = [split.samples(shard).labels for shard in split.shards]
        labels = torch.from_numpy(np.concatenate(columns).astype(np.int64))
        if (labels == NO_LABEL).any():
            row = int((labels == NO_LABEL).nonzero()[0])
            raise DataError(
                f"{self.manifest.folder}:{self.name}: sample {row} has no label; an evaluation needs one"
            )
        return labels

    def describe(self) -> dict[str, Any]:
        return {
            "folder": str(self.manifest.folder),
            "split": self.name,
            "manifest_sha256": self.manifest.hash,
            "num_samples": self.num_samples,
        }


def find_split(where: str | Path, role: Role, flag: str | None = None) -> LabelledSplit:
    """The split that `DIR:split` names, or that `DIR` means for this role.

    For `DIR` alone that is the usual name (train; test, else val), or the only split there is. In an address
    the split comes after the host: `http://host:8080` names none, `http://host:8080/:val` does.
    flag: of the command line, where it is not that of the role.
    """
    folder, asked = str(where), ""
    _, _, after_scheme = folder.rpartition("://")
    is_host = "://" in folder and "/" not in after_scheme
    if not is_host and not Path(folder).is_dir() and ":" in folder.rpartition("/")[2]:
        folder, _, asked = folder.rpartition(":")
    manifest = Manifest.load(folder)
    manifest.check_shards()
    if asked:
        return LabelledSplit(manifest, manifest.split(asked).name)
    names = manifest.split_names
    usual = [name for name in USUAL_SPLITS[role] if name in names] or list(names if len(names) == 1 else ())
    if not usual:
        raise DataError(
            f"{folder}: which split is the {role} set? It has: {', '.join(names)}; "
            f"name one, as in {flag or f'--{role}'} {folder}{'/' if is_host else ''}:{names[0]}"
        )
    return LabelledSplit(manifest, usual[0])


def refuse_overlap(train: LabelledSplit, test: LabelledSplit, flag: str = "--test") -> None:
    """No shard may be both learnt from and tested on, under whatever name."""
    learnt = {shard.sha256: shard for shard in train.manifest.split(train.name).shards}
    for shard in test.manifest.split(test.name).shards:
        if shard.sha256 in learnt:
            raise DataError(
                f"--train {train.manifest.folder}:{train.name} and {flag} {test.manifest.folder}:{test.name} "
                f"hold the same samples ({shard.name}); name different splits"
            )


def refuse_other_classes(train: LabelledSplit, test: LabelledSplit, flag: str = "--test") -> None:
    """Every class that is tested can be learned, and all samples have labels. Reads the indexes only."""
    learnt, tested = torch.unique(train.labels()), torch.unique(test.labels())
    unknown = tested[~torch.isin(tested, learnt)].tolist()
    if unknown:
        raise DataError(
            f"{flag} {test.manifest.folder}:{test.name} has {len(tested)} classes, of which {len(unknown)} "
            f"(such as {unknown[0]}) are not among the {len(learnt)} of "
            f"--train {train.manifest.folder}:{train.name}; give two splits of one labelling"
        )


def open_splits(train: str | Path, test: str | Path) -> dict[Role, LabelledSplit]:
    """Both sets of an evaluation, after everything that can be wrong with them was looked at."""
    splits: dict[Role, LabelledSplit] = {
        "train": find_split(train, "train"),
        "test": find_split(test, "test"),
    }
    refuse_overlap(splits["train"], splits["test"])
    refuse_other_classes(splits["train"], splits["test"])
    return splits


def open_also(asked: Sequence[str], train: LabelledSplit) -> dict[str, LabelledSplit]:
    """Further test sets by name: of `NAME=DIR:split`, else of the folder, and of a split that is named."""
    found: dict[str, LabelledSplit] = {}
    for text in asked:
        named = _NAMED.fullmatch(text)
        where = named[2] if named else text
        split = find_split(where, "test", ALSO_FLAG)
        refuse_overlap(train, split, ALSO_FLAG)
        refuse_other_classes(train, split, ALSO_FLAG)
        name = named[1] if named else _name_of(where, split)
        if name in found:
            raise UserError(
                f"{ALSO_FLAG} {text}: two sets are called '{name}'; name this one, as in OTHER={where}"
            )
        found[name] = split
    return found


def _name_of(where: str, split: LabelledSplit) -> str:
    """Without dots, which stand between the keys of a result."""
    folder = str(split.manifest.folder).rstrip("/").rpartition("/")[2]
    is_named = where.endswith(f":{split.name}") and not Path(where).is_dir()
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{folder}-{split.name}" if is_named else folder)


def decode_and_crop(sample: EncodedSample, crop: CentreCrop) -> Tensor:
    """Encoded image -> uint8 (3, size, size)"""
    return crop(decode_whole(sample))


def decode_whole(sample: EncodedSample) -> NDArray[np.uint8]:
    """Encoded image -> uint8 (H, W, 3)"""
    if not sample.is_intact:
        raise DataError(
            f"{sample.shard}: sample '{sample.key}' at byte {sample.offset} is not what was indexed; "
            "restore the shard"
        )
    try:
        return decode(sample.image)
    except BadImage as error:
        raise DataError(f"{sample.shard}: image '{sample.key}' at byte {sample.offset}: {error}") from error
