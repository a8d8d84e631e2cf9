"""What a build is asked for, and what it answers."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.data.manifest import Manifest
from pretrain.data.scan import IMAGE_EXTENSIONS
from pretrain.errors import DataError

KINDS = ("folder", "imagenet", "webdataset", "parquet", "torchvision", "coco")
SUBSAMPLINGS = ("420", "422", "444")
TORCHVISION_PREFIX = "torchvision:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
_EXTENSION = re.compile(r"[a-z0-9][a-z0-9._-]*")
# a change of these does not change a byte of the shards, so an unfinished build goes on with others
_WITHOUT_EFFECT = ("out", "num_workers", "max_bad_ratio", "download_dir")


@dataclass(frozen=True)
class BuildRequest:
    """One `pretrain shards build`. The shards depend on the source's content and on these settings only."""

    source: str  # a folder, a file, or torchvision:NAME
    out: Path
    kind: str | None = None  # of KINDS; None: told from the source
    split: str | None = None  # name of the split, where the source does not say it
    name: str | None = None  # first part of the shards' names; None: the name of `out`
    seed: int = 0
    shuffle: bool = True
    samples_per_shard: int | None = None
    shard_mib: int | None = None
    max_side_px: int | None = None  # larger images are shrunk to it and encoded again
    quality: int = 90  # of JPEG, for images that are encoded again
    subsampling: str = "420"
    check_images: bool = True  # decode every image once
    max_bad_ratio: float = 0.001  # of the samples; one bad image is always allowed
    keep: tuple[str, ...] | None = None  # webdataset: member extensions; coco: annotations
    keep_names: bool = False  # write each sample's name in the source into KEY.json
    labels: bool = True
    follow_symlinks: bool = False
    image_column: str | None = None
    label_column: str | None = None
    val_labels: Path | None = None
    synset_ids: Path | None = None
    download_dir: Path | None = None
    num_workers: int | None = None  # None: one per CPU core

    def __post_init__(self) -> None:
        for flag, value in (
            ("--samples-per-shard", self.samples_per_shard),
            ("--shard-mib", self.shard_mib),
            ("--max-side", self.max_side_px),
            ("--workers", self.num_workers),
        ):
            if value is not None and value < 1:
                raise DataError(f"{flag} {value}: must be at least 1")
        if self.samples_per_shard is not None and self.shard_mib is not None:
            raise DataError("--samples-per-shard and --shard-mib both set the size of a shard; give one")
        if self.kind is not None and self.kind not in KINDS:
            raise DataError(f"--kind {self.kind}: unknown; known: {', '.join(KINDS)}")
        if self.subsampling not in SUBSAMPLINGS:
            raise DataError(f"--subsampling {self.subsampling}: unknown; known: {', '.join(SUBSAMPLINGS)}")
        if not 1 <= self.quality <= 100:
            raise DataError(f"--quality {self.quality}: must be from 1 to 100")
        if not 0 <= self.max_bad_ratio <= 1:
            raise DataError(f"--max-bad-ratio {self.max_bad_ratio}: must be from 0 to 1")
        if self.split is not None and not _SPLIT_NAME.fullmatch(self.split):
            raise DataError(f"--split {self.split}: use small letters, digits and _, a letter first")
        if not _NAME.fullmatch(self.shard_name):
            raise DataError(
                f"shard name {self.shard_name!r}: use letters, digits and . _ - only; set it with --name"
            )
        for extension in self.keep or ():
            if not _EXTENSION.fullmatch(extension) or extension in IMAGE_EXTENSIONS:
                raise DataError(
                    f"--keep {extension}: name extensions in small letters without the first dot; the "
                    "sample's image is 'image'"
                )

    @property
    def shard_name(self) -> str:
        return self.name if self.name is not None else self.out.absolute().name

    @property
    def workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of the shards, as JSON values."""
        values = {key: value for key, value in asdict(self).items() if key not in _WITHOUT_EFFECT}
        values["name"] = self.shard_name
        values["keep"] = None if self.keep is None else sorted(self.keep)
        if not self.source.startswith(TORCHVISION_PREFIX):
            values["source"] = str(Path(self.source).resolve())
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


@dataclass(frozen=True)
class BuildResult:
    """A finished build."""

    manifest: Manifest
    num_samples: int
    num_rejected: int  # bad images left out, listed in rejected.jsonl
    num_reencoded: int
    source_image_bytes: int
    image_bytes: int  # of the images in the shards
    seconds: float
