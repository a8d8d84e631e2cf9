"""What `metrics.jsonl` says, whatever state a killed run left it in: records, series and how tasks got on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LAST_SHARE = 0.1  # of the records that make up the end of a run, as in `evaluate summary`

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """One number over the steps; None where it was not finite."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]


@dataclass(frozen=True)
class TaskKind:
    """How a task is told about: from the table of tasks."""

    name: str
    headline: str  # the metric that tells how well it is solved
    higher_is_better: bool


@dataclass(frozen=True)
class Progress:
    """A task's headline metric over the run, as `evaluate summary` has it."""

    task: TaskKind
    start: float | None  # of the first record
    end: float | None  # mean of the last tenth of the records
    chance: float | None  # at the end: what a model that has learned nothing gets

    @property
    def is_better_than_chance(self) -> bool | None:
        """None where the metric has no chance, or was not recorded."""
        if self.end is None or self.chance is None:
            return None
        return self.end > self.chance if self.task.higher_is_better else self.end < self.chance


def parse_records(lines: Sequence[str]) -> list[Record]:
    """The records, by rising step. Half lines are left out; of a step that comes twice the later counts."""
    records: list[Record] = []
    for line in lines:
        try:
            record = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError):
            continue  # half a line, of a run that was killed while writing it or writes it just now
        if not math.isfinite(step):
            continue
        while records and float(records[-1]["step"]) >= step:
            records.pop()
        records.append(record)
    return records


def series(records: Sequence[Record], key: str, name: str | None = None) -> Series | None:
    """None where no record has a finite number of this name."""
    found = [(float(record["step"]), _finite(record.get(key))) for record in records]
    if not found or all(value is None for _, value in found):
        return None
    return Series(name or key, tuple(step for step, _ in found), tuple(value for _, value in found))


def sparse_series(records: Sequence[Record], key: str, name: str) -> Series | None:
    """Of what is measured now and then: without the records in between, so that it is one line."""
    return series([record for record in records if _finite(record.get(key)) is not None], key, name)


def data_wait(records: Sequence[Record]) -> Series | None:
    """Share of the step's time that was spent waiting for images, in percent."""
    steps, values = [], []
    for record in records:
        wait, total = _finite(record.get("data_wait_seconds")), _finite(record.get("step_seconds"))
        steps.append(float(record["step"]))
        values.append(100 * wait / total if wait is not None and total else None)
    if all(value is None for value in values):
        return None
    return Series("data wait", tuple(steps), tuple(values))


def attempt_starts(records: Sequence[Record]) -> list[tuple[float, int]]:
    """(step, number) of the first record of every attempt but the first that is here."""
    starts: list[tuple[float, int]] = []
    before: int | None = None
    for record in records:
        number = record.get("attempt")
        if isinstance(number, int) and number != before:
            if before is not None:
                starts.append((float(record["step"]), number))
            before = number
    return starts


def progress(records: Sequence[Record], tasks: Sequence[TaskKind]) -> list[Progress]:
    last = records[-max(1, round(LAST_SHARE * len(records))) :]

    def end_of(key: str) -> float | None:
        values = [value for record in last if (value := _finite(record.get(key))) is not None]
        return sum(values) / len(values) if values else None

    return [
        Progress(
            task,
            _finite(records[0].get(f"{task.name}/{task.headline}")) if records else None,
            end_of(f"{task.name}/{task.headline}"),
            end_of(f"{task.name}/chance"),
        )
        for task in tasks
    ]


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
