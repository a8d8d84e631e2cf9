"""Write tar shards whose bytes depend on their content alone."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

from pretrain.data.tar import BLOCK_BYTES, END_MARKER_BYTES

_WRITE_BYTES = 1 << 20


class TarWriter:
    """A plain USTAR archive, hashed as it is written; nothing in it tells who wrote it, or when."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=_WRITE_BYTES)
        self._num_bytes = 0
        self.digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode is 0644, owners are empty
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8"))
        self._write(data)
        self._write(bytes(-len(data) % BLOCK_BYTES))

    def finish(self) -> None:
        """The end marker; then all of it lies on the disk."""
        self._write(bytes(END_MARKER_BYTES))
        self._write(bytes(-self._num_bytes % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self._num_bytes += len(data)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
