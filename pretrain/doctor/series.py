"""The numbers of metrics.jsonl over time: those of the beginning and the recent ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.doctor.run_files import RunFiles
from pretrain.doctor.thresholds import MAX_RECENT, MIN_RECENT, RECENT_RATIO

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


def tasks_of(files: RunFiles) -> list[str]:
    """Tasks with a loss in the log."""
    names = [name.removeprefix("loss/") for name in (files.records[-1] if files.records else {})]
    known = files.records[-1] if files.records else {}
    return [name for name in names if f"loss/{name}" in known]
