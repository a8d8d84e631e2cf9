"""Range reads of a regular file of the local file system (or of one that is mounted)."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable

from pretrain.data.location import Location, StorageError, replaced


class LocalFile:
    """A regular file. Each read has its own descriptor, so one left behind never meets a reused number."""

    def __init__(self, location: Location) -> None:
        self._location = location
        if not stat.S_ISREG(location.path.stat().st_mode):  # else opening a FIFO would wait for its writer
            raise StorageError(f"{location}: is not a regular file", permanent=True)
        self._file = location.path.open("rb", buffering=0)
        self._lock = threading.Lock()
        self.stamp = self._stamp_of(self._file.fileno())
        self.num_bytes = self.stamp[0]

    def reader(self, begin: int, end: int) -> Callable[[], bytes]:
        with self._lock:
            if self._file.closed:
                raise OSError(errno.EBADF, "closed after another reader met an error")
            descriptor = os.dup(self._file.fileno())

        def read() -> bytes:
            try:
                data = _pread(descriptor, begin, end)
                stamp = self._stamp_of(descriptor)
            finally:
                os.close(descriptor)
            if stamp != self.stamp:
                raise replaced(self._location, f"{self.stamp} is now {stamp}")
            return data

        return read

    def close(self) -> None:
        with self._lock:
            self._file.close()

    @staticmethod
    def _stamp_of(descriptor: int) -> tuple[int, int]:
        """(bytes, time of last change in ns)"""
        status = os.fstat(descriptor)
        return status.st_size, status.st_mtime_ns


def _pread(descriptor: int, begin: int, end: int) -> bytes:
    """The kernel may give less than asked, and gives nothing at the end."""
    data = os.pread(descriptor, end - begin, begin)
    while len(data) < end - begin:
        more = os.pread(descriptor, end - begin - len(data), begin + len(data))
        if not more:
            break
        data += more
    return data
