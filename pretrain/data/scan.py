"""Read one tar shard from end to end: where its samples lie, what they are worth, and all that is wrong.

Members with one key (the name up to its first dot, as WebDataset has it) that follow each other are a sample.
Where that leaves a sample without an image, because dots stand in the names themselves (`n02.v1.jpg`), the
key goes up to the last dot instead.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import posixpath
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import numpy as np
import xxhash

from pretrain.data.columns import NO_LABEL, SampleColumns
from pretrain.data.storage import Location, StorageError, open_stream
from pretrain.data.tar import READ_BYTES, Damage, Member, Readable, safe_name, walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_LABEL = 2**31 - 1
MAX_IDLE_BYTES = 64 << 20  # in a row, of members that belong to no sample

# kinds of problems
DAMAGED, UNREADABLE, NO_SAMPLES = "damaged", "unreadable", "no_samples"
NOT_PLAIN, UNSAFE_NAME, NO_IMAGE = "not_plain", "unsafe_name", "no_image"
DUPLICATE, UNGROUPED, IDLE_MEMBERS = "duplicate", "ungrouped", "idle_members"

_SKIPPED_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Problem:
    """Something wrong at one place of a shard."""

    offset: int  # in the uncompressed tar
    key: str  # of the sample, fit for a log; empty where it is not about one
    reason: str
    remedy: str
    code: str  # one of those below


@dataclass(frozen=True)
class ShardScan:
    """What one pass over a shard found."""

    num_bytes: int  # on disk
    sha256: str  # of the file on disk
    samples: SampleColumns
    problems: tuple[Problem, ...]


@dataclass
class Sample:
    """Members that belong together."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)  # by extension, lower case

    @property
    def start(self) -> int:
        return next(iter(self.members.values())).offset

    @property
    def image(self) -> Member | None:
        return next((self.members[name] for name in IMAGE_EXTENSIONS if name in self.members), None)

    @property
    def label(self) -> int:
        """The class index in `.cls` (ascii digits) or `.json` ({"label": int}); else NO_LABEL."""
        try:
            if "cls" in self.members:
                label = int(self.members["cls"].data.decode("ascii"))
            else:
                label = json.loads(self.members["json"].data)["label"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return NO_LABEL
        return label if type(label) is int and 0 <= label <= MAX_LABEL else NO_LABEL


def scan_shard(location: Location) -> ShardScan:
    """Find every sample of a shard and everything that is wrong with it."""
    problems: list[Problem] = []
    stored = None
    try:
        with open_stream(location) as file:
            stored = Hashed(file)
            is_packed = location.url.endswith("gz")
            content = gzip.GzipFile(fileobj=cast(BinaryIO, stored), mode="rb") if is_packed else stored
            samples = _collect(content, problems)
            while stored.read(READ_BYTES):  # whatever a decompressor left unread
                pass
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        problems.append(damaged(0, f"the compressed data: {error}"))
        samples = _columns([], 0)
    except (OSError, StorageError) as error:
        problems.append(unreadable(location, error))
        samples = _columns([], 0)
    num_bytes, sha256 = (stored.num_bytes, stored.digest.hexdigest()) if stored else (0, "")
    return ShardScan(num_bytes, sha256, samples, tuple(problems))


def group(members: Iterator[Member | Damage], problems: list[Problem]) -> Iterator[Sample]:
    """Samples out of members, in order; what belongs to none or must not be there becomes a problem."""
    seen: dict[str, set[str]] = {}  # key -> extensions
    for run in runs(members, problems):
        yield from _samples_of(run, seen, problems)


def runs(
    members: Iterable[Member | Damage], problems: list[Problem]
) -> Iterator[list[tuple[str, str, Member]]]:
    """Members that follow each other and share the name up to its first dot, as (key, extension, member).

    Several keys are in one run where dots stand in the names themselves. Members that belong to no sample are
    passed over.
    """
    run: list[tuple[str, str, Member]] = []
    idle_bytes = 0  # of members in a row that belong to no sample
    for member in members:
        if isinstance(member, Damage):
            problems.append(damaged(member.offset, member.reason))
            continue
        named = _named(member, problems)
        if named is None:
            was_much = idle_bytes > MAX_IDLE_BYTES
            idle_bytes += len(member.stored)
            if idle_bytes > MAX_IDLE_BYTES and not was_much:
                reason = f"follows {MAX_IDLE_BYTES >> 20} MiB of members that belong to no sample"
                remedy = "every read of a neighbour would read them too: pack samples only"
                problems.append(Problem(member.offset, safe_name(member.name), reason, remedy, IDLE_MEMBERS))
            continue
        idle_bytes = 0
        if run and run[0][0] != named[0]:
            yield _with_keys(run)
            run = []
        run.append((*named, member))
    if run:
        yield _with_keys(run)


def is_unsafe(name: str) -> bool:
    """Whether unpacking a member of this name would write outside of its folder."""
    return name.startswith("/") or ".." in name.split("/")


def _collect(content: Readable, problems: list[Problem]) -> SampleColumns:
    """The columns of all samples. The bytes of one reach to the start of the next, so hashing waits."""
    rows: list[tuple[int, int, int, int, int]] = []
    state = xxhash.xxh3_64()
    spans: deque[tuple[int, bytes]] = deque()  # (offset, bytes) of members read and not yet hashed
    end = 0

    def members() -> Iterator[Member | Damage]:
        nonlocal end
        for member in walk(content):
            if isinstance(member, Member):
                if not problems:  # else the hashes are of no use, and members of no sample would pile up
                    spans.append((member.offset, member.stored))
                end = member.end
            yield member

    def hash_until(offset: int) -> None:
        while spans and spans[0][0] < offset:
            state.update(spans.popleft()[1])

    pending: tuple[int, int, int, int] | None = None
    for sample in group(members(), problems):
        image = sample.image
        assert image is not None
        hash_until(sample.start)
        if pending is not None:
            rows.append((*pending, state.intdigest()))
        state.reset()
        begin = image.data_offset - sample.start
        pending = sample.start, begin, image.num_bytes, sample.label
    hash_until(end)
    if pending is not None:
        rows.append((*pending, state.intdigest()))
    elif not problems:
        wanted = ", ".join(IMAGE_EXTENSIONS)
        remedy = f"add images ({wanted}) or remove the shard"
        problems.append(Problem(0, "", "no samples in it", remedy, NO_SAMPLES))
    return _columns(rows, end)


def _columns(rows: Sequence[tuple[int, int, int, int, int]], end: int) -> SampleColumns:
    starts, begins, sizes, labels, hashes = zip(*rows, strict=True) if rows else ((),) * 5
    return SampleColumns(
        np.array([*starts, end], dtype=np.int64),
        np.array(begins, dtype=np.uint32),
        np.array(sizes, dtype=np.uint32),
        np.array(hashes, dtype=np.uint64),
        np.array(labels, dtype=np.int32),
    )


def _named(member: Member, problems: list[Problem]) -> tuple[str, str] | None:
    """(key, extension) by the first dot of the name; None for what WebDataset passes over too."""
    name = member.name
    shown = safe_name(name)
    if member.kind == "folder":
        return None  # holds no data; `tar cf shard.tar folder` writes them
    if member.kind != "file":
        remedy = "pack plain files only"
        problems.append(Problem(member.offset, shown, "is not a plain file", remedy, NOT_PLAIN))
        return None
    if is_unsafe(name):
        problems.append(Problem(member.offset, shown, "points out of the archive", "rename it", UNSAFE_NAME))
        return None
    if _SKIPPED_BY_WEBDATASET.match(name):
        return None
    folder, base = posixpath.split(name)
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None
    return posixpath.join(folder, stem), extension


def _with_keys(run: list[tuple[str, str, Member]]) -> list[tuple[str, str, Member]]:
    """A run of one first-dot key with the keys of its samples, and extensions in lower case."""
    if not any(extension.lower() in IMAGE_EXTENSIONS for _, extension, _ in run):
        run = [(*_split_at_last_dot(key, extension), member) for key, extension, member in run]
    return [(key, extension.lower(), member) for key, extension, member in run]


def _samples_of(
    run: list[tuple[str, str, Member]], seen: dict[str, set[str]], problems: list[Problem]
) -> Iterator[Sample]:
    """The samples in a run of members: one, or several whose names have dots of their own."""
    samples: list[Sample] = []
    for key, extension, member in run:
        if not samples or samples[-1].key != key:
            if before := next((sample for sample in samples if sample.key == key), None):
                problems.append(_again(member.offset, key, is_double=extension in before.members))
                continue
            samples.append(Sample(key))
        if extension in samples[-1].members:
            shown = safe_name(member.name)
            remedy = "give each sample its own key"
            problems.append(Problem(member.offset, shown, "is there twice", remedy, DUPLICATE))
            continue
        samples[-1].members[extension] = member
    for sample in samples:
        extensions = set(sample.members)
        if before_now := seen.get(sample.key):
            problems.append(_again(sample.start, sample.key, is_double=bool(before_now & extensions)))
        elif sample.image is None:
            found = ", ".join(sorted(map(safe_name, sample.members)))
            remedy = f"an image's name ends in {', '.join(IMAGE_EXTENSIONS)}"
            reason = f"has no image, only {found}"
            problems.append(Problem(sample.start, safe_name(sample.key), reason, remedy, NO_IMAGE))
        else:
            yield sample
        seen.setdefault(sample.key, set()).update(extensions)


def _split_at_last_dot(key: str, extension: str) -> tuple[str, str]:
    middle, dot, last = extension.rpartition(".")
    return (f"{key}.{middle}", last) if dot else (key, extension)


def _again(offset: int, key: str, *, is_double: bool) -> Problem:
    reason = "is there twice" if is_double else "has its members apart from each other"
    remedy = "give each sample its own key and sort the members by name"
    return Problem(offset, safe_name(key), reason, remedy, DUPLICATE if is_double else UNGROUPED)


def damaged(offset: int, reason: str) -> Problem:
    told = f"damaged or cut short at byte {offset}: {reason}"
    return Problem(offset, "", told, "fetch or build this shard again", DAMAGED)


def unreadable(location: Location, error: OSError | StorageError) -> Problem:
    reason = str(error).removeprefix(f"{location}: ").removesuffix("; check the storage")
    if isinstance(error, OSError):
        reason = f"cannot be read ({(error.strerror or str(error)).lower()})"
    return Problem(0, "", reason, "check the storage", UNREADABLE)


class Hashed:
    """Passes a file's bytes on, counted and hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self.file.read(size)
        self.num_bytes += len(data)
        self.digest.update(data)
        return data
