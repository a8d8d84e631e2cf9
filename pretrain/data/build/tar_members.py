"""Where the members of a tar lie, read from its headers alone, also of a tar inside another file."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.errors import DataError

END_MARKER_BYTES = 2 * tarfile.BLOCKSIZE
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class TarMember:
    """A plain file in a tar; offsets count from the start of the outer file."""

    name: str
    offset: int  # of its first header
    data_offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.data_offset + -(-self.num_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def list_members(
    file: BinaryIO, path: Path, begin: int, num_bytes: int, what: str = ""
) -> Iterator[TarMember]:
    """The plain files of the tar that fills `num_bytes` of a file from `begin` on, and proof of its end.

    The standard library takes a damaged header for the end; here the end marker must follow the last member,
    and nothing but zeros may follow it.
    """
    where = f"{path}: {what}: " if what else f"{path}: "
    window = _Window(file, begin, num_bytes)
    end = 0
    try:
        with tarfile.open(fileobj=window, mode="r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # the list would grow with the archive
                end = info.offset_data
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise DataError(f"{where}member {info.name!r} is not a plain file; pack plain files only")
                member = TarMember(info.name, begin + info.offset, begin + info.offset_data, info.size)
                end = member.end - begin
                if end > num_bytes:
                    raise _damaged(where, f"cut short in member {info.name!r}")
                yield member
    except tarfile.TarError as error:
        raise _damaged(where, str(error)) from error
    except OSError as error:
        raise DataError(f"{where}cannot be read ({error.strerror or error}); check the storage") from error
    if num_bytes - end < END_MARKER_BYTES or not _is_zero(window, end):
        raise _damaged(where, f"no end-of-archive marker at byte {begin + end}")


def _is_zero(window: _Window, begin: int) -> bool:
    window.seek(begin)
    while data := window.read(_READ_BYTES):
        if data.count(0) != len(data):
            return False
    return True


def _damaged(where: str, problem: str) -> DataError:
    return DataError(f"{where}damaged or cut short ({problem}); fetch this archive again")


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, num_bytes: int) -> None:
        self._file, self._begin, self._num_bytes, self._place = file, begin, num_bytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        self._place = origin + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._place)
        self._file.seek(self._begin + self._place)
        data = self._file.read(left if size < 0 else min(size, left))
        self._place += len(data)
        return data
