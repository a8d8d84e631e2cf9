"""The one place where shards are opened: local files and remote ones, with deadlines, retries and checks.

Every read ends in time: with its bytes, or with a StorageError once the retries are used up. A file that
changes after it was opened is an error, never a mixture of old and new bytes.
"""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Protocol, TypeVar, cast

from pretrain.data.deadline import DeadlineError, in_time
from pretrain.data.local import LocalFile
from pretrain.data.location import Location, StorageError, parse_location, replaced
from pretrain.data.remote import list_remote, load_package, open_remote
from pretrain.errors import ConfigError, DataError

__all__ = [
    "Location",
    "RangeFile",
    "StorageConfig",
    "StorageError",
    "list_names",
    "open_file",
    "open_stream",
    "parse_location",
    "read_bytes",
]

LOCAL_PIECE_BYTES = 2**20  # of a stream
REMOTE_PIECE_BYTES = 2**23  # one request each
_PERMANENT_ERRNO = {
    errno.EACCES,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
}

T = TypeVar("T")
OnRetry = Callable[[str], None]  # gets the problem; may be called from several threads


@dataclass(frozen=True)
class StorageConfig:
    """How long storage may keep us waiting."""

    timeout_seconds: float = 60.0  # for each single read
    retry_seconds: tuple[float, ...] = (0.1, 1.0, 5.0)  # waits before a failed read is tried again

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds < float("inf"):
            raise ConfigError(f"timeout_seconds: {self.timeout_seconds} is not above 0; use 60")
        if not all(0 <= seconds < float("inf") for seconds in self.retry_seconds):
            raise ConfigError(f"retry_seconds: {self.retry_seconds} has a wait below 0; use [0.1, 1.0, 5.0]")


class _OpenFile(Protocol):
    """What a kind of storage must offer; all of it may block."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def stamp(self) -> object: ...  # equal as long as the file is the same

    def reader(self, begin: int, end: int) -> Callable[[], bytes]: ...

    def close(self) -> None: ...


class RangeFile:
    """An open file of which any range of bytes can be read, from any thread."""

    def __init__(
        self, location: Location, config: StorageConfig = StorageConfig(), on_retry: OnRetry | None = None
    ) -> None:
        self.location = location
        self._config = config
        self._on_retry = on_retry
        self._lock = threading.Lock()
        self._file: _OpenFile | None = None
        self._closed = False
        self._stamp: object = None
        self.num_bytes = self._retried(self._current).num_bytes

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end` (excluded); fewer only where the file ends before."""
        if begin < 0:
            raise ValueError(f"a range begins at {begin}")
        end = min(end, self.num_bytes)
        return self._retried(lambda: self._read_once(begin, end)) if begin < end else b""

    def close(self) -> None:
        self._closed = True
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()

    def __enter__(self) -> RangeFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _retried(self, attempt: Callable[[], T]) -> T:
        return _retried(self.location, self._config, self._on_retry, attempt)

    def _read_once(self, begin: int, end: int) -> bytes:
        file = self._current()
        try:
            data = in_time(file.reader(begin, end), self._config.timeout_seconds)
            if len(data) != end - begin:
                raise StorageError(f"{self.location}: gave {len(data)} bytes instead of {end - begin}")
        except Exception:
            with self._lock:  # the next try opens it anew
                if self._file is file:
                    self._file = None
            file.close()
            raise
        return data

    def _current(self) -> _OpenFile:
        """The file as it is open, or newly opened."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.location}: is closed")
            if self._file is None:
                file = _open_once(self.location, self._config.timeout_seconds)
                if self._stamp is not None and file.stamp != self._stamp:
                    file.close()
                    raise replaced(self.location, f"{self._stamp} is now {file.stamp}")
                self._file, self._stamp = file, file.stamp
            return self._file


def open_file(
    location: Location, config: StorageConfig = StorageConfig(), on_retry: OnRetry | None = None
) -> RangeFile:
    return RangeFile(location, config, on_retry)


def open_stream(
    location: Location, config: StorageConfig = StorageConfig(), on_retry: OnRetry | None = None
) -> BinaryIO:
    """A file to read from its front, in large pieces; each piece is retried alone, so a break costs one."""
    file = open_file(location, config, on_retry)
    piece_bytes = LOCAL_PIECE_BYTES if location.is_local else REMOTE_PIECE_BYTES
    return cast(BinaryIO, io.BufferedReader(_Pieces(file, piece_bytes)))


def read_bytes(
    location: Location,
    config: StorageConfig = StorageConfig(),
    max_bytes: int | None = None,
    on_retry: OnRetry | None = None,
) -> bytes:
    """A small file as a whole. A file that is not there is told at once, without retries."""

    def attempt() -> RangeFile:
        try:
            return RangeFile(location, StorageConfig(config.timeout_seconds, ()))
        except StorageError as error:
            error.permanent |= error.missing
            raise

    with _retried(location, config, on_retry, attempt) as file:
        if max_bytes is not None and file.num_bytes > max_bytes:
            raise StorageError(f"{location}: {file.num_bytes} bytes, more than {max_bytes}", permanent=True)
        return _retried(location, config, on_retry, lambda: file.read(0, file.num_bytes))


def list_names(
    location: Location, config: StorageConfig = StorageConfig(), on_retry: OnRetry | None = None
) -> list[str]:
    """Names of the files directly in a folder, sorted."""
    if location.scheme in ("http", "https"):
        raise DataError(
            f"{location}: a web server cannot be asked for its files; it needs an index.json there"
        )

    def task() -> list[str]:
        if not location.is_local:
            return list_remote(location, config.timeout_seconds)
        with os.scandir(location.path) as entries:
            return [entry.name for entry in entries if entry.is_file()]

    def attempt() -> list[str]:
        if not location.is_local:
            load_package(location)
        try:
            return in_time(task, config.timeout_seconds)
        except FileNotFoundError as error:
            raise StorageError(
                f"{location}: there is no such folder", permanent=True, missing=True
            ) from error

    return sorted(_retried(location, config, on_retry, attempt))


class _Pieces(io.RawIOBase):
    """A RangeFile as a stream that holds one piece of it."""

    def __init__(self, file: RangeFile, piece_bytes: int) -> None:
        self._file = file
        self._piece_bytes = piece_bytes
        self._place = 0
        self._piece = b""
        self._piece_begin = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.num_bytes}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._piece_begin <= self._place < self._piece_begin + len(self._piece):
            self._piece = self._file.read(self._place, self._place + self._piece_bytes)
            self._piece_begin = self._place
        start = self._place - self._piece_begin
        data = self._piece[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_once(location: Location, timeout_seconds: float) -> _OpenFile:
    def task() -> _OpenFile:
        return LocalFile(location) if location.is_local else open_remote(location, timeout_seconds)

    if not location.is_local:
        load_package(location)
    return in_time(task, timeout_seconds, late=lambda file: file.close())


def _retried(
    location: Location, config: StorageConfig, on_retry: OnRetry | None, attempt: Callable[[], T]
) -> T:
    """The outcome of the first try that succeeds; a StorageError after the last, or at once if permanent."""
    for wait_seconds in (*config.retry_seconds, None):
        try:
            return attempt()
        except (StorageError, DeadlineError, OSError) as error:
            problem = _storage_error(location, error)
            if wait_seconds is None or problem.permanent:
                if problem is error:
                    raise
                raise problem from error
            if on_retry is not None:
                on_retry(str(problem))
            time.sleep(max(wait_seconds, problem.retry_after_seconds))
    raise AssertionError("the last try returns or raises")


def _storage_error(location: Location, error: Exception) -> StorageError:
    if isinstance(error, StorageError):
        return error
    if isinstance(error, OSError):
        reason = (error.strerror or str(error)).lower()
        missing = isinstance(error, FileNotFoundError)  # may come back, so worth another try
        lasting = error.errno in _PERMANENT_ERRNO
        return StorageError(
            f"{location}: cannot be read ({reason}); check the storage", permanent=lasting, missing=missing
        )
    return StorageError(f"{location}: {error}; check the storage")
