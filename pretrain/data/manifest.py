"""What the shards of a folder hold, written once by `pretrain shards index` and trusted by every reader.

`index.json` names the shards (bytes, samples, sha256, split); `index.offsets.bin` beside it holds, shard by
shard, `num_samples + 1` little-endian int64 byte offsets into the uncompressed tar: where each sample's first
header begins, then where the data end and the end-of-archive marker must stand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data.scan import scan_shard
from pretrain.errors import DataError, nearest

INDEX_NAME = "index.json"
OFFSETS_NAME = "index.offsets.bin"
FORMAT = "pretrain-shards-1"
SUFFIXES = (".tar", ".tar.gz", ".tgz")
SPLITS = {"train": "train", "test": "test", "val": "val", "validation": "val"}  # word in a file name -> split
NUM_SCAN_THREADS = 4
NUM_NAMED_SHARDS = 20  # an error names this many shards, and counts the rest


@dataclass(frozen=True)
class Shard:
    """One tar file and where its samples lie."""

    name: str
    path: Path
    num_bytes: int  # on disk, so compressed for .tar.gz
    num_samples: int
    sha256: str  # of the file on disk
    split: str
    first_sample_id: int  # ids count on through all shards of the manifest
    offsets: NDArray[np.int64] = field(compare=False, repr=False)  # (num_samples + 1,) bytes, uncompressed


@dataclass(frozen=True)
class Split:
    """The shards of one split, in manifest order."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(shard.num_samples for shard in self.shards)

    @property
    def first_sample_ids(self) -> tuple[int, ...]:
        return tuple(shard.first_sample_id for shard in self.shards)

    @property
    def stored_bytes(self) -> int:
        """Uncompressed bytes of all samples, tar headers included."""
        return sum(int(shard.offsets[-1] - shard.offsets[0]) for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """All shards of an indexed folder."""

    folder: Path  # where index.json lies; the shards may lie elsewhere
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    @cached_property
    def hash(self) -> str:
        """sha256 over all that decides which bytes a sample id stands for; part of a run's identity."""
        digest = hashlib.sha256()
        for shard in self.shards:
            line = [shard.name, shard.num_bytes, shard.num_samples, shard.sha256, shard.split]
            digest.update(json.dumps(line).encode() + b"\n")
            digest.update(shard.offsets.astype("<i8").tobytes())
        return digest.hexdigest()

    def split(self, name: str) -> Split:
        shards = tuple(shard for shard in self.shards if shard.split == name)
        if not shards:
            raise DataError(f"{self.folder}: there is no split '{name}'; {nearest(name, self.split_names)}")
        return Split(name, shards)

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """Read the index of a folder and check that every shard is there with the bytes it had."""
        folder = Path(folder)
        index, offsets = _read_index(folder)
        root = Path(os.path.normpath(folder / index["shards_root"]))
        manifest = cls(folder, _place(index["shards"], offsets, root), tuple(index["class_names"]))
        problems = [problem for shard in manifest.shards if (problem := _problem(shard))]
        if problems:
            more = len(problems) - NUM_NAMED_SHARDS
            named = "; ".join(problems[:NUM_NAMED_SHARDS]) + (f"; and {more} more" if more > 0 else "")
            raise DataError(
                f"{root}: {len(problems)} of {len(manifest.shards)} shards do not match the index: {named}. "
                f"Restore them, or run `pretrain shards index {folder}` to take them as they are"
            )
        return manifest


@dataclass(frozen=True)
class ShardRecord:
    """What a shard's writer, or its scan, knows of it."""

    name: str
    num_bytes: int
    sha256: str
    split: str
    offsets: NDArray[np.int64]  # (num_samples + 1,)


def write_manifest(
    folder: Path,
    records: Iterable[ShardRecord],
    shards_root: Path | None = None,
    class_names: Iterable[str] = (),
) -> Manifest:
    """Write the index into `folder`, for shards that lie in `shards_root` (default: the same folder)."""
    records = list(records)
    folder.mkdir(parents=True, exist_ok=True)
    offsets = b"".join(record.offsets.astype("<i8").tobytes() for record in records)
    index = {
        "format": FORMAT,
        "shards_root": _relative(shards_root or folder, folder),
        "offsets_sha256": hashlib.sha256(offsets).hexdigest(),
        "class_names": list(class_names),
        "shards": [
            {
                "name": record.name,
                "num_bytes": record.num_bytes,
                "num_samples": len(record.offsets) - 1,
                "sha256": record.sha256,
                "split": record.split,
            }
            for record in records
        ],
    }
    _write_atomically(folder / OFFSETS_NAME, offsets)
    _write_atomically(folder / INDEX_NAME, (json.dumps(index, indent=1) + "\n").encode())
    return Manifest.load(folder)


def index_folder(folder: Path | str, out: Path | str | None = None) -> Manifest:
    """Read every shard of a folder once, check it, and write the index into `out` (default: the folder)."""
    folder = Path(folder)
    paths = _shards_of(folder)
    with ThreadPoolExecutor(min(NUM_SCAN_THREADS, len(paths))) as pool:
        scans = list(pool.map(scan_shard, paths))
    records = [
        ShardRecord(path.name, scan.num_bytes, scan.sha256, split_of(path.name), scan.offsets)
        for path, scan in zip(paths, scans, strict=True)
    ]
    return write_manifest(Path(out) if out else folder, records, folder, _class_names(folder / "classes.txt"))


def split_of(name: str) -> str:
    """The split that a shard's file name speaks of: its first word that is one, else train."""
    return next((SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLITS), "train")


def _shards_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = [
        path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and not path.name.startswith(".")
    ]
    if not paths:
        raise DataError(f"{folder}: no shards here; expected files that end in {', '.join(SUFFIXES)}")
    by_stem: dict[str, str] = {}
    for path in paths:
        stem = re.sub(r"\.(tar|tar\.gz|tgz)$", "", path.name)
        if stem in by_stem:
            raise DataError(
                f"{folder}: {by_stem[stem]} and {path.name} hold the same shard; remove one of them"
            )
        by_stem[stem] = path.name
    return sorted(paths, key=lambda path: _natural_key(path.name))


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key under which shard-2 comes before shard-10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split("([0-9]+)", name)]


def _class_names(path: Path) -> list[str]:
    """One class a line; of a line with tabs (index, id, name) the last field."""
    if not path.is_file():
        return []
    return [
        line.split("\t")[-1].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def _read_index(folder: Path) -> tuple[dict[str, Any], NDArray[np.int64]]:
    again = f"run `pretrain shards index {folder}`"
    if not (folder / INDEX_NAME).is_file():
        raise DataError(f"{folder}: there is no {INDEX_NAME}; {again} to make it")
    try:
        index: dict[str, Any] = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise DataError(f"{folder / INDEX_NAME}: format {index['format']!r} is not {FORMAT!r}; {again}")
        data = (folder / OFFSETS_NAME).read_bytes()
        count = sum(int(shard["num_samples"]) + 1 for shard in index["shards"])
        matches = len(data) == 8 * count and hashlib.sha256(data).hexdigest() == index["offsets_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: the index cannot be read ({error!r}); {again}") from error
    if not matches:
        raise DataError(f"{folder}: {OFFSETS_NAME} does not belong to {INDEX_NAME}; {again}")
    return index, np.frombuffer(data, dtype="<i8").astype(np.int64)


def _place(entries: list[dict[str, Any]], offsets: NDArray[np.int64], root: Path) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    first_sample_id = first_offset = 0
    for entry in entries:
        num_samples = entry["num_samples"]
        own = offsets[first_offset : first_offset + num_samples + 1]
        shards.append(Shard(path=root / entry["name"], first_sample_id=first_sample_id, offsets=own, **entry))
        first_sample_id += num_samples
        first_offset += num_samples + 1
    return tuple(shards)


def _problem(shard: Shard) -> str | None:
    try:
        num_bytes = shard.path.stat().st_size
    except OSError as error:
        return f"{shard.name}: {(error.strerror or str(error)).lower()}"
    if num_bytes != shard.num_bytes:
        return f"{shard.name}: {num_bytes} bytes instead of {shard.num_bytes}"
    return None if os.access(shard.path, os.R_OK) else f"{shard.name}: no permission to read"


def _relative(path: Path, start: Path) -> str:
    """Relative when the two share a folder below the root, so that both can be moved together."""
    path, start = path.resolve(), start.resolve()
    shared = os.path.commonpath([path, start])
    return os.path.relpath(path, start) if shared != path.anchor else str(path)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path}: cannot write the index ({error.strerror}); choose a writable folder"
        ) from error
