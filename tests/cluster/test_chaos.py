"""What chaos.py concludes from a run: it must see a difference where there is one. Needs no cluster."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from chaos import (
    KINDS,
    Chaos,
    Event,
    Records,
    damage,
    differences,
    differing_steps,
    summary,
    unrecorded,
)
from slurm_cluster import SlurmCluster

from pretrain import checkpoint


def line(step: int, samples: float, attempt: int = 1, unix_time: float = 0.0) -> str:
    return json.dumps({"step": step, "samples": samples, "attempt": attempt, "unix_time": unix_time}) + "\n"


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "metrics.jsonl")


def test_a_record_that_a_later_start_takes_away_still_counts(records: Records) -> None:
    records.read()  # there is no file yet
    records.path.write_text(line(1, 10.0) + line(2, 20.0))
    records.read()
    new = records.path.with_name("new")
    new.write_text(line(1, 10.0) + line(2, 21.0, attempt=2, unix_time=5.0))
    new.replace(records.path)
    records.read()
    assert records.samples == {1: {10.0}, 2: {20.0, 21.0}}
    assert (records.last_step(1), records.first_after(1), records.first_after(2)) == (2, (2, 5.0), None)
    # step 2 was right once and wrong once
    undisturbed = Records(records.path.with_name("undisturbed"))
    undisturbed.path.write_text(line(1, 10.0) + line(2, 20.0))
    undisturbed.read()
    assert differing_steps(records, undisturbed) == [2]


def test_a_line_is_read_once_it_is_whole_and_half_of_one_is_counted(records: Records) -> None:
    records.path.write_text(line(1, 10.0) + line(2, 20.0)[:9])
    records.read()
    assert set(records.samples) == {1}
    with records.path.open("a") as file:  # the rest of line 2 did not fit on the disk
        file.write(line(3, 30.0) + line(4, 40.0))
    records.read()
    assert set(records.samples) == {1, 4}
    assert records.num_broken == 1
    with records.path.open("a") as file:
        file.write(line(5, 50.0))
    records.read()
    assert set(records.samples) == {1, 4, 5}
    assert records.num_broken == 1


def test_steps_may_lack_a_record_only_where_the_disk_was_full(records: Records) -> None:
    records.path.write_text("".join(line(step, 1.0, unix_time=step) for step in (1, 2, 3, 4, 8, 9, 11)))
    records.read()
    # full from after step 3 (4 fitted in) until shortly before step 8 was taken
    assert unrecorded(records, 12, [(3, 7.5)]) == (3, [10, 12])
    assert unrecorded(records, 12, []) == (0, [5, 6, 7, 10, 12])


def test_one_bit_of_one_weight_is_a_difference(tmp_path: Path) -> None:
    for run, last in (("one", 1.0), ("other", 1.0), ("third", 1.0000001)):
        tensors = {
            name: {"weight": torch.tensor([0.5, last if name == checkpoint.TEACHER else 1.0])}
            for name in (checkpoint.STUDENT, checkpoint.TEACHER, checkpoint.OPTIMIZER)
        }
        (tmp_path / run).mkdir()
        checkpoint.write_checkpoint(tmp_path / run, 7, tensors, {"step": 7}, "")
    assert differences(tmp_path / "one", tmp_path / "other") == []
    assert differences(tmp_path / "one", tmp_path / "third") == [f"{checkpoint.TEACHER}: weight"]
    assert differences(tmp_path / "one", tmp_path / "absent") == [
        "last checkpoint: step-00000007, undisturbed None"
    ]


def test_damage_is_what_a_checkpoint_is_refused_for(tmp_path: Path) -> None:
    tensors = {checkpoint.STUDENT: {"w": torch.zeros(3)}, checkpoint.OPTIMIZER: {"w": torch.zeros(3)}}
    folder = checkpoint.write_checkpoint(tmp_path, 7, tensors, {"step": 7}, "")
    assert checkpoint.verify(folder) == []
    damage(folder / checkpoint.OPTIMIZER, random.Random(0))
    assert checkpoint.verify(folder) == [f"{checkpoint.OPTIMIZER} is damaged (sha256 differs)"]


@pytest.fixture
def chaos(tmp_path: Path) -> Chaos:
    cluster = SlurmCluster(tmp_path, tmp_path)
    return Chaos(cluster, tmp_path / "c.yaml", tmp_path / "run", tmp_path / "out", tmp_path, seed=0)


def test_steps_taken_again_are_those_beyond_where_the_next_attempt_began(chaos: Chaos) -> None:
    chaos.run.mkdir()
    chaos.submitted_at = 1000.0
    text = "".join(line(step, 1.0, 1, 1000.0 + step) for step in range(1, 26))
    chaos.records.path.write_text(text + "".join(line(step, 1.0, 2, 1050.0 + step) for step in range(21, 24)))
    chaos.records.read()
    kind = next(iter(KINDS))
    event = Event(kind, False, at_seconds=26.0, attempt=1)
    chaos.note(event)
    assert (event.back_in, event.back_seconds, event.num_lost_steps) == (2, 45.0, 5)
    chaos.events = [event, Event(kind, True, attempt=2)]
    assert summary(chaos)[0] == {
        "kind": kind,
        "number": 2,
        "went_on": 0,
        "struck_again_before_back": 1,
        "median_back_seconds": 45.0,
        "max_back_seconds": 45.0,
        "steps_taken_again": 5,
    }
