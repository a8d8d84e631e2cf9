"""What metrics.jsonl says, in whatever state it was left."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pretrain.evaluate.summary import task_progress
from pretrain.report.curves import (
    TaskKind,
    attempt_starts,
    data_wait,
    parse_records,
    progress,
    series,
)

ROTATION = TaskKind("rotation", "accuracy", higher_is_better=True)
INPAINTING = TaskKind("inpainting", "error", higher_is_better=False)


def line(step: object, **values: object) -> str:
    return json.dumps({"step": step, **values})


def test_half_lines_other_json_and_steps_that_are_none_are_left_out() -> None:
    lines = [line(1, total=2.0), "", "[1]", '"x"', line("x"), line(2, total=1.0), line(3, total=0.5)[:-4]]
    records = parse_records([*lines, '{"step": NaN}', '{"step": 1e999}', "\x00\x00"])
    assert [record["step"] for record in records] == [1, 2]


def test_steps_that_were_taken_again_count_as_they_were_taken_last() -> None:
    lines = [line(step, attempt=1, total=step) for step in (1, 2, 3, 4)]
    lines += [line(step, attempt=2, total=10 * step) for step in (3, 4, 5)]
    records = parse_records(lines)
    assert [(record["step"], record["attempt"]) for record in records] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
    ]
    assert attempt_starts(records) == [(3.0, 2)]


def test_a_value_that_is_missing_or_not_finite_leaves_a_gap() -> None:
    records = parse_records(
        [line(1, x=1.0), line(2, x=None), '{"step": 3, "x": NaN}', line(4), line(5, x=True)]
    )
    found = series(records, "x")
    assert found is not None
    assert found.values == (1.0, None, None, None, None)
    assert found.known == [1.0]
    assert series(records, "y") is None


def test_waiting_for_data_is_a_share_of_the_step() -> None:
    records = parse_records([line(1, data_wait_seconds=0.25, step_seconds=1.0), line(2, step_seconds=1.0)])
    found = data_wait(records)
    assert found is not None
    assert found.values == (25.0, None)


def test_progress_is_that_of_the_summary(tmp_path: Path) -> None:
    """One fact told in two places: `evaluate summary` and the report agree, number by number."""
    lines = [
        line(
            step,
            **{"rotation/accuracy": 0.2 + step / 100, "rotation/chance": 0.25},
            **{"inpainting/error": None if step % 7 == 0 else 1 / step, "inpainting/chance": 0.02},
        )
        for step in range(1, 41)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text("tasks: {rotation: {}, inpainting: {}, jigsaw: null}\n")
    own = progress(parse_records(lines), [ROTATION, INPAINTING])
    summary = task_progress(tmp_path)
    for mine, theirs in zip(own, summary, strict=True):
        assert mine.task.name == theirs.task
        assert mine.start == pytest.approx(theirs.start)
        assert mine.end == pytest.approx(theirs.end)
        assert mine.chance == pytest.approx(theirs.chance)
        assert mine.is_better_than_chance == theirs.is_better_than_chance
    assert [row.is_better_than_chance for row in own] == [True, False]


def test_what_was_not_recorded_is_not_judged() -> None:
    (row,) = progress(parse_records([line(1, **{"rotation/accuracy": 0.3})]), [ROTATION])
    assert row.is_better_than_chance is None
    (row,) = progress([], [ROTATION])
    assert (row.start, row.end) == (None, None)
    assert not math.isnan(row.end or 0.0)
