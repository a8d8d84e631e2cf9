"""What an audit found, as values, as JSON and as plain lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
NUM_SHOWN = 20  # lines of one shard
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    severity: str  # "error": a run would lose or misread samples; "warning": look at it; "note"
    code: str
    shard: str  # empty where it is about the folder
    offset: int | None  # in the uncompressed tar
    key: str  # of the sample, fit for a log; empty where it is not about one
    reason: str
    remedy: str


def about_folder(severity: str, code: str, reason: str, remedy: str) -> Finding:
    return Finding(severity, code, "", None, "", reason, remedy)


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: int
    median: int
    max: int


@dataclass(frozen=True)
class ShardSummary:
    name: str
    split: str
    num_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class ImageSummary:
    """The images whose headers could be read."""

    formats: dict[str, int]
    short_side_px: Spread | None
    long_side_px: Spread | None
    num_turned: int  # with an EXIF orientation other than upright
    num_decoded: int  # without error


@dataclass(frozen=True)
class LabelSummary:
    num_samples: int
    num_labelled: int
    num_classes: int
    samples_per_class: Spread | None  # of the classes that occur


@dataclass(frozen=True)
class Audit:
    """All that was found out about a folder of shards."""

    folder: str
    has_index: bool
    shards: tuple[ShardSummary, ...]
    images: ImageSummary
    labels: dict[str, LabelSummary]  # by split
    findings: tuple[Finding, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def num_errors(self) -> int:
        return self.count(ERROR)

    def to_json(self) -> str:
        counts = {severity: self.count(severity) for severity in SEVERITIES}
        return json.dumps({**asdict(self), "counts": counts}, indent=1) + "\n"


def format_audit(audit: Audit) -> str:
    """The audit in plain lines: a summary, then `severity  shard  byte  key  reason; remedy`."""
    return "\n".join([*_summary(audit), *_listing(audit.findings), _verdict(audit)])


def _summary(audit: Audit) -> Iterator[str]:
    num_bytes = sum(shard.num_bytes for shard in audit.shards)
    index = "checked against their index" if audit.has_index else "without an index"
    yield (
        f"{audit.folder}: {len(audit.shards)} shards, {audit.num_samples} samples, "
        f"{num_bytes / MIB:.1f} MiB, {index}"
    )
    images = audit.images
    if images.short_side_px is not None and images.long_side_px is not None:
        formats = ", ".join(f"{name} {count}" for name, count in sorted(images.formats.items()))
        yield f"images: {formats}; {images.num_decoded} decoded; {images.num_turned} turned by EXIF"
        short, long = images.short_side_px, images.long_side_px
        yield (
            f"sides in px, smallest/median/largest: short {short.min}/{short.median}/{short.max}, "
            f"long {long.min}/{long.median}/{long.max}"
        )
    for split, labels in audit.labels.items():
        line = f"split {split}: {labels.num_labelled} of {labels.num_samples} samples have a label"
        if (each := labels.samples_per_class) is not None:
            line += f"; {labels.num_classes} classes of {each.min}/{each.median}/{each.max} samples"
        yield line


def _listing(findings: Sequence[Finding]) -> Iterator[str]:
    """Grouped by shard, as `Audit.findings` is."""
    for _, group in groupby(findings, key=lambda finding: finding.shard):
        of_shard = sorted(group, key=lambda finding: SEVERITIES.index(finding.severity))
        for finding in of_shard[:NUM_SHOWN]:
            byte = "-" if finding.offset is None else str(finding.offset)
            place = f"{finding.shard or '(folder)'}  {byte}  {finding.key or '-'}"
            yield f"{finding.severity:7}  {place}  {finding.reason}; {finding.remedy}"
        if (more := len(of_shard) - NUM_SHOWN) > 0:
            yield f"         {of_shard[0].shard or '(folder)'}  and {more} more; --out report.json has all"


def _verdict(audit: Audit) -> str:
    counts = [(audit.count(severity), severity) for severity in SEVERITIES]
    told = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count)
    if not audit.num_errors:
        return f"no errors{f' ({told})' if told else ''}"
    if not any(finding.severity == ERROR and finding.shard for finding in audit.findings):
        return told
    return f"{told}; `pretrain shards verify {audit.folder} --repair OUT` writes clean shards"
