"""Files that are complete or absent, never in between."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes a path's place when it is complete, and leaves nothing otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fchmod(file.fileno(), 0o644)  # some libraries write for the owner alone
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
