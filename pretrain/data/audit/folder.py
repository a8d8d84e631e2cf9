"""A folder of shards before any of them is opened: its names, its index, its sizes files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pretrain.data import indexing
from pretrain.data.audit.finding import ERROR, NOTE, WARNING, Finding, about_folder
from pretrain.data.audit.shard import INDEX, Indexed
from pretrain.data.manifest import INDEX_NAME, Manifest
from pretrain.data.sizes_files import SizesFiles
from pretrain.data.storage import Location, StorageError, list_names
from pretrain.errors import DataError

MISSING, NOT_IN_INDEX, SIZES = "missing", "not_in_index", "sizes_file"
SAME_SHARD, CLASSES = "same_shard", "classes"


@dataclass(frozen=True)
class Folder:
    """What can be known of a folder before a shard is opened."""

    root: Location  # of the shards
    names: tuple[str, ...]  # shards to read
    splits: dict[str, str]  # shard -> split
    class_names: tuple[str, ...]
    manifest: Manifest | None
    sizes: dict[str, dict[str, int]]  # sizes file -> shard -> samples
    findings: tuple[Finding, ...]


def open_folder(location: Location) -> Folder:
    """The shards of a folder, what its index says of them, and what is wrong with the two."""
    findings: list[Finding] = []
    manifest, root = None, location
    try:
        manifest = Manifest.load(location)
        root = manifest.root
    except DataError as error:
        reason, _, remedy = str(error).removeprefix(f"{location}: ").rpartition("; ")
        is_absent = f"no {INDEX_NAME}" in reason and "cannot be read" not in reason
        findings.append(about_folder(NOTE if is_absent else ERROR, INDEX, reason, remedy))
    indexed = [] if manifest is None else [shard.name for shard in manifest.shards]
    names = _listed_names(root, manifest, indexed)
    known, sizes_problem = _sizes_files(root)
    if sizes_problem:
        findings.append(about_folder(ERROR, SIZES, sizes_problem, "mend or remove it"))
    if manifest is not None:
        again = f"restore it, or {manifest.again}"
        for name in sorted(set(indexed) - set(names), key=indexing.natural_key):
            findings.append(Finding(ERROR, MISSING, name, None, "", "is in the index, but not there", again))
        for name in sorted(set(names) - set(indexed), key=indexing.natural_key):
            reason, remedy = "is not in the index, so it is never read", f"remove it, or {manifest.again}"
            findings.append(Finding(WARNING, NOT_IN_INDEX, name, None, "", reason, remedy))
    findings += _same_shards(names)
    splits = {name: known.splits.get(name) or indexing.split_of(name) for name in names}
    if manifest is not None:
        for split in manifest.split_names:
            splits.update((shard.name, split) for shard in manifest.split(split).shards)
    class_names = tuple(indexing.class_names(root))
    if manifest is not None:
        if class_names and manifest.class_names != class_names:
            reason = f"{indexing.CLASSES_NAME} is not what was indexed"
            findings.append(about_folder(ERROR, CLASSES, reason, manifest.again))
        class_names = class_names or manifest.class_names
    return Folder(root, tuple(names), splits, class_names, manifest, known.sizes, tuple(findings))


def stored_bytes(folder: Folder) -> int:
    """Bytes of all shards, as far as they can be had without opening one."""
    if folder.manifest is not None:
        return int(folder.manifest.shard_columns["num_bytes"].sum())
    if not folder.root.is_local:
        return 0
    return sum((folder.root.path / name).stat().st_size for name in folder.names)


def indexed_shards(folder: Folder) -> Iterator[Indexed | None]:
    """For each shard what the index says of it."""
    if folder.manifest is None:
        yield from (None for _ in folder.names)
        return
    places = {shard.name: shard.index for shard in folder.manifest.shards}
    for name in folder.names:
        if (place := places.get(name)) is None:
            yield None
            continue
        shard = folder.manifest.shard(place)
        try:
            yield Indexed(shard, folder.manifest.samples(shard))
        except DataError:
            yield Indexed(shard, None)


def _listed_names(root: Location, manifest: Manifest | None, indexed: Sequence[str]) -> list[str]:
    if root.scheme in ("http", "https") and manifest is not None:
        return list(indexed)  # a web server cannot be asked; a missing shard shows when it is read
    if root.is_local and not root.path.is_dir():
        raise DataError(f"{root}: no such folder; name a folder of shards")
    try:
        found = list_names(root)
    except StorageError as error:
        raise DataError(str(error)) from error
    names = [name for name in found if name.endswith(indexing.SUFFIXES) and not name.startswith(".")]
    if not names and not indexed:
        suffixes = ", ".join(indexing.SUFFIXES)
        raise DataError(f"{root}: no shards here; expected files that end in {suffixes}")
    return sorted(names, key=indexing.natural_key)


def _sizes_files(root: Location) -> tuple[SizesFiles, str]:
    try:
        return SizesFiles.read(root, {}), ""
    except (DataError, StorageError) as error:
        return SizesFiles({}, {}), str(error).removeprefix(f"{root}/").removesuffix("; mend or remove it")


def stem_of(name: str) -> str:
    """A shard's name without its ending."""
    ending = next(suffix for suffix in (".tar.gz", ".tgz", ".tar") if name.endswith(suffix))
    return name.removesuffix(ending)


def _same_shards(names: Iterable[str]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(stem_of(name), name)
        if other != name:
            yield Finding(ERROR, SAME_SHARD, name, None, "", f"{other} is there too", "remove one of the two")
