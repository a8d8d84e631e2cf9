"""Audit one shard from end to end: its archive, its samples, each image, and what the index says of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.data.audit.content import SampleHashes, Unpacked
from pretrain.data.audit.finding import ERROR, WARNING, Finding
from pretrain.data.columns import NO_LABEL, SampleColumns
from pretrain.data.decode import EMPTY, TOO_LARGE, UNKNOWN_FORMAT, BadImage, decode, image_size
from pretrain.data.image_header import UPRIGHT, read_header
from pretrain.data.manifest import Shard
from pretrain.data.scan import (
    DAMAGED,
    IMAGE_EXTENSIONS,
    NO_SAMPLES,
    Hashed,
    Problem,
    Sample,
    group,
    unreadable,
)
from pretrain.data.storage import Location, StorageError, open_stream
from pretrain.data.tar import READ_BYTES, Readable, safe_name, walk

USUAL_RATIO = 0.9  # a member that this share of a shard's samples have is missed where it is absent
CHECKSUM = "checksum"  # bytes are not those that were indexed
INDEX = "index"  # the index speaks of other bytes, or cannot be read
PARTIAL, LABEL, UNKNOWN_CLASS = "partial", "label", "unknown_class"
_INDEX_AGAIN = "restore the shard, or index the folder again to take it as it is"
_IMAGE_REMEDIES = {
    EMPTY: "remove or replace the sample",
    UNKNOWN_FORMAT: "re-encode it as JPEG, PNG or WebP, or remove the sample",
    TOO_LARGE: "make it smaller, or raise data.max_pixels",
}


@dataclass(frozen=True)
class Indexed:
    """What the index says of a shard."""

    shard: Shard
    columns: SampleColumns | None  # None where they are damaged


@dataclass(frozen=True)
class AuditTask:
    name: str
    location: Location
    split: str
    indexed: Indexed | None
    num_classes: int | None  # None where nothing names the classes
    decode_images: bool
    max_pixels: int


@dataclass
class ShardAudit:
    """One shard, with what is needed to compare it with others. Row i of all arrays is one sample."""

    name: str
    split: str
    num_bytes: int = 0
    sha256: str = ""
    num_samples: int = 0
    num_decoded: int = 0
    num_turned: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    keys: bytes = b""  # fit for a log, one a line
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    labels: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    image_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    sides_px: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 2), np.int32))  # known ones

    def add(self, problem: Problem, severity: str = ERROR) -> None:
        place = self.name, problem.offset, problem.key
        self.findings.append(Finding(severity, problem.code, *place, problem.reason, problem.remedy))


@dataclass
class _Rows:
    """The samples met so far."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image_begins: list[int] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
    image_hashes: list[int] = field(default_factory=list)
    members: list[frozenset[str]] = field(default_factory=list)
    sides_px: list[tuple[int, int]] = field(default_factory=list)


def audit_shard(task: AuditTask) -> ShardAudit:
    """Read a shard once and list everything about it."""
    audit, rows = ShardAudit(task.name, task.split), _Rows()
    problems: list[Problem] = []
    hashes: SampleHashes | None = None
    stored = None
    try:
        with open_stream(task.location) as file:
            stored = Hashed(file)
            content: Readable = stored
            packed = Unpacked(stored) if task.location.url.endswith("gz") else None
            if packed is not None:
                content = packed
            if task.indexed is not None and task.indexed.columns is not None:
                content = hashes = SampleHashes(content, task.indexed.columns)
            seen: dict[str, frozenset[str]] = {}  # few distinct ones stand for the members of all samples
            for sample in group(walk(content, resync=True), problems):
                _add_sample(task, audit, rows, sample, seen)
            while stored.read(READ_BYTES):  # whatever an unpacker left unread
                pass
            if packed is not None and packed.problem is not None:
                remedy = "fetch or build this shard again"
                problems.append(
                    Problem(
                        0, "", f"damaged or cut short: compressed data: {packed.problem}", remedy, DAMAGED
                    )
                )
    except (OSError, StorageError) as error:
        problems.append(unreadable(task.location, error))
        hashes = None
    for problem in problems:
        audit.add(problem)
    if stored is not None:
        audit.num_bytes, audit.sha256 = stored.num_bytes, stored.digest.hexdigest()
    if not rows.keys and not problems:
        wanted = ", ".join(IMAGE_EXTENSIONS)
        remedy = f"add images ({wanted}) or remove the shard"
        audit.add(Problem(0, "", "no samples in it", remedy, NO_SAMPLES))
    _find_partial(audit, rows)
    _finish(audit, rows)
    if task.indexed is not None and stored is not None:
        _compare(task.indexed, audit, rows, hashes)
    audit.findings.sort(key=lambda finding: -1 if finding.offset is None else finding.offset)
    return audit


def image_problem(data: bytes, max_pixels: int, is_decoded: bool = True) -> BadImage | None:
    """Why an image cannot be used; without decoding, as far as its header tells."""
    try:
        if is_decoded:
            decode(data, max_pixels=max_pixels)
        else:
            image_size(data, max_pixels)
    except BadImage as error:
        return error
    return None


def _add_sample(
    task: AuditTask, audit: ShardAudit, rows: _Rows, sample: Sample, seen: dict[str, frozenset[str]]
) -> None:
    image = sample.image
    assert image is not None  # `group` has told of the others
    key, data = safe_name(sample.key), image.data
    problem = image_problem(data, task.max_pixels, task.decode_images)
    if problem is not None:
        remedy = _IMAGE_REMEDIES.get(problem.reason, "fetch it again, or remove the sample")
        reason = f"image cannot be used ({problem})"
        audit.add(Problem(sample.start, key, reason, remedy, problem.reason))
    else:
        header = read_header(data)
        assert header is not None  # or it would have no size
        audit.formats[header.kind] += 1
        audit.num_turned += header.orientation != UPRIGHT
        audit.num_decoded += task.decode_images
        rows.sides_px.append((header.height, header.width))
    label = sample.label
    if label == NO_LABEL and "cls" in sample.members and sample.members["cls"].data.strip() != b"-1":
        shown = sample.members["cls"].data[:20]
        remedy = "write a class index in digits, or remove the .cls"
        audit.add(Problem(sample.start, key, f"label {shown!r} is no class index", remedy, LABEL), WARNING)
    if task.num_classes is not None and label >= task.num_classes:
        reason = f"label {label} is none of the {task.num_classes} classes"
        remedy = "mend the label, or complete classes.txt"
        audit.add(Problem(sample.start, key, reason, remedy, UNKNOWN_CLASS))
    rows.keys.append(key)
    rows.offsets.append(sample.start)
    rows.labels.append(label)
    rows.image_begins.append(image.data_offset - sample.start)
    rows.image_bytes.append(image.num_bytes)
    rows.image_hashes.append(xxhash.xxh3_64_intdigest(data))
    members = frozenset(sample.members)
    rows.members.append(seen.setdefault("\0".join(sorted(members)), members))


def _find_partial(audit: ShardAudit, rows: _Rows) -> None:
    """Samples that lack what nearly all others of the shard have."""
    counts = Counter(name for members in rows.members for name in members if name not in IMAGE_EXTENSIONS)
    usual = {name for name, count in counts.items() if count >= USUAL_RATIO * len(rows.members)}
    for key, offset, members in zip(rows.keys, rows.offsets, rows.members, strict=True):
        if missing := usual - members:
            reason = f"has no {', '.join(map(safe_name, sorted(missing)))}, unlike the other samples"
            remedy = "add it, or remove the sample"
            audit.add(Problem(offset, key, reason, remedy, PARTIAL), WARNING)


def _finish(audit: ShardAudit, rows: _Rows) -> None:
    audit.num_samples = len(rows.keys)
    audit.keys = "\n".join(rows.keys).encode()
    audit.offsets = np.array(rows.offsets, dtype=np.int64)
    audit.labels = np.array(rows.labels, dtype=np.int32)
    audit.image_hashes = np.array(rows.image_hashes, dtype=np.uint64)
    audit.sides_px = np.array(rows.sides_px, dtype=np.int32).reshape(-1, 2)


def _compare(indexed: Indexed, audit: ShardAudit, rows: _Rows, hashes: SampleHashes | None) -> None:
    """What the index says otherwise."""
    shard, columns = indexed.shard, indexed.columns

    def add(offset: int, key: str, code: str, reason: str) -> None:
        audit.add(Problem(offset, key, reason, _INDEX_AGAIN, code))

    if audit.num_bytes != shard.num_bytes:
        add(0, "", CHECKSUM, f"{audit.num_bytes} bytes instead of the {shard.num_bytes} of the index")
    elif audit.sha256 != shard.sha256:
        add(0, "", CHECKSUM, "its sha256 is not that of the index")
    if audit.num_samples != shard.num_samples:
        add(0, "", INDEX, f"{audit.num_samples} samples instead of the {shard.num_samples} of the index")
    if columns is None:
        add(0, "", INDEX, "the index is damaged where it speaks of this shard")
    if columns is None or hashes is None:
        return
    wrong = hashes.wrong
    places = {offset: place for place, offset in enumerate(rows.offsets)}
    if 2 * int(wrong.sum()) > len(wrong):  # not single flips: another shard, or an index of others
        add(0, "", CHECKSUM, f"{int(wrong.sum())} of {len(wrong)} samples are not those of the index")
        return
    for number in range(len(columns)):
        start = int(columns.starts[number])
        place = places.get(start)
        key = "" if place is None else rows.keys[place]
        if wrong[number]:
            add(start, key, CHECKSUM, "its bytes are not those that were indexed")
        elif place is None:
            add(start, key, INDEX, "no sample where the index has one")
        elif (rows.image_begins[place], rows.image_bytes[place]) != (
            int(columns.image_begins[number]),
            int(columns.image_bytes[number]),
        ):
            add(start, key, INDEX, "the index has another place for its image")
        elif rows.labels[place] != columns.labels[number]:
            add(start, key, INDEX, f"label {rows.labels[place]}, in the index {columns.labels[number]}")
