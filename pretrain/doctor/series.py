"""The numbers of metrics.jsonl over time: those of the beginning and the recent ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.doctor.run_files import RunFiles
from pretrain.doctor.thresholds import MAX_RECENT, MIN_RECENT, MIN_TIMED_STEPS, RECENT_RATIO

Records = Sequence[Mapping[str, Any]]


def own_records(files: RunFiles) -> Records:
    """Of the newest start that logged anything, without its first line: that step loads and compiles."""
    if not files.records:
        return []
    newest = files.records[-1].get("attempt")
    return [record for record in files.records if record.get("attempt") == newest][1:]


def recent(files: RunFiles) -> Records:
    own = own_records(files)
    return own[-_length(own) :]


def early(files: RunFiles) -> Records:
    """The first log lines of the whole run, as many as `recent` takes of all, after the very first."""
    return files.records[1 : 1 + _length(files.records)]


def timed(files: RunFiles) -> Records:
    """The recent log lines, or more where those cover too few steps to say anything of speed."""
    own = own_records(files)
    for length in range(_length(own), len(own) + 1):
        if steps_in(own[-length:]) >= MIN_TIMED_STEPS:
            return own[-length:]
    return []


def _length(records: Records) -> int:
    return min(MAX_RECENT, max(MIN_RECENT, int(RECENT_RATIO * len(records))))


def values(records: Records, name: str) -> list[float]:
    """The finite numbers of this name."""
    found = (record.get(name) for record in records)
    return [float(value) for value in found if isinstance(value, (int, float)) and math.isfinite(value)]


def mean(records: Records, name: str) -> float | None:
    found = values(records, name)
    return statistics.fmean(found) if found else None


def median(records: Records, name: str) -> float | None:
    found = values(records, name)
    return statistics.median(found) if found else None


def last(records: Records, name: str) -> float | None:
    found = values(records[-1:], name)
    return found[0] if found else None


def steps_in(records: Records) -> float:
    """How many steps lie between the first and the last of these log lines."""
    steps = values(records, "step")
    return steps[-1] - steps[0] if steps else 0.0


def seconds_in(records: Records) -> float:
    """Of training in those steps."""
    return steps_in(records) * (mean(records[1:], "step_seconds") or 0.0)


def span(records: Records) -> str:
    """'steps 40 to 120'"""
    steps = values(records, "step")
    return f"steps {steps[0]:.0f} to {steps[-1]:.0f}" if len(steps) > 1 else f"step {steps[0]:.0f}"


def told_span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def tasks_of(files: RunFiles) -> list[str]:
    """Tasks with a loss in the log."""
    known = files.records[-1] if files.records else {}
    return [name.removeprefix("loss/") for name in known if name.startswith("loss/")]
