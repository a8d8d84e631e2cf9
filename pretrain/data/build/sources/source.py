"""What every kind of source tells of itself before an image is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.build.listing import ListingWriter
from pretrain.data.build.settings import BuildRequest
from pretrain.errors import DataError

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Source:
    """A source that was found, not yet read."""

    kind: str
    root: Path
    splits: tuple[str, ...]
    list_items: Callable[[ListingWriter], None]
    files: tuple[Path, ...] = ()  # an unfinished build goes on only while these are as they were
    lists_quickly: bool = False  # listing it again is the way to see that it has not changed
    spool_bytes: int = 0  # disk for a copy of what cannot be read in any order
    notes: tuple[str, ...] = ()  # lines for the user


def default_split(request: BuildRequest, path: Path) -> str:
    """--split, else the split that the name of SOURCE is, else train."""
    return request.split or SPLIT_WORDS.get(path.absolute().name.lower(), "train")


def refuse_split(request: BuildRequest, splits: list[str]) -> None:
    if request.split is not None:
        raise DataError(
            f"{request.source}: holds the splits {', '.join(splits)}, so --split {request.split} has no "
            "meaning; leave it out, or give the folder or file of one split"
        )


def split_word(name: str, default: str) -> str:
    """The split that a file name speaks of: its first word that is one."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), default)


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key under which part-2 comes before part-10."""
    parts = re.split("([0-9]+)", path.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def read_class_names(folder: Path) -> tuple[str, ...]:
    """classes.txt: one class a line; of a line with tabs (index, id, name) the last field."""
    path = folder / "classes.txt"
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.split("\t")[-1].strip() for line in lines if line.strip())
