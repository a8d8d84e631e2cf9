"""The list of a source's images: where the bytes of each lie, its label, its name.

It is written to disk while the source is read and then mapped into memory by every worker, so it costs disk
and page cache, not heap: 40 bytes an image plus its name (and its JSON, where one is kept). Sources that can
only be read in sequence (compressed tars, parquet, arrays) are copied once into a spool file beside the list,
which costs the bytes of their images again until the build is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import DataError

NO_LABEL = -1
OWN_FILE = 0xFFFFFFFF  # place of an item that is a file of its own, found by its name
ITEM = np.dtype(
    [
        ("place", "<u4"),  # number of the container, or OWN_FILE
        ("offset", "<u8"),
        ("num_bytes", "<u8"),
        ("label", "<i4"),
        ("name_end", "<u8"),  # names and notes lie one behind the other
        ("note_end", "<u8"),
    ]
)
_PACK = struct.Struct("<IQQiQQ").pack
_WRITE_BYTES = 1 << 20
_ITEMS, _NAMES, _NOTES, _SPOOL, _HEAD = "items.bin", "names.bin", "notes.bin", "spool.bin", "listing.json"


@dataclass(frozen=True)
class Container:
    """A file that holds many items."""

    path: Path
    holds_samples: bool = False  # an item is a stretch of tar with all members of a sample, not an image


@dataclass(frozen=True)
class SplitItems:
    """A split's items: they lie one behind the other in the list."""

    name: str
    first: int
    num_items: int


@dataclass(frozen=True)
class Item:
    """One image of the source."""

    name: str
    place: int
    offset: int
    num_bytes: int
    label: int | None
    note: bytes  # JSON that goes with the image


class ListingWriter:
    """Takes a source's items one after the other, split by split."""

    def __init__(self, folder: Path, root: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.root = root
        self.class_names: tuple[str, ...] = ()
        self.skipped: Counter[str] = Counter()  # what was not taken for an image, by kind
        self._containers: list[Container] = []
        self._splits: list[SplitItems] = []
        self._num_items = self._name_end = self._note_end = self._spool_end = 0
        self._spool_place: int | None = None
        self._digest = hashlib.sha256()
        self._files: dict[str, BinaryIO] = {
            name: (folder / name).open("wb", buffering=_WRITE_BYTES)
            for name in (_ITEMS, _NAMES, _NOTES, _SPOOL)
        }

    def begin_split(self, name: str) -> None:
        if any(split.name == name for split in self._splits):
            raise AssertionError(f"split {name} is listed in one piece")
        self._splits.append(SplitItems(name, self._num_items, 0))

    def container(self, path: Path, holds_samples: bool = False) -> int:
        self._containers.append(Container(path.absolute(), holds_samples))
        return len(self._containers) - 1

    def add(
        self,
        name: str,
        num_bytes: int,
        place: int = OWN_FILE,
        offset: int = 0,
        label: int = NO_LABEL,
        note: bytes = b"",
        stamp: int = 0,
    ) -> None:
        """List an image. `stamp` changes when a file does, and so tells that a build cannot go on."""
        encoded = os.fsencode(name)
        self._name_end += len(encoded)
        self._note_end += len(note)
        record = _PACK(place, offset, num_bytes, label, self._name_end, self._note_end)
        self._files[_ITEMS].write(record)
        self._files[_NAMES].write(encoded)
        self._files[_NOTES].write(note)
        self._digest.update(record + encoded + note + struct.pack("<q", stamp))
        self._num_items += 1
        last = self._splits[-1]
        self._splits[-1] = SplitItems(last.name, last.first, self._num_items - last.first)

    def spool(self, data: bytes, holds_samples: bool = False) -> tuple[int, int]:
        """Keep bytes that cannot be read again where they are: (place, offset) of the copy."""
        if self._spool_place is None:
            self._containers.append(Container(Path(_SPOOL), holds_samples))  # moves with the list
            self._spool_place = len(self._containers) - 1
        offset = self._spool_end
        self._files[_SPOOL].write(data)
        self._spool_end += len(data)
        return self._spool_place, offset

    def finish(self) -> None:
        self.close()
        head = {
            "root": str(self.root.absolute()),
            "containers": [[str(item.path), item.holds_samples] for item in self._containers],
            "splits": [[split.name, split.first, split.num_items] for split in self._splits],
            "class_names": list(self.class_names),
            "skipped": dict(sorted(self.skipped.items())),
        }
        empty = [split.name for split in self._splits if not split.num_items]
        if empty or not self._splits:
            skipped = f" ({describe_skipped(self.skipped)})" if self.skipped else ""
            raise DataError(
                f"{self.root}: no images in split {empty[0] if empty else 'train'}{skipped}; give a source "
                "that holds JPEG, PNG or WebP images"
            )
        self._digest.update(json.dumps([head["splits"], head["class_names"]]).encode())
        head["sha256"] = self._digest.hexdigest()
        (self.folder / _HEAD).write_text(json.dumps(head), encoding="utf-8")

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Listing:
    """A finished list, read from disk as it is needed."""

    folder: Path
    root: Path
    containers: tuple[Container, ...]
    splits: tuple[SplitItems, ...]
    class_names: tuple[str, ...]
    skipped: dict[str, int]
    sha256: str

    @classmethod
    def load(cls, folder: Path) -> Listing:
        head = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
        return cls(
            folder,
            Path(head["root"]),
            tuple(Container(folder / path, holds_samples) for path, holds_samples in head["containers"]),
            tuple(SplitItems(*split) for split in head["splits"]),
            tuple(head["class_names"]),
            head["skipped"],
            head["sha256"],
        )

    @cached_property
    def items(self) -> NDArray[np.void]:
        return np.memmap(self.folder / _ITEMS, dtype=ITEM, mode="r")

    def source_bytes(self, split: SplitItems) -> int:
        """Bytes of a split's items, added up in pieces so that the list is never in memory at once."""
        stop = split.first + split.num_items
        return sum(
            int(self.items["num_bytes"][begin : min(begin + (1 << 20), stop)].sum())
            for begin in range(split.first, stop, 1 << 20)
        )

    def item(self, index: int) -> Item:
        row = self.items[index]
        before = self.items[index - 1] if index else None
        name = self._slice(_NAMES, int(before["name_end"]) if before is not None else 0, int(row["name_end"]))
        note = self._slice(_NOTES, int(before["note_end"]) if before is not None else 0, int(row["note_end"]))
        label = int(row["label"])
        return Item(
            name=os.fsdecode(name),
            place=int(row["place"]),
            offset=int(row["offset"]),
            num_bytes=int(row["num_bytes"]),
            label=None if label == NO_LABEL else label,
            note=note,
        )

    def read(self, item: Item) -> bytes:
        """The bytes of an item, exactly as many as were listed."""
        if item.place == OWN_FILE:
            path = self.root / item.name
            try:
                data = path.read_bytes()
            except OSError as error:
                raise _unreadable(path, error) from error
        else:
            path = self.containers[item.place].path
            data = self._pread(path, item.num_bytes, item.offset)
        if len(data) != item.num_bytes:
            raise DataError(
                f"{path}: changed while the build ran ({item.name!r} had {item.num_bytes} bytes); "
                "leave the source alone and build into a new folder"
            )
        return data

    def _slice(self, name: str, begin: int, end: int) -> bytes:
        return self._pread(self.folder / name, end - begin, begin) if end > begin else b""

    def _pread(self, path: Path, num_bytes: int, offset: int) -> bytes:
        try:
            descriptor = self._descriptors.get(path)
            if descriptor is None:
                if len(self._descriptors) >= 128:  # a source of thousands of shards must not use up all
                    os.close(self._descriptors.pop(next(iter(self._descriptors))))
                descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
            pieces = []
            while num_bytes and (piece := os.pread(descriptor, num_bytes, offset)):
                pieces.append(piece)  # one read stops at 2 GiB
                num_bytes, offset = num_bytes - len(piece), offset + len(piece)
            return b"".join(pieces)
        except OSError as error:
            raise _unreadable(path, error) from error

    @cached_property
    def _descriptors(self) -> dict[Path, int]:
        return {}

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def describe_skipped(skipped: dict[str, int]) -> str:
    return "not images: " + ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); mend it and run the command again")
