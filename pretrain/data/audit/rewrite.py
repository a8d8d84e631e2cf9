"""Write one shard anew: its sound samples byte for byte, in their order, as a plain archive.

Read twice: once to find out what is sound, once to copy it. A compressed shard is unpacked beside the new one
in the meantime, since its members may have to be put together from distant places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import xxhash

from pretrain.data.audit.assemble import Assembled, Kept, Part, Piece, Rejected, assemble, split_run
from pretrain.data.audit.content import Copied, SampleHashes, Unpacked
from pretrain.data.audit.shard import CHECKSUM, Indexed, image_problem
from pretrain.data.indexing import ShardRecord, record_shard
from pretrain.data.scan import (
    DAMAGED,
    IMAGE_EXTENSIONS,
    UNSAFE_NAME,
    Problem,
    is_unsafe,
    runs,
    unreadable,
)
from pretrain.data.storage import Location, StorageError, open_file, open_stream, parse_location
from pretrain.data.tar import BLOCK_BYTES, Damage, Member, Readable, walk
from pretrain.data.tar_writer import TarWriter
from pretrain.errors import DataError


@dataclass(frozen=True)
class RewriteTask:
    name: str
    location: Location
    split: str
    target: Path
    indexed: Indexed | None
    decode_images: bool
    max_pixels: int


@dataclass(frozen=True)
class Rewritten:
    """What became of a shard."""

    name: str
    record: ShardRecord | None  # of the new shard; None if nothing of it is sound
    rejected: tuple[Rejected, ...]
    num_copies: int
    num_regrouped: int
    num_renamed: int


def rewrite_shard(task: RewriteTask) -> Rewritten:
    unpacked = task.target.with_name(f".{task.target.name}.unpacked")
    try:
        assembled, is_readable = _find_samples(task, unpacked)
        record = None
        if is_readable and assembled.kept:
            source = parse_location(unpacked) if unpacked.exists() else task.location
            _write_shard(task.target, source, assembled.kept)
            record = record_shard(task.target, task.split)
            if record.num_samples != len(assembled.kept):
                raise DataError(f"{task.target}: the storage gives back other bytes; check the disk")
    except StorageError as error:
        raise DataError(f"{error}; then repair into a new folder") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{task.target}: cannot be written ({reason}); repair into a new folder") from error
    finally:
        unpacked.unlink(missing_ok=True)
    return Rewritten(
        task.name,
        record,
        assembled.rejected,
        assembled.num_copies,
        assembled.num_regrouped,
        assembled.num_renamed,
    )


def _find_samples(task: RewriteTask, unpacked: Path) -> tuple[Assembled, bool]:
    """The first pass: what is sound, and whether the shard could be read to its end."""
    problems: list[Problem] = []
    pieces: list[Piece] = []
    hashes: SampleHashes | None = None
    try:
        with ExitStack() as open_files:
            content: Readable = open_files.enter_context(open_stream(task.location))
            packed = None
            if task.location.url.endswith("gz"):
                packed = Unpacked(content)
                content = Copied(packed, open_files.enter_context(unpacked.open("wb")))
            if task.indexed is not None and task.indexed.columns is not None:
                content = hashes = SampleHashes(content, task.indexed.columns)
            hits: set[int] = set()  # offsets where damage begins, and where it ends
            for run in runs(_members(content, hits), problems):
                pieces += _pieces(task, run)
            if packed is not None and packed.problem is not None:
                problems.append(Problem(0, "", f"compressed data: {packed.problem}", "", DAMAGED))
    except StorageError as error:
        nothing = Rejected(0, "", *_code_and_reason(unreadable(task.location, error)))
        return Assembled((), (nothing,), 0, 0, 0), False
    ends = {piece.offset: max(_end(part) for part in piece.parts.values()) for piece in pieces}
    for piece in pieces:
        piece.is_hit = piece.offset in hits or ends[piece.offset] in hits
    if hashes is not None and task.indexed is not None and task.indexed.columns is not None:
        wrong, num_met = hashes.wrong, hashes.num_met
        if 2 * int(wrong[:num_met].sum()) < num_met:  # else the index is of other bytes, and proves nothing
            starts = set(task.indexed.columns.starts[:-1][wrong].tolist())
            for piece in pieces:
                piece.problem = CHECKSUM if piece.offset in starts else ""
    assembled = assemble(pieces)
    others = [Rejected(problem.offset, problem.key, *_code_and_reason(problem)) for problem in problems]
    rejected = sorted([*others, *assembled.rejected], key=lambda entry: entry.offset)
    return replace(assembled, rejected=tuple(rejected)), True


def _code_and_reason(problem: Problem) -> tuple[str, str]:
    return problem.code, problem.reason


def _members(content: Readable, hits: set[int]) -> Iterator[Member | Damage]:
    """All members that can be found, those with dangerous names renamed; and where damage lies."""
    was_damage = False
    for member in walk(content, resync=True):
        if isinstance(member, Damage):
            hits.add(member.offset)
            was_damage = True
        else:
            if was_damage:
                hits.add(member.offset)
            was_damage = False
            if member.kind == "file" and is_unsafe(member.name):
                parts = [part for part in member.name.split("/") if part not in ("", "..")]
                member = replace(member, name="/".join(parts) or UNSAFE_NAME)
        yield member


def _pieces(task: RewriteTask, run: list[tuple[str, str, Member]]) -> list[Piece]:
    pieces: list[Piece] = []
    for key, group in groupby(run, key=lambda named: named[0]):
        parts = [_part(task, extension, member) for _, extension, member in group]
        pieces += split_run(key, parts)
    return pieces


def _part(task: RewriteTask, extension: str, member: Member) -> Part:
    data = member.data
    bad = image_problem(data, task.max_pixels, task.decode_images) if extension in IMAGE_EXTENSIONS else None
    return Part(
        extension=extension,
        offset=member.offset,
        data_offset=member.data_offset,
        num_bytes=member.num_bytes,
        digest=xxhash.xxh3_128_digest(data),
        problem=bad.reason if bad else "",
        detail=f"image cannot be used ({bad})" if bad else "",
    )


def _end(part: Part) -> int:
    return part.data_offset + -(-part.num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _write_shard(target: Path, source: Location, kept: tuple[Kept, ...]) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open_file(source) as reader, TarWriter(temporary) as tar:
            for sample in kept:
                for part in sample.parts:
                    data = reader.read(part.data_offset, part.data_offset + part.num_bytes)
                    if xxhash.xxh3_128_digest(data) != part.digest:
                        raise DataError(
                            f"{source}: changed while it was read; leave it alone and start again"
                        )
                    tar.add(f"{sample.key}.{part.extension}", data)
            tar.finish()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def count_codes(rewritten: list[Rewritten]) -> dict[str, int]:
    """How many places were left out, by reason, the most frequent first."""
    return dict(Counter(entry.code for shard in rewritten for entry in shard.rejected).most_common())
