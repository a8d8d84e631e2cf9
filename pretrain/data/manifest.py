"""What the shards of a folder hold: written once (`indexing.py`), trusted and checked by every reader.

`index.json` says what there is; `index.safetensors` beside it holds the numbers as columns. A list of objects
in JSON would need seconds and gigabytes to open for a million shards; these columns need tens of MiB for the
shards, and those of the samples (28 bytes each) are looked up on disk, shard by shard. The columns of the
shards are vouched for by a hash in `index.json`, those of a shard's samples by a hash among the columns of
the shards, which is checked when the shard is first read. So opening never reads what a run may not need.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pretrain.data.columns import SampleColumns
from pretrain.data.index_columns import SAMPLE_COLUMNS, SHARD_COLUMNS, are_in_order, read_shard_columns
from pretrain.data.replacing import write_bytes
from pretrain.data.storage import Location, StorageConfig, StorageError, parse_location, read_bytes
from pretrain.errors import DataError, nearest

INDEX_NAME = "index.json"
COLUMNS_NAME = "index.safetensors"
FORMAT = "pretrain-shards-2"
NUM_LOOKUP_THREADS = 16
NUM_NAMED_SHARDS = 20  # an error names this many shards, and counts the rest
_SHA256 = re.compile("[0-9a-f]{64}")
_DEFAULT_STORAGE = StorageConfig()


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    index: int  # in its manifest
    name: str
    location: Location
    num_bytes: int  # on disk, so compressed for .tar.gz
    num_samples: int
    sha256: str  # of the file on disk
    first_sample_id: int  # ids count on through all shards of the manifest

    @property
    def path(self) -> Path:
        return self.location.path


@dataclass(frozen=True, eq=False)
class Manifest:
    """All shards of an indexed folder. Two are equal if the same sample ids stand for the same bytes."""

    folder: Location  # where index.json lies; the shards may lie elsewhere
    root: Location  # of the shards
    split_names: tuple[str, ...]
    class_names: tuple[str, ...]
    hash: str  # sha256 over the columns of the shards; part of a run's identity
    columns_path: Path  # of index.safetensors, on this machine
    shard_columns: dict[str, NDArray[Any]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and other.hash == self.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the columns again, from where they are on this machine."""
        parts = (self.folder, self.root, self.split_names, self.class_names, self.hash, self.columns_path)
        return _reopen, parts

    @property
    def num_shards(self) -> int:
        return len(self.shard_columns["num_samples"])

    @property
    def num_samples(self) -> int:
        return int(self.ends[-1])

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self.shard(index) for index in range(self.num_shards))

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(shards,): the sample id after each shard's last."""
        return np.cumsum(self.shard_columns["num_samples"], dtype=np.int64)

    def shard(self, index: int) -> Shard:
        columns = self.shard_columns
        name = self._name(index)
        num_samples = int(columns["num_samples"][index])
        return Shard(
            index=index,
            name=name,
            location=self.root.join(name),
            num_bytes=int(columns["num_bytes"][index]),
            num_samples=num_samples,
            sha256=columns["sha256"][index].tobytes().hex(),
            first_sample_id=int(self.ends[index]) - num_samples,
        )

    def samples(self, shard: Shard) -> SampleColumns:
        """Where a shard's samples lie, checked against the hash that vouches for it."""
        try:
            columns = _sample_columns(self.columns_path, shard)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.columns_path}: cannot be read ({error}); {self.again}") from error
        vouched = int(self.shard_columns["digests"][shard.index])
        if columns.digest() != vouched or not are_in_order(columns):
            raise DataError(f"{self.columns_path}: damaged where it speaks of {shard.name}; {self.again}")
        return columns

    def split(self, name: str) -> Split:
        if name not in self.split_names:
            raise DataError(f"{self.folder}: there is no split '{name}'; {nearest(name, self.split_names)}")
        own = self.shard_columns["split"] == self.split_names.index(name)
        return Split(self, name, np.flatnonzero(own))

    @property
    def again(self) -> str:
        """The remedy for an index that does not fit."""
        return _again(self.folder)

    def _name(self, index: int) -> str:
        ends = self.shard_columns["name_ends"]
        begin = int(ends[index - 1]) if index else 0
        return self.shard_columns["names"][begin : int(ends[index])].tobytes().decode("utf-8")

    @classmethod
    def load(cls, folder: Location | Path | str, storage: StorageConfig | None = None) -> Manifest:
        """Open the index of a folder. Looks at no shard: `check_shards` does."""
        location = folder if isinstance(folder, Location) else parse_location(folder)
        storage = storage or _DEFAULT_STORAGE
        try:
            data = read_bytes(location.join(INDEX_NAME), storage)
        except StorageError as error:
            if not error.missing:
                raise DataError(str(error)) from error
            raise DataError(f"{location}: there is no {INDEX_NAME}; {_again(location)}") from error
        try:
            index = json.loads(data)
            if index["format"] != FORMAT:
                raise DataError(
                    f"{location.join(INDEX_NAME)}: format {index['format']!r} is not {FORMAT!r}; "
                    f"{_again(location)}"
                )
            vouched, root = index["shards_sha256"], _root(location, index["shards_root"])
            split_names, class_names = _names(index, "split_names"), _names(index, "class_names")
            columns_path = _columns_here(location, index["columns_sha256"], storage)
            columns = read_shard_columns(columns_path, len(split_names))
        except (
            OSError,
            StorageError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ) as error:
            reason = f"{error!r}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise DataError(f"{location}: the index cannot be read ({reason}); {_again(location)}") from error
        if shards_hash(columns, split_names) != vouched:
            raise DataError(f"{location}: {COLUMNS_NAME} does not belong to {INDEX_NAME}; {_again(location)}")
        return cls(location, root, split_names, class_names, vouched, columns_path, columns)

    def check_shards(self) -> None:
        """Every local shard is there, readable, with the bytes it had; all that are not are named at once."""
        if not self.root.is_local:
            return  # a shard of a store is looked at when it is read
        with ThreadPoolExecutor(NUM_LOOKUP_THREADS) as pool:
            batches = range(0, self.num_shards, 1000)
            found = pool.map(lambda first: list(self._problems(first, first + 1000)), batches)
            problems = [problem for batch in found for problem in batch]
        if problems:
            more = len(problems) - NUM_NAMED_SHARDS
            named = "; ".join(problems[:NUM_NAMED_SHARDS]) + (f"; and {more} more" if more > 0 else "")
            raise DataError(
                f"{self.root}: {len(problems)} of {self.num_shards} shards do not match the index: {named}. "
                f"Restore them, or {self.again} to take them as they are"
            )

    def _problems(self, first: int, stop: int) -> Iterator[str]:
        for index in range(first, min(stop, self.num_shards)):
            shard = self.shard(index)
            try:
                num_bytes = shard.path.stat().st_size
            except OSError as error:
                yield f"{shard.name}: {(error.strerror or str(error)).lower()}"
                continue
            if num_bytes != shard.num_bytes:
                yield f"{shard.name}: {num_bytes} bytes instead of {shard.num_bytes}"
            elif not os.access(shard.path, os.R_OK):
                yield f"{shard.name}: no permission to read"


@dataclass(frozen=True)
class Split:
    """The shards of one split, in manifest order."""

    manifest: Manifest
    name: str
    indices: NDArray[np.int64]  # of its shards, in the manifest

    @property
    def num_shards(self) -> int:
        return len(self.indices)

    @property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self.shard(place) for place in range(self.num_shards))

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return self._column("num_samples")

    @property
    def first_sample_ids(self) -> NDArray[np.int64]:
        first: NDArray[np.int64] = self.manifest.ends[self.indices] - self.shard_sizes
        return first

    @property
    def stored_bytes(self) -> int:
        """Uncompressed bytes of all samples, tar headers included."""
        return int(self._column("data_bytes").sum())

    def shard(self, place: int) -> Shard:
        """The shard at a place of this split."""
        return self.manifest.shard(int(self.indices[place]))

    def samples(self, shard: Shard) -> SampleColumns:
        return self.manifest.samples(shard)

    def _column(self, name: str) -> NDArray[np.int64]:
        column: NDArray[np.int64] = self.manifest.shard_columns[name][self.indices]
        return column


def shards_hash(columns: dict[str, NDArray[Any]], split_names: tuple[str, ...]) -> str:
    """sha256 over all that decides which bytes a sample id stands for."""
    digest = hashlib.sha256(json.dumps(split_names).encode())
    for name in SHARD_COLUMNS:
        column = np.ascontiguousarray(columns[name])
        digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
        digest.update(column.data)
    return digest.hexdigest()


def _reopen(
    folder: Location,
    root: Location,
    split_names: tuple[str, ...],
    class_names: tuple[str, ...],
    hash_: str,
    columns_path: Path,
) -> Manifest:
    try:
        columns = read_shard_columns(columns_path, len(split_names))
        if shards_hash(columns, split_names) != hash_:
            raise ValueError("other columns")
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{columns_path}: was changed or removed while it was in use; start again") from error
    return Manifest(folder, root, split_names, class_names, hash_, columns_path, columns)


def _again(folder: Location) -> str:
    if folder.scheme in ("http", "https"):  # which cannot be asked for its files
        return f"index the folder where it lies and serve {INDEX_NAME} and {COLUMNS_NAME} with the shards"
    return f"run `pretrain shards index {folder}{'' if folder.is_local else ' --out DIR'}`"


def _names(index: dict[str, Any], key: str) -> tuple[str, ...]:
    names = index[key]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'{key}' is not a list of names")
    return tuple(names)


def _root(folder: Location, shards_root: str) -> Location:
    if not folder.is_local or "://" in shards_root:
        return folder if shards_root == "." else parse_location(shards_root)
    return parse_location(os.path.normpath(folder.path / shards_root))


def _columns_here(folder: Location, sha256: str, storage: StorageConfig) -> Path:
    """The columns as a local file; those of a remote folder are copied here, again if the copy is damaged."""
    remote = folder.join(COLUMNS_NAME)
    if folder.is_local:
        return remote.path
    if not _SHA256.fullmatch(sha256):
        raise ValueError("'columns_sha256' is not a sha256")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain" / "indexes"
    here = caches / f"{sha256}.safetensors"
    if not here.is_file() or sha256_of(here) != sha256:
        data = read_bytes(remote, storage)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"{remote}: does not belong to its {INDEX_NAME}; copy both again")
        here.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(here, data)
    return here


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=4)
def _open_columns(path: Path, _changed_ns: int) -> Any:
    return safe_open(path, framework="numpy")


def _sample_columns(path: Path, shard: Shard) -> SampleColumns:
    file = _open_columns(path, path.stat().st_mtime_ns)
    begin, end = shard.first_sample_id, shard.first_sample_id + shard.num_samples
    starts = file.get_slice("samples.starts")[begin + shard.index : end + shard.index + 1]  # one more a shard
    return SampleColumns(
        starts, *(file.get_slice(f"samples.{name}")[begin:end] for name in list(SAMPLE_COLUMNS)[1:])
    )
