"""A folder of images: with one sub-folder per class (sorted names are the labels), or flat and unlabelled.

Where all sub-folders are called train, val or test they are splits, with one list of classes. Hidden files
and files that are not JPEG, PNG or WebP are counted and left out. A symbolic link is followed while it stays
in SOURCE; one that leads out of it is refused unless `follow_symlinks` says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.build.listing import NO_LABEL, ListingWriter
from pretrain.data.build.settings import BuildRequest
from pretrain.data.build.sources.source import SPLIT_WORDS, Source, default_split, refuse_split
from pretrain.data.scan import IMAGE_EXTENSIONS
from pretrain.errors import DataError


@dataclass(frozen=True)
class _Walk:
    """How a folder is walked: where links may lead, and who counts what is left out."""

    root: Path
    follow_symlinks: bool
    writer: ListingWriter


def find(request: BuildRequest) -> Source:
    root = Path(request.source)
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; give the folder that holds the images")
    folders = sorted(entry.name for entry in _entries(root) if _is_folder(entry))
    named = [name for name in folders if name.lower() in SPLIT_WORDS]
    if named and len(named) < len(folders) and "train" in (name.lower() for name in named):
        others = [name for name in folders if name not in named]
        raise DataError(
            f"{root}: '{named[0]}' is a split but '{others[0]}' beside it is not; "
            f"give the folder of one split, such as {root / named[0]}"
        )
    is_split = bool(named) and len(named) == len(folders)
    places = {SPLIT_WORDS[name.lower()]: name for name in named} if is_split else {}
    if is_split and len(places) < len(named):
        raise DataError(f"{root}: {', '.join(named)} name one split twice; give the folder of one split")
    if is_split:
        refuse_split(request, list(places))
    else:
        places = {default_split(request, root): ""}
    order = sorted(places, key=("train", "val", "test", *places).index)

    def list_items(writer: ListingWriter) -> None:
        walk = _Walk(root, request.follow_symlinks, writer)
        kinds = {split: _class_folders(root / places[split], request.labels) for split in order}
        writer.class_names = tuple(sorted({name for names in kinds.values() for name in names or ()}))
        for split in order:
            writer.begin_split(split)
            _list_split(walk, root / places[split], kinds[split])

    notes = () if request.labels else ("labels are left out, as asked",)
    return Source("folder", root, tuple(order), list_items, lists_quickly=True, notes=notes)


def list_classes(writer: ListingWriter, folder: Path, follow_symlinks: bool) -> None:
    """List one folder of class folders as part of another kind of source."""
    _list_split(_Walk(writer.root, follow_symlinks, writer), folder, list(writer.class_names))


def class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry))


def _class_folders(folder: Path, labels: bool) -> list[str] | None:
    """The classes of a split; None where it is flat."""
    entries = _entries(folder)
    names = [entry.name for entry in entries if _is_folder(entry)]
    if not names or not labels:
        return None
    if (image := next((entry.name for entry in entries if _is_image(entry.name)), None)) is not None:
        raise DataError(
            f"{folder}: holds images ('{image}') and folders ('{names[0]}'), so folders cannot be classes; "
            "move one of them, or give --no-labels"
        )
    return sorted(names)


def _list_split(walk: _Walk, folder: Path, classes: list[str] | None) -> None:
    if classes is None:
        for name, status in _images(walk, folder, ()):
            walk.writer.add(name, status.st_size, label=NO_LABEL, stamp=status.st_mtime_ns)
        return
    present = set(class_folders(folder))
    for entry in _entries(folder, walk):
        if not _is_folder(entry):
            _skip(walk, entry.name)
    for name in (name for name in classes if name in present):
        label = walk.writer.class_names.index(name)
        _check_link(walk, folder / name)
        num_images = 0
        for image, status in _images(walk, folder / name, (folder.resolve(),)):
            walk.writer.add(image, status.st_size, label=label, stamp=status.st_mtime_ns)
            num_images += 1
        if not num_images:
            raise DataError(
                f"{folder / name}: a class folder without images would move the labels of all others; "
                "remove it, or give --no-labels"
            )


def _images(walk: _Walk, folder: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, os.stat_result]]:
    """All images below a folder in order of their names: (path within the root, status)."""
    real = folder.resolve()
    if real in above:
        raise DataError(f"{folder}: a symbolic link that leads round in a circle; remove it")
    for entry in _entries(folder, walk):
        path = Path(entry.path)
        if entry.is_symlink():
            _check_link(walk, path)
        if _is_folder(entry):
            yield from _images(walk, path, (*above, real))
        elif not _is_image(entry.name):
            _skip(walk, entry.name)
        elif not entry.is_file():
            walk.writer.skipped["broken links or special files"] += 1
        else:
            yield str(path.relative_to(walk.root)), entry.stat()


def _check_link(walk: _Walk, path: Path) -> None:
    if not walk.follow_symlinks and not path.resolve().is_relative_to(walk.root.resolve()):
        raise DataError(
            f"{path}: a symbolic link that leads out of {walk.root}; give --follow-symlinks if that is meant"
        )


def _entries(folder: Path, walk: _Walk | None = None) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted, without what is hidden (which is counted)."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    shown = [entry for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    if walk is not None and len(shown) < len(entries):
        walk.writer.skipped["hidden"] += len(entries) - len(shown)
    return shown


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir()


def _is_image(name: str) -> bool:
    return name.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS))


def _skip(walk: _Walk, name: str) -> None:
    suffix = Path(name).suffix.lower()
    walk.writer.skipped[suffix if suffix else "without extension"] += 1
