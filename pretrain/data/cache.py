"""A folder on a node's own disk that holds whole shards, shared by all ranks and jobs of a user there.

An entry is named by the sha256 of its content. It is written as `<sha256>.part` by the one process that holds
a lock on that file (the kernel frees it when the process dies, however it dies), takes up its full size from
the start, and is renamed once its bytes have proved right. All growth and eviction happen under one more
lock, so the folder never holds more than `max_bytes`. Whoever has an evicted entry open can read on. Nobody
waits for ever for a process that stands still: after a while a shard is read where it lies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.location import Location, StorageError
from pretrain.data.storage import OnRetry, RangeFile, StorageConfig, open_file
from pretrain.errors import ConfigError, DataError

LOCK_NAME = "lock"
PART_SUFFIX = ".part"
PIECE_BYTES = 2**23
NUM_DOWNLOADS = 2  # of a shard whose bytes turn out wrong
WAIT_SECONDS = 0.05  # between two looks at what others do
FINISHED_NS = 10**18  # time of change of a finished entry: any later write gives it another
_DEFAULT_STORAGE = StorageConfig()
_FULL = {errno.ENOSPC, errno.EDQUOT}
_ENTRY = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{64}\.part")


@dataclass(frozen=True)
class CacheConfig:
    """A node-local cache of shards."""

    folder: Path  # of this user alone; made if it is absent
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes <= 0:
            raise ConfigError(f"max_bytes: {self.max_bytes} is not above 0; give room for a few shards")


class BusyError(Exception):
    """Another process holds what we need, and got no further for a whole deadline."""


class ShardCache:
    """Gives local copies of shards; downloads each once per node."""

    def __init__(
        self, config: CacheConfig, storage: StorageConfig = _DEFAULT_STORAGE, on_retry: OnRetry | None = None
    ) -> None:
        self.config = config
        self.num_hits = 0
        self.num_misses = 0
        self.num_evicted = 0
        self.num_dropped = 0  # entries that were damaged
        self.num_bypassed = 0  # shards opened where they lie, as another process stood still
        self.bytes_fetched = 0
        self._storage = storage
        self._on_retry = on_retry
        self._counting = threading.Lock()
        _make_private(config.folder)
        with suppress(BusyError), self._locked():  # another job may sweep
            self._sweep()

    def open(self, location: Location, num_bytes: int, sha256: str) -> RangeFile:
        """A shard, opened from the cache; nobody can take it away any more."""
        while True:
            try:
                path = self.fetch(location, num_bytes, sha256)
            except BusyError:
                self._count(bypassed=1)
                return open_file(location, self._storage, self._on_retry)
            try:
                return open_file(Location(str(path)), StorageConfig(self._storage.timeout_seconds, ()))
            except StorageError as error:
                if not error.missing:
                    raise
                # evicted since: rare, as the newest entry is the last to go

    def fetch(self, location: Location, num_bytes: int, sha256: str) -> Path:
        """The path of a local file with exactly these bytes, which another job may evict at any time.

        BusyError where another process holds the shard, or the room for it, and stands still.
        """
        if not _ENTRY.fullmatch(sha256):
            raise DataError(f"{location}: its sha256 in the index is not one; index the shards again")
        if num_bytes > self.config.max_bytes:
            raise DataError(
                f"{location}: {num_bytes} bytes do not fit in a cache of {self.config.max_bytes} bytes; "
                "raise the cache's size, or do without it"
            )
        entry = self.config.folder / sha256
        while not _touch(entry, num_bytes):
            part = _lock(_part_of(entry), os.O_CREAT, self._storage.timeout_seconds)
            if part is None:
                continue  # its writer has just finished
            try:
                if not _touch(entry, num_bytes):
                    self._fill(entry, part, location, num_bytes)
                    self._count(misses=1)
                    return entry
                _part_of(entry).unlink()
            finally:
                os.close(part)
        self._count(hits=1)
        return entry

    def drop(self, sha256: str) -> None:
        """Remove an entry if its bytes are damaged by now, so that the next to open it fetches it again.

        Whoever has it open reads on in the old file, and should open it anew.
        """
        if not _ENTRY.fullmatch(sha256):
            return
        entry = self.config.folder / sha256
        try:
            with entry.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    return  # sound, or already fetched again by another
        except FileNotFoundError:
            return
        except OSError:
            pass  # the disk cannot read it
        entry.unlink(missing_ok=True)
        self._count(dropped=1)

    def _fill(self, entry: Path, part: int, location: Location, num_bytes: int) -> None:
        """Download a shard into a part that is locked, and make it an entry."""
        try:
            with self._locked():
                entry.unlink(missing_ok=True)  # of a wrong size, or written to by someone
                os.ftruncate(part, 0)  # what a dead writer left
            self._reserve(location, part, num_bytes)
            self._download(location, part, num_bytes, entry.name)
            self._keep(location, part, num_bytes)
            os.utime(part, ns=(time.time_ns(), FINISHED_NS))
            _part_of(entry).rename(entry)
        except BaseException:
            _part_of(entry).unlink(missing_ok=True)  # no other process, as it is still locked
            raise

    def _reserve(self, location: Location, part: int, num_bytes: int) -> None:
        """Take up the space of a whole shard; evicts the least recently used ones, or waits for writers."""
        before: list[tuple[str, int, int]] | None = None
        end = 0.0
        while True:
            with self._locked():
                unfinished = self._sweep()
                unfinished_bytes = sum(size for _, size, _ in unfinished)
                entries = self._entries()
                used_bytes = unfinished_bytes + sum(size for _, size, _ in entries)
                while used_bytes + num_bytes > self.config.max_bytes and entries:
                    used_bytes -= self._evict(entries)
                if used_bytes + num_bytes <= self.config.max_bytes:
                    while not _allocate(part, num_bytes):
                        if not entries:
                            break
                        self._evict(entries)
                    else:
                        return
                    if not unfinished_bytes:
                        raise _disk_full(location, num_bytes, self.config.folder)
            if unfinished != before:  # a writer got further
                before, end = unfinished, time.monotonic() + self._storage.timeout_seconds
            if time.monotonic() >= end:
                raise BusyError
            time.sleep(WAIT_SECONDS)

    def _keep(self, location: Location, part: int, num_bytes: int) -> None:
        """Have the bytes on the disk before the name: a machine that goes down leaves no entry of zeros."""
        try:
            os.fsync(part)
        except OSError as error:
            if error.errno in _FULL:
                raise _disk_full(location, num_bytes, self.config.folder) from error
            raise

    def _download(self, location: Location, part: int, num_bytes: int, sha256: str) -> None:
        found = ""
        for number in range(NUM_DOWNLOADS):
            if number and self._on_retry is not None:
                self._on_retry(f"{location}: came with sha256 {found}")
            found = self._copy(location, part, num_bytes)
            if found == sha256:
                return
        raise StorageError(
            f"{location}: came {NUM_DOWNLOADS} times with other bytes than its index says (sha256 {found} "
            f"instead of {sha256}); restore the shard, or index the shards again",
            permanent=True,
        )

    def _copy(self, location: Location, part: int, num_bytes: int) -> str:
        """Write a shard into `part`; the sha256 of what came."""
        digest = hashlib.sha256()
        with open_file(location, self._storage, self._on_retry) as file:
            if file.num_bytes != num_bytes:
                raise StorageError(
                    f"{location}: {file.num_bytes} bytes instead of the {num_bytes} of its index; "
                    "restore the shard, or index the shards again",
                    permanent=True,
                )
            for begin in range(0, num_bytes, PIECE_BYTES):
                piece = file.read(begin, begin + PIECE_BYTES)
                digest.update(piece)
                self._count(fetched=len(piece))
                try:
                    _write(part, piece, begin)
                except OSError as error:
                    if error.errno in _FULL:
                        raise _disk_full(location, num_bytes, self.config.folder) from error
                    raise
        return digest.hexdigest()

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each finished entry, the least recently used first."""
        found = []
        for path in self.config.folder.iterdir():
            if _ENTRY.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_atime_ns, status.st_size, path))
        return sorted(found)

    def _evict(self, entries: list[tuple[int, int, Path]]) -> int:
        _, num_bytes, path = entries.pop(0)
        path.unlink(missing_ok=True)
        self._count(evicted=1)
        return num_bytes

    def _sweep(self) -> list[tuple[str, int, int]]:
        """Remove what dead writers left; (name, bytes, time of last write) of what living ones take up."""
        unfinished = []
        for path in self.config.folder.iterdir():
            if not _PART.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):  # just finished, so it is an entry now
                try:
                    part = _lock(path, 0, 0.0)
                except BusyError:
                    if num_bytes := (status := path.stat()).st_size:  # else it waits for room, as we may
                        unfinished.append((path.name, num_bytes, status.st_mtime_ns))
                    continue
                if part is not None:
                    path.unlink(missing_ok=True)
                    os.close(part)
        return sorted(unfinished)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes that use the folder."""
        lock = os.open(self.config.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _wait_for(lock, self._storage.timeout_seconds)
            yield
        finally:
            os.close(lock)

    def _count(
        self,
        hits: int = 0,
        misses: int = 0,
        evicted: int = 0,
        dropped: int = 0,
        bypassed: int = 0,
        fetched: int = 0,
    ) -> None:
        with self._counting:
            self.num_hits += hits
            self.num_misses += misses
            self.num_evicted += evicted
            self.num_dropped += dropped
            self.num_bypassed += bypassed
            self.bytes_fetched += fetched


def _part_of(entry: Path) -> Path:
    return entry.with_name(entry.name + PART_SUFFIX)


def _make_private(folder: Path) -> None:
    """A folder that others can read or write would let them change what we train on."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise DataError(f"{folder}: cannot be a cache ({error.strerror}); name another folder") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise DataError(
            f"{folder}: is open to other users (mode {status.st_mode & 0o777:o}); "
            f"name a folder that does not exist yet, such as {folder}/shards-of-mine"
        )


def _touch(entry: Path, num_bytes: int) -> bool:
    """Whether an entry is there as it was finished; marks it as used now.

    The time of use is kept as the access time, set by hand: readers watch the time of change.
    """
    try:
        status = entry.stat()
        if (status.st_size, status.st_mtime_ns) != (num_bytes, FINISHED_NS):
            return False
        os.utime(entry, ns=(time.time_ns(), FINISHED_NS))
    except FileNotFoundError:
        return False
    return True


def _wait_for(descriptor: int, timeout_seconds: float) -> None:
    """Lock a file, as soon as nobody else has; BusyError once it did not change for so long."""
    pause_seconds, end, before = 0.001, 0.0, None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            status = os.fstat(descriptor)
        if (now := (status.st_size, status.st_mtime_ns)) != before:
            before, end = now, time.monotonic() + timeout_seconds
        if time.monotonic() >= end:
            raise BusyError
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, WAIT_SECONDS)


def _lock(path: Path, flags: int, timeout_seconds: float) -> int | None:
    """A descriptor of a file that nobody else has locked; None if the file went away while we waited."""
    part = os.open(path, os.O_RDWR | flags, 0o600)
    kept = False
    try:
        _wait_for(part, timeout_seconds)
        kept = os.path.samestat(os.fstat(part), path.stat())
    except FileNotFoundError:
        pass
    finally:
        if not kept:
            os.close(part)
    return part if kept else None


def _allocate(part: int, num_bytes: int) -> bool:
    """Whether the disk has room for so many bytes; then they are ours."""
    try:
        if num_bytes:
            os.posix_fallocate(part, 0, num_bytes)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        os.ftruncate(part, 0)
        return False
    return True


def _write(part: int, data: bytes, begin: int) -> None:
    rest = memoryview(data)
    while rest:
        num_written = os.pwrite(part, rest, begin)
        rest, begin = rest[num_written:], begin + num_written


def _disk_full(location: Location, num_bytes: int, folder: Path) -> DataError:
    return DataError(
        f"{folder}: no room on the disk for {location} ({num_bytes} bytes); free some, or name another folder"
    )
