"""Read one tar shard from end to end: where its samples begin, and everything that is wrong with it.

A tar reader takes a damaged header for the end of the archive and says nothing, so a shard is believed only
if the end-of-archive marker stands where the last member ends, and nothing but zeros follows.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from pretrain.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
END_MARKER_BYTES = 1024
READ_BYTES = 1 << 20
_SKIPPED_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardScan:
    """What one pass over a shard found."""

    num_bytes: int  # on disk
    sha256: str  # of the file on disk
    offsets: NDArray[np.int64]  # (num_samples + 1,): where each sample begins, then where the data end


def scan_shard(path: Path) -> ShardScan:
    """Find every sample of a shard, or say in one DataError what is wrong with it."""
    try:
        with path.open("rb") as file:
            stored = _Hashed(file)
            if path.name.endswith("gz"):
                with gzip.GzipFile(fileobj=stored, mode="rb") as content:
                    offsets = _scan_tar(path, _Windowed(content))
            else:
                offsets = _scan_tar(path, _Windowed(stored))
            while stored.read(READ_BYTES):  # whatever a decompressor left unread
                pass
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return ShardScan(stored.num_bytes, stored.digest.hexdigest(), offsets)


def _scan_tar(path: Path, content: _Windowed) -> NDArray[np.int64]:
    samples = _Samples(path)
    end = 0
    with tarfile.open(fileobj=content, mode="r|", bufsize=READ_BYTES) as tar:
        for member in tar:
            samples.add(member)
            end = member.offset_data + _padded(member.size)
            tar.members = []  # type: ignore[attr-defined]  # the list would grow with the shard
    while content.read(READ_BYTES):
        pass
    if content.zeros_from > end or content.num_bytes < end + END_MARKER_BYTES:
        raise _damaged(
            path,
            f"no end-of-archive marker at byte {end}, where the {len(samples.starts)} samples found end",
        )
    samples.finish()
    return np.array([*samples.starts, end], dtype=np.int64)


class _Samples:
    """Groups members by key as webdataset does, and refuses what it would lose or split."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts: list[int] = []
        self.seen: dict[str, set[str]] = {}
        self.key: str | None = None

    def add(self, member: tarfile.TarInfo) -> None:
        name = member.name
        if member.isdir():
            return  # holds no data; `tar cf shard.tar folder` writes them
        if not member.isreg() or member.issparse():
            raise self._error(f"member {name!r} is not a plain file", "pack plain files only")
        if name.startswith("/") or ".." in name.split("/"):
            raise self._error(f"member {name!r} points out of the archive", "rename it")
        if _SKIPPED_BY_WEBDATASET.match(name):
            return
        key, extension = base_plus_ext(name)
        if key is None:
            return
        extension = extension.lower()
        if key != self.key:
            if self.key is not None:
                self._check_image(self.key)
            if key in self.seen:
                problem = (
                    "is there twice"
                    if extension in self.seen[key]
                    else "has its members apart from each other"
                )
                raise self._error(
                    f"key {key!r} {problem}", "give each sample its own key and sort the members by name"
                )
            self.key = key
            self.seen[key] = set()
            self.starts.append(member.offset)
        elif extension in self.seen[key]:
            raise self._error(f"member {name!r} is there twice", "give each sample its own key")
        self.seen[key].add(extension)

    def finish(self) -> None:
        """Check what can be known only after the last member."""
        if self.key is None:
            raise self._error(
                "no samples in it", f"add images ({', '.join(IMAGE_EXTENSIONS)}) or remove the shard"
            )
        self._check_image(self.key)

    def _check_image(self, key: str) -> None:
        if self.seen[key].isdisjoint(IMAGE_EXTENSIONS):
            raise self._error(
                f"sample {key!r} has no image, only {', '.join(sorted(self.seen[key]))}",
                f"an image ends in {', '.join(IMAGE_EXTENSIONS)}, with no other dot in its name",
            )

    def _error(self, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.path}: {problem}; {remedy}, then index again")


class _Hashed(io.RawIOBase):
    """Passes a file's bytes on, counted and hashed."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.num_bytes += len(data)
        self.digest.update(data)
        return data


class _Windowed(io.RawIOBase):
    """Passes bytes on and remembers where the zeros at their end begin."""

    def __init__(self, file: io.RawIOBase | gzip.GzipFile) -> None:
        self.file = file
        self.num_bytes = 0
        self.zeros_from = 0  # all bytes from here on are zero

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size) or b""
        content = len(data.rstrip(b"\0"))
        if content:
            self.zeros_from = self.num_bytes + content
        self.num_bytes += len(data)
        return data


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: damaged or cut short ({problem}); fetch or build this shard again")
