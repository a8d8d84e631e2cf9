"""The columns of an index as they lie in their file: what each must be, whoever wrote it.

The hash in `index.json` shows that the columns are those that were written, not that they make sense. All is
checked for all shards at once, as there may be a million of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pretrain.data.columns import SampleColumns

SHARD_COLUMNS = {  # name -> kind of number; in the order in which they are hashed
    "names": "U8",
    "name_ends": "I64",
    "num_bytes": "I64",
    "num_samples": "I64",
    "data_bytes": "I64",
    "sha256": "U8",
    "split": "U8",
    "digests": "U64",
}
SAMPLE_COLUMNS = {
    "starts": "I64",
    "image_begins": "U32",
    "image_bytes": "U32",
    "hashes": "U64",
    "labels": "I32",
}
SHA256_BYTES = 32
MAX_SUM = 2**62  # so that no sum of a column runs over
_CONTINUES, _DOT, _SLASH, _SPACE, _DELETE = 0x80, ord("."), ord("/"), ord(" "), 0x7F


def read_shard_columns(path: Path, num_splits: int) -> dict[str, NDArray[Any]]:
    """The columns of the shards; ValueError with what is wrong with them, or with those of the samples."""
    with safe_open(path, framework="numpy") as file:
        num_shards = _length(file, "shards.num_samples")
        for name, kind in SHARD_COLUMNS.items():
            length = _length(file, "shards.names") if name == "names" else num_shards
            _check_form(file, f"shards.{name}", kind, [length, SHA256_BYTES][: 1 + (name == "sha256")])
        columns = {name: file.get_tensor(f"shards.{name}") for name in SHARD_COLUMNS}
        _check_numbers(columns, num_splits)
        _check_names(columns["names"], columns["name_ends"])
        num_samples = int(columns["num_samples"].sum())
        for name, kind in SAMPLE_COLUMNS.items():
            _check_form(file, f"samples.{name}", kind, [num_samples + num_shards * (name == "starts")])
    return columns


def are_in_order(samples: SampleColumns) -> bool:
    """Whether the samples of a shard follow each other, each with its image inside."""
    starts = samples.starts
    if starts[0] < 0 or not (starts[1:] > starts[:-1]).all():
        return False
    image_ends = samples.image_begins.astype(np.int64) + samples.image_bytes
    return bool((image_ends <= np.diff(starts)).all())


def _length(file: Any, name: str) -> int:
    shape = file.get_slice(name).get_shape()
    return int(shape[0]) if shape else 0


def _check_form(file: Any, name: str, kind: str, shape: list[int]) -> None:
    column = file.get_slice(name)
    found = column.get_dtype(), list(column.get_shape())
    if found != (kind, shape):
        raise ValueError(f"{name} is {found[0]} {found[1]} instead of {kind} {shape}")


def _check_numbers(columns: dict[str, NDArray[Any]], num_splits: int) -> None:
    if not len(columns["num_samples"]):
        raise ValueError("there are no shards")
    for name, least in (("num_samples", 1), ("num_bytes", 0), ("data_bytes", 0)):
        column = columns[name]
        if column.min() < least or column.sum(dtype=np.float64) >= MAX_SUM:
            raise ValueError(f"shards.{name} goes from {column.min()} to {column.max()}")
    if columns["split"].max() >= num_splits:
        raise ValueError(f"a shard is of split {columns['split'].max()}, and there are {num_splits}")


def _check_names(names: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
    """Each name is UTF-8 text, and that of a file below the folder."""
    if ends[0] < 1 or not (ends[1:] > ends[:-1]).all() or ends[-1] != len(names):
        raise ValueError("shards.name_ends does not cut shards.names into names")
    names.tobytes().decode("utf-8")  # UnicodeDecodeError is a ValueError
    begins = np.concatenate(([0], ends[:-1]))
    if (names[begins] & 0xC0 == _CONTINUES).any():
        raise ValueError("shards.name_ends cuts a character in two")
    slashes = np.flatnonzero(names == _SLASH)
    part_begins, part_ends = (
        np.sort(np.concatenate(pair)) for pair in ((begins, slashes + 1), (ends, slashes))
    )
    first, last = names[np.minimum(part_begins, len(names) - 1)], names[part_ends - 1]
    lengths = part_ends - part_begins
    is_dots = (lengths <= 2) & (first == _DOT) & (last == _DOT)
    if (lengths == 0).any() or is_dots.any() or ((names < _SPACE) | (names == _DELETE)).any():
        raise ValueError("a shard's name is not that of a file below the folder")
