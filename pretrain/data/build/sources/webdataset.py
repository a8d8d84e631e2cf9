"""Shards that someone else wrote: .tar, .tar.gz or .tgz files whose samples are members of one key.

Every shard is checked from end to end before a sample is taken from it. Of a compressed one the content is
spooled, as it can only be read in sequence.
"""

from __future__ import annotations

import gzip
import itertools
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain.data.build.listing import ListingWriter
from pretrain.data.build.settings import BuildRequest
from pretrain.data.build.sources.source import (
    Source,
    default_split,
    natural_key,
    read_class_names,
    refuse_split,
    split_word,
)
from pretrain.data.indexing import ShardRecord, record_shard
from pretrain.data.manifest import Manifest
from pretrain.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
COPY_BYTES = 1 << 22
NUM_CHECK_THREADS = 4


def looks_like_one(path: Path) -> bool:
    return bool(_shards(path))


def find(request: BuildRequest) -> Source:
    path = Path(request.source)
    shards = _shards(path)
    if not shards:
        raise DataError(f"{path}: no shards here; expected files that end in {', '.join(SUFFIXES)}")
    root = path if path.is_dir() else path.parent
    default = default_split(request, path)
    split_of, class_names = _indexed(root)
    by_split: dict[str, list[Path]] = {}
    for shard in shards:
        split = split_of.get(shard.name) or split_word(shard.name, default)
        by_split.setdefault(split, []).append(shard)
    if by_split.keys() != {default}:
        refuse_split(request, list(by_split))
    ordered = [shard for group in by_split.values() for shard in group]

    def list_items(writer: ListingWriter) -> None:
        writer.class_names = class_names or read_class_names(root)
        with ThreadPoolExecutor(NUM_CHECK_THREADS) as threads:
            for split, group in by_split.items():
                writer.begin_split(split)
                for start in range(0, len(group), NUM_CHECK_THREADS):
                    some = group[start : start + NUM_CHECK_THREADS]
                    records = threads.map(lambda shard: record_shard(shard, default), some)
                    for shard, record in zip(some, records, strict=True):
                        _list_shard(writer, shard, record)

    spool_bytes = sum(_content_bytes(shard) for shard in ordered if shard.name.endswith("gz"))
    return Source(
        "webdataset", root, tuple(by_split), list_items, files=tuple(ordered), spool_bytes=spool_bytes
    )


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.name.endswith(SUFFIXES) else []
    found = [file for file in path.iterdir() if file.name.endswith(SUFFIXES) and file.name[0] != "."]
    return sorted((file for file in found if file.is_file()), key=natural_key)


def _list_shard(writer: ListingWriter, path: Path, record: ShardRecord) -> None:
    begin = 0
    if path.name.endswith("gz"):
        place, begin = _spool(writer, path)
    else:
        place = writer.container(path, holds_samples=True)
    for start, stop in itertools.pairwise(record.samples.starts.tolist()):
        writer.add(path.name, stop - start, place=place, offset=begin + start)


def _spool(writer: ListingWriter, path: Path) -> tuple[int, int]:
    place, begin = writer.spool(b"", holds_samples=True)
    with gzip.open(path, "rb") as content:
        while data := content.read(COPY_BYTES):
            writer.spool(data)
    return place, begin


def _content_bytes(path: Path) -> int:
    """Bytes of a gzip file's content by its trailer (modulo 4 GiB, so at least what is on disk)."""
    num_bytes = path.stat().st_size
    if num_bytes < 4:
        return num_bytes
    with path.open("rb") as file:
        file.seek(-4, 2)
        return max(num_bytes, int(struct.unpack("<I", file.read(4))[0]))


def _indexed(folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """What an index of ours beside the shards tells: the split of each, and the names of the classes."""
    try:
        manifest = Manifest.load(folder)
    except DataError:
        return {}, ()  # shards made by others have another index, or none
    split_of = {shard.name: name for name in manifest.split_names for shard in manifest.split(name).shards}
    return split_of, manifest.class_names
