"""Index shards: read each once from end to end, refuse what would lose samples, write what readers trust."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pretrain.data.columns import NO_LABEL, SampleColumns
from pretrain.data.index_columns import SAMPLE_COLUMNS
from pretrain.data.manifest import COLUMNS_NAME, FORMAT, INDEX_NAME, Manifest, sha256_of, shards_hash
from pretrain.data.replacing import json_bytes, replacing, write_bytes
from pretrain.data.scan import ShardScan, scan_shard
from pretrain.data.side_by_side import side_by_side
from pretrain.data.sizes_files import SPLITS, SizesFiles, write_sizes_files
from pretrain.data.storage import Location, list_names, parse_location
from pretrain.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
CLASSES_NAME = "classes.txt"
NUM_NAMED_PROBLEMS = 20


@dataclass(frozen=True)
class ShardRecord:
    """What a shard's writer, or its scan, knows of it."""

    name: str
    num_bytes: int
    sha256: str
    split: str
    samples: SampleColumns

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def num_labelled(self) -> int:
        return int((self.samples.labels != NO_LABEL).sum())


def record_shard(path: Path, split: str) -> ShardRecord:
    """Read a shard from end to end; DataError with all that is wrong with it."""
    return _record(parse_location(path), path.name, split, scan_shard(parse_location(path)))


def index_folder(folder: Location | Path | str, out: Path | str | None = None) -> Manifest:
    """Read every shard of a folder once, check it, and write the index into `out` (default: the folder)."""
    root = folder if isinstance(folder, Location) else parse_location(folder)
    if out is None and not root.is_local:
        raise DataError(f"{root}: cannot be written to; choose a local folder for the index with --out DIR")
    for place in (root.url, str(out or "")):
        _check_text(place, "folder")
    names = shard_names(root)
    own = own_sizes_files(Path(out)) if out else {}
    own |= (
        own_sizes_files(root.path) if root.is_local else {}
    )  # an index in `out` may not be the one of these files
    known = SizesFiles.read(root, own)
    splits = [known.splits.get(name) or split_of(name) for name in names]
    scans = scan_all([root.join(name) for name in names])
    problems = [
        f"{name}: {_tell(scan)}" for name, scan in zip(names, scans, strict=True) if scan.problems
    ] + known.disagreements({name: len(scan.samples) for name, scan in zip(names, scans, strict=True)})
    if problems:
        more = len(problems) - NUM_NAMED_PROBLEMS
        named = "; ".join(problems[:NUM_NAMED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        raise DataError(
            f"{root}: {named}. `pretrain shards verify {root}` lists everything, "
            "`--repair OUT` writes clean shards; then index again"
        )
    records = [
        ShardRecord(name, scan.num_bytes, scan.sha256, split, scan.samples)
        for name, split, scan in zip(names, splits, scans, strict=True)
    ]
    return write_manifest(Path(out) if out else root.path, records, root, class_names(root))


def write_manifest(
    folder: Path,
    records: Iterable[ShardRecord],
    shards_root: Location | Path | None = None,
    class_names: Iterable[str] = (),
) -> Manifest:
    """Write the index into `folder`, for shards that lie in `shards_root` (default: the same folder)."""
    records = list(records)
    _make_folder(folder)
    split_names = tuple(dict.fromkeys(record.split for record in records))
    columns = _shard_columns(records, split_names)
    samples = {
        f"samples.{name}": np.concatenate([getattr(record.samples, name) for record in records])
        for name in SAMPLE_COLUMNS
    }
    root = shards_root if isinstance(shards_root, Location) else parse_location(shards_root or folder)
    sums = {
        name: (sum(r.split == name for r in records), sum(r.num_samples for r in records if r.split == name))
        for name in split_names
    }
    with replacing(folder / COLUMNS_NAME) as temporary:
        save_file({f"shards.{name}": column for name, column in columns.items()} | samples, temporary)
        columns_sha256 = sha256_of(temporary)
    own: dict[str, str] = {}
    if root.is_local and root.path.resolve() == folder.resolve():
        shards = [(record.name, record.split, record.num_samples) for record in records]
        own = write_sizes_files(folder, shards, own_sizes_files(folder))
    index = {
        "format": FORMAT,
        "shards_root": _relative(root, folder),
        "num_shards": {name: shards for name, (shards, _) in sums.items()},
        "num_samples": {name: count for name, (_, count) in sums.items()},
        "split_names": split_names,
        "class_names": list(class_names),
        "shards_sha256": shards_hash(columns, split_names),
        "columns_sha256": columns_sha256,
        "sizes_files_sha256": own,
    }
    write_bytes(folder / INDEX_NAME, json_bytes(index))
    manifest = Manifest.load(folder)
    manifest.check_shards()
    return manifest


def scan_all(locations: Sequence[Location]) -> list[ShardScan]:
    """Scan shards side by side, in order."""
    is_local = all(location.is_local for location in locations)
    num_bytes = sum(location.path.stat().st_size for location in locations) if is_local else 0
    return list(side_by_side(scan_shard, locations, len(locations), num_bytes, None))


def shard_names(folder: Location) -> list[str]:
    """The shards of a folder, in natural order."""
    if folder.is_local and not folder.path.is_dir():
        raise DataError(f"{folder}: no such folder")
    names = [name for name in list_names(folder) if name.endswith(SUFFIXES) and not name.startswith(".")]
    if not names:
        raise DataError(f"{folder}: no shards here; expected files that end in {', '.join(SUFFIXES)}")
    for name in names:
        _check_text(name, f"{folder}: shard")
    by_stem: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"\.(tar|tar\.gz|tgz)$", "", name)
        if stem in by_stem:
            raise DataError(f"{folder}: {by_stem[stem]} and {name} hold the same shard; remove one of them")
        by_stem[stem] = name
    return sorted(names, key=natural_key)


def own_sizes_files(folder: Path) -> dict[str, str]:
    """sha256 of the sizes files that an earlier index in this folder wrote."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return dict(json.loads((folder / INDEX_NAME).read_bytes())["sizes_files_sha256"])
    return {}


def split_of(name: str) -> str:
    """The split that a shard's file name speaks of: its first word that is one, else train."""
    return next((SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLITS), "train")


def class_names(folder: Location) -> list[str]:
    """One class a line of classes.txt; of a line with tabs (index, id, name) the last field."""
    if not folder.is_local or not (folder.path / CLASSES_NAME).is_file():
        return []
    try:
        lines = (folder.path / CLASSES_NAME).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{folder.join(CLASSES_NAME)}: is not UTF-8 text; save it as UTF-8") from error
    return [line.split("\t")[-1].strip() for line in lines if line.strip()]


def _record(location: Location, name: str, split: str, scan: ShardScan) -> ShardRecord:
    if scan.problems:
        raise DataError(f"{location}: {_tell(scan)}")
    return ShardRecord(name, scan.num_bytes, scan.sha256, split, scan.samples)


def _tell(scan: ShardScan, num_told: int = 3) -> str:
    """The problems of a shard in half a line."""
    told = [f"{f'{p.key!r} ' if p.key else ''}{p.reason}; {p.remedy}" for p in scan.problems[:num_told]]
    more = len(scan.problems) - num_told
    return "; ".join(told) + (f"; and {more} more" if more > 0 else "")


def _shard_columns(records: Sequence[ShardRecord], split_names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    names = [record.name.encode() for record in records]
    return {
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "num_bytes": np.array([record.num_bytes for record in records], dtype=np.int64),
        "num_samples": np.array([record.num_samples for record in records], dtype=np.int64),
        "data_bytes": np.array([r.samples.starts[-1] - r.samples.starts[0] for r in records], dtype=np.int64),
        "sha256": np.array([list(bytes.fromhex(record.sha256)) for record in records], dtype=np.uint8),
        "split": np.array([split_names.index(record.split) for record in records], dtype=np.uint8),
        "digests": np.array([record.samples.digest() for record in records], dtype=np.uint64),
    }


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key under which shard-2 comes before shard-10."""
    parts = re.split("([0-9]+)", name)
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]


def _check_text(name: str, what: str) -> None:
    """A name of other bytes than UTF-8 can stand in no index, and in no message."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} {name!a}: its name is not UTF-8; rename it") from error


def _relative(root: Location, start: Path) -> str:
    """Relative when the two share a folder below the root, so that both can be moved together."""
    if not root.is_local:
        return root.url
    path, start = root.path.resolve(), start.resolve()
    shared = os.path.commonpath([path, start])
    return os.path.relpath(path, start) if shared != path.anchor else str(path)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
