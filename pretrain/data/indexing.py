"""Index shards: read each once from end to end, refuse what would lose samples, write what readers trust."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pretrain.data.columns import NO_LABEL, SampleColumns
from pretrain.data.manifest import COLUMNS_NAME, FORMAT, INDEX_NAME, SAMPLE_COLUMNS, Manifest, shards_hash
from pretrain.data.scan import ShardScan, scan_shard
from pretrain.data.storage import Location, list_names, parse_location, read_bytes
from pretrain.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
SPLITS = {  # word in a file name -> split
    "train": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "unlabeled": "unlabeled",
    "unlabelled": "unlabeled",
}
INFO_NAME, SIZES_NAME, CLASSES_NAME = "_info.json", "sizes.json", "classes.txt"
NUM_NAMED_PROBLEMS = 20
SMALL_SHARDS = 8  # fewer are scanned in threads: processes take a second to start


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
    names = shard_names(root)
    known = _SizesFiles.read(root)
    splits = [known.splits.get(name) or split_of(name) for name in names]
    scans = scan_all([root.join(name) for name in names])
    problems = [
        f"{name}: {_tell(scan)}" for name, scan in zip(names, scans, strict=True) if scan.problems
    ] + known.disagreements(names, scans)
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
    with _Replacing(folder / COLUMNS_NAME) as temporary:
        save_file({f"shards.{name}": column for name, column in columns.items()} | samples, temporary)
        columns_sha256 = _sha256_of(temporary)
    index = {
        "format": FORMAT,
        "shards_root": _relative(root, folder),
        "num_shards": {name: shards for name, (shards, _) in sums.items()},
        "num_samples": {name: count for name, (_, count) in sums.items()},
        "split_names": split_names,
        "class_names": list(class_names),
        "shards_sha256": shards_hash(columns, split_names),
        "columns_sha256": columns_sha256,
    }
    _write(folder / INDEX_NAME, index)
    if root.is_local and root.path.resolve() == folder.resolve():
        _write_sizes_files(folder, records, split_names)
    manifest = Manifest.load(folder)
    manifest.check_shards()
    return manifest


def scan_all(locations: Sequence[Location]) -> list[ShardScan]:
    """Scan shards side by side, in order."""
    num_workers = min(len(os.sched_getaffinity(0)), len(locations))
    pool: Executor
    if len(locations) < SMALL_SHARDS or num_workers == 1:
        pool = ThreadPoolExecutor(num_workers)
    else:
        pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("forkserver"))
    with pool:
        return list(pool.map(scan_shard, locations))


def shard_names(folder: Location) -> list[str]:
    """The shards of a folder, in natural order."""
    if folder.is_local and not folder.path.is_dir():
        raise DataError(f"{folder}: no such folder")
    names = [name for name in list_names(folder) if name.endswith(SUFFIXES) and not name.startswith(".")]
    if not names:
        raise DataError(f"{folder}: no shards here; expected files that end in {', '.join(SUFFIXES)}")
    by_stem: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"\.(tar|tar\.gz|tgz)$", "", name)
        if stem in by_stem:
            raise DataError(f"{folder}: {by_stem[stem]} and {name} hold the same shard; remove one of them")
        by_stem[stem] = name
    return sorted(names, key=_natural_key)


def split_of(name: str) -> str:
    """The split that a shard's file name speaks of: its first word that is one, else train."""
    return next((SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLITS), "train")


def class_names(folder: Location) -> list[str]:
    """One class a line of classes.txt; of a line with tabs (index, id, name) the last field."""
    if not folder.is_local or not (folder.path / CLASSES_NAME).is_file():
        return []
    lines = (folder.path / CLASSES_NAME).read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[-1].strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class _SizesFiles:
    """What `_info.json` (timm) and `sizes.json` (webdataset, OpenCLIP) say, if they are there."""

    splits: dict[str, str]  # shard name -> split
    sizes: dict[str, dict[str, int]]  # file -> shard name -> samples

    @classmethod
    def read(cls, folder: Location) -> _SizesFiles:
        splits: dict[str, str] = {}
        sizes: dict[str, dict[str, int]] = {}
        if (listed := _read_json(folder, SIZES_NAME)) is not None:
            sizes[SIZES_NAME] = {Path(name).name: size for name, size in listed.items() if _is_count(size)}
        described = (_read_json(folder, INFO_NAME) or {}).get("splits")
        for split, entry in described.items() if isinstance(described, dict) else ():
            names, lengths = entry.get("filenames"), entry.get("shard_lengths")
            if isinstance(names, list):
                base_names = [Path(str(name)).name for name in names]
                splits.update((name, SPLITS.get(split, str(split))) for name in base_names)
                if isinstance(lengths, list) and len(lengths) == len(names):
                    sizes.setdefault(INFO_NAME, {}).update(zip(base_names, lengths, strict=True))
        return cls(splits, sizes)

    def disagreements(self, names: Sequence[str], scans: Sequence[ShardScan]) -> list[str]:
        found = {name: len(scan.samples) for name, scan in zip(names, scans, strict=True)}
        return [
            f"{file} counts {size} samples in {name}, there are {found.get(name, 'no such shard')}: "
            f"restore the shard, or remove {file} if it is out of date"
            for file, sizes in self.sizes.items()
            for name, size in sizes.items()
            if found.get(name) != size
        ]


def _read_json(folder: Location, name: str) -> dict[str, Any] | None:
    if not folder.is_local or not (folder.path / name).is_file():
        return None
    try:
        value = json.loads(read_bytes(folder.join(name)))
    except ValueError as error:
        raise DataError(f"{folder.join(name)}: is not JSON ({error}); mend or remove it") from error
    if not isinstance(value, dict):
        raise DataError(f"{folder.join(name)}: is not an object; mend or remove it")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _write_sizes_files(folder: Path, records: Sequence[ShardRecord], split_names: Sequence[str]) -> None:
    """Beside the shards, for timm (`_info.json`) and webdataset (`sizes.json`); files of others are left."""
    splits = {
        split: {
            "name": split,
            "num_samples": sum(record.num_samples for record in records if record.split == split),
            "filenames": [record.name for record in records if record.split == split],
            "shard_lengths": [record.num_samples for record in records if record.split == split],
            "alt_label": None,
        }
        for split in split_names
    }
    sizes = {record.name: record.num_samples for record in records}
    for name, value in ((INFO_NAME, {"splits": splits}), (SIZES_NAME, sizes)):
        if not (folder / name).exists():
            _write(folder / name, value)


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


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key under which shard-2 comes before shard-10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split("([0-9]+)", name)]


def _relative(root: Location, start: Path) -> str:
    """Relative when the two share a folder below the root, so that both can be moved together."""
    if not root.is_local:
        return root.url
    path, start = root.path.resolve(), start.resolve()
    shared = os.path.commonpath([path, start])
    return os.path.relpath(path, start) if shared != path.anchor else str(path)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, value: object) -> None:
    with _Replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error


class _Replacing:
    """A temporary file that takes a path's place when it is complete, and leaves nothing otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            try:
                with self.temporary.open("rb") as file:
                    os.fchmod(file.fileno(), 0o644)  # safetensors writes for its owner alone
                    os.fsync(file.fileno())
                self.temporary.replace(self.path)
                return
            except OSError as failed:
                error = failed
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(
                f"{self.path}: cannot write the index ({error.strerror}); choose a writable folder with --out"
            ) from error
