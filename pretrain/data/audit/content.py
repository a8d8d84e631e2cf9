"""A shard's bytes on their way to whoever takes the tar apart: unpacked, hashed, copied."""

from __future__ import annotations

import zlib
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.data.columns import SampleColumns
from pretrain.data.tar import READ_BYTES, Readable

GZIP = 31  # zlib's wbits for a gzip stream
_PACKED_BYTES = 1 << 16


class Unpacked:
    """What a gzip file holds. Where that is damaged it ends, after the last byte that could be unpacked.

    The standard library's reader would keep back up to a buffer of sound bytes before the damage.
    """

    def __init__(self, packed: Readable) -> None:
        self.problem: str | None = None
        self._source = packed
        self._inflater = zlib.decompressobj(wbits=GZIP)
        self._packed = b""
        self._unpacked = memoryview(b"")
        self._is_done = False

    def read(self, size: int, /) -> bytes:
        while not self._unpacked and not self._is_done:
            self._unpack()
        data, self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return bytes(data)

    def _unpack(self) -> None:
        packed = self._packed or self._source.read(_PACKED_BYTES)
        if self._inflater.eof:  # another stream may follow, or padding
            if packed and not (packed := packed.lstrip(b"\0")):
                self._packed = b""
                return
            if not packed:
                self._is_done = True
                return
            self._inflater = zlib.decompressobj(wbits=GZIP)
        before = self._inflater.copy()
        try:
            self._unpacked = memoryview(self._inflater.decompress(packed, READ_BYTES))
        except zlib.error as error:
            self._unpacked, self._is_done = memoryview(_all_that_unpacks(before, packed)), True
            self.problem = str(error)
            return
        self._packed = self._inflater.unused_data or self._inflater.unconsumed_tail
        if not packed and not self._unpacked and not self._inflater.eof:
            self._is_done = True
            self.problem = "it is cut short"


class SampleHashes:
    """Passes content on, and hashes the stretches that an index calls samples."""

    def __init__(self, content: Readable, columns: SampleColumns) -> None:
        self._content = content
        self._expected = columns.hashes
        self._bounds = columns.starts.tolist()
        self._hashes: list[int] = []
        self._state = xxhash.xxh3_64()
        self._place = 0  # of the next bound
        self._offset = 0

    def read(self, size: int, /) -> bytes:
        data = self._content.read(size)
        view = memoryview(data)
        while self._place < len(self._bounds) and self._bounds[self._place] <= self._offset + len(view):
            cut = max(0, self._bounds[self._place] - self._offset)
            self._state.update(view[:cut])
            if self._place:
                self._hashes.append(self._state.intdigest())
            self._state.reset()
            self._place, self._offset, view = self._place + 1, self._offset + cut, view[cut:]
        self._state.update(view)
        self._offset += len(view)
        return data

    @property
    def num_met(self) -> int:
        """How many samples were there to their end."""
        return len(self._hashes)

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """(n,): whether a sample's bytes are not those of the index, or were never met."""
        found = np.array(self._hashes, dtype=np.uint64)
        differs: NDArray[np.bool_] = np.ones(len(self._expected), dtype=np.bool_)
        differs[: len(found)] = found != self._expected[: len(found)]
        return differs


class Copied:
    """Passes content on and writes it to a file."""

    def __init__(self, content: Readable, file: BinaryIO) -> None:
        self._content = content
        self._file = file

    def read(self, size: int, /) -> bytes:
        data = self._content.read(size)
        self._file.write(data)
        return data


def _all_that_unpacks(inflater: zlib._Decompress, packed: bytes) -> bytes:
    """Bytes up to the very one that cannot be unpacked."""
    parts = []
    try:
        for place in range(len(packed)):
            parts.append(inflater.decompress(packed[place : place + 1]))
    except zlib.error:
        pass
    return b"".join(parts)
