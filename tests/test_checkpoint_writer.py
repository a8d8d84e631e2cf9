from __future__ import annotations

import errno
import gc
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain import attempts, checkpoint, checkpoint_writer, mirror
from pretrain.checkpoint import (
    FOLDER,
    OPTIMIZER,
    STUDENT,
    TEACHER,
    list_checkpoints,
    newest_valid,
    read_checkpoint,
    step_folder,
    step_of,
    verify,
)
from pretrain.checkpoint_writer import (
    BEST,
    CheckpointConfig,
    CheckpointWriter,
    KeepBestConfig,
    Report,
    Snapshot,
    read_best,
)

CONFIG = CheckpointConfig(keep_last=20)


def snapshot(step: int, num_numbers: int = 1000, **values: float) -> Snapshot:
    tensors = {
        STUDENT: {"backbone.w": torch.full((num_numbers,), float(step))},
        OPTIMIZER: {"exp_avg.backbone.w": torch.full((num_numbers,), step / 2)},
    }
    return Snapshot(step, tensors, {"step": step}, values)


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.005)


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / FOLDER).iterdir())


class Gate:
    """Holds up every write, or makes it fail, in place of a disk that hangs or is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.waiting = threading.Event()
        self.problems: list[BaseException] = []
        self.threads: list[str] = []
        self._real = checkpoint.write_checkpoint
        monkeypatch.setattr(checkpoint, "write_checkpoint", self._write)

    def _write(self, run: Path, step: int, *rest: Any, **named: Any) -> Path:
        self.threads.append(threading.current_thread().name)
        self.waiting.set()
        assert self.open.wait(30.0)
        if self.problems:
            raise self.problems.pop(0)
        return self._real(run, step, *rest, **named)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_checkpoints_are_written_in_order_and_are_what_was_submitted(
    asynchronous: bool, tmp_path: Path
) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointConfig(asynchronous=asynchronous), "seed: 1\n", attempt=2)
    for step in (1, 2, 3):
        assert writer.submit(snapshot(step)) >= 0.0
    report = writer.close()
    assert [done.step for done in report.written] == [1, 2, 3]
    assert report.failures == ()
    assert writer.poll() == Report()  # told once
    for done in report.written:
        assert done.folder == step_folder(tmp_path, done.step, 2)
        assert done.num_bytes == sum(path.stat().st_size for path in done.folder.rglob("*") if path.is_file())
        assert done.seconds > 0.0
        assert verify(done.folder) == []
        saved = read_checkpoint(done.folder)
        assert saved.state == {"step": done.step}
        assert torch.equal(saved.student["backbone.w"], torch.full((1000,), float(done.step)))
        assert (done.folder / checkpoint.CONFIG).read_text() == "seed: 1\n"


def test_training_goes_on_while_a_checkpoint_is_written_and_is_held_up_only_by_the_one_before(
    tmp_path: Path, gate: Gate
) -> None:
    writer = CheckpointWriter(tmp_path, CONFIG, "")
    assert writer.submit(snapshot(1)) < 0.5
    assert gate.waiting.wait(10.0)
    assert writer.poll() == Report()  # and does not wait either
    threading.Timer(0.3, gate.open.set).start()
    assert 0.2 < writer.submit(snapshot(2)) < 10.0
    assert [done.step for done in writer.close().written] == [1, 2]
    assert gate.threads == ["checkpoint-writer"] * 2


def test_without_asynchronous_the_caller_writes(tmp_path: Path, gate: Gate) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointConfig(asynchronous=False), "")
    threading.Timer(0.2, gate.open.set).start()
    assert writer.submit(snapshot(1)) >= 0.15
    assert [done.step for done in writer.poll().written] == [1]
    assert gate.threads == [threading.main_thread().name]


class Alive:
    """How many of the snapshots that were watched are still in memory."""

    def __init__(self) -> None:
        self._tensors: list[weakref.ref[Tensor]] = []
        self.most = 0

    def watched(self, taken: Snapshot) -> Snapshot:
        self._tensors.append(weakref.ref(taken.tensors[STUDENT]["backbone.w"]))
        return taken

    def count(self, collect: bool = True) -> int:
        if collect:
            gc.collect()
        num = sum(tensor() is not None for tensor in self._tensors)
        self.most = max(self.most, num)
        return num


@pytest.mark.parametrize("failing", [False, True])
def test_memory_never_holds_more_than_one_snapshot_being_written_and_one_submitted(
    failing: bool, tmp_path: Path, gate: Gate
) -> None:
    writer, alive = CheckpointWriter(tmp_path, CONFIG, ""), Alive()
    if failing:
        gate.problems = [full_disk() for _ in range(4)]

    def submit(step: int) -> None:
        writer.submit(alive.watched(snapshot(step)))

    submit(1)
    waiting = threading.Thread(target=lambda: [submit(step) for step in (2, 3, 4)])
    waiting.start()
    assert gate.waiting.wait(10.0)
    time.sleep(0.05)
    assert alive.count() == 2  # 1 is being written, 2 is held back; 3 cannot have been made
    gate.open.set()
    while waiting.is_alive():
        alive.count(collect=False)
        time.sleep(0.001)
    waiting.join()
    assert alive.most == 2
    until(lambda: writer._snapshot is None)
    gate.problems.clear()
    assert alive.count() == (1 if failing else 0)  # the last one, for `close` to try again
    steps = [done.step for done in writer.close().written]
    assert steps == ([4] if failing else [1, 2, 3, 4])
    assert alive.count() == 0


def test_a_failed_write_is_told_in_one_line_and_the_next_one_sets_the_count_back(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointConfig(max_failures=2), "")
    gate.open.set()
    gate.problems = [full_disk(), full_disk()]
    counts = []
    for step in (1, 2, 3):
        writer.submit(snapshot(step))
        until(lambda: writer._snapshot is None)
        report = writer.poll()
        counts.append(report.failures_in_a_row)
        assert [failure.step for failure in report.failures] == ([step] if step < 3 else [])
        assert [done.step for done in report.written] == ([] if step < 3 else [step])
    assert counts == [1, 2, 0]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert str(tmp_path / FOLDER) in warnings[0]
    assert "No space left on device; training goes on" in warnings[0]
    assert "failure 2 in a row, 2 end the run" in warnings[1]
    writer.close()


@pytest.mark.parametrize("problem", [ValueError("two\nlines"), MemoryError(), SystemExit(3)])
def test_an_error_of_the_program_is_a_failure_with_its_traceback_never_a_dead_thread(
    problem: BaseException, tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    writer, alive = CheckpointWriter(tmp_path, CONFIG, ""), Alive()
    gate.open.set()
    gate.problems = [problem]
    writer.submit(alive.watched(snapshot(1)))
    until(lambda: writer._snapshot is None)
    report = writer.poll()
    assert report.failures_in_a_row == 1
    assert report.failures[0].reason.startswith(type(problem).__name__)
    assert "\n" not in report.failures[0].reason
    assert "Traceback" in caplog.text
    caplog.clear()
    del problem
    writer.submit(snapshot(2))
    assert [done.step for done in writer.close().written] == [2]


def test_an_attempt_that_was_taken_over_writes_and_removes_nothing(tmp_path: Path) -> None:
    """Its failure is told; that it must stop is for its watch to say."""
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=1), "", attempt=1)
    writer.submit(snapshot(1))
    until(lambda: bool(list_checkpoints(tmp_path)) and writer._snapshot is None)
    owner = attempts.this_process("job 7", restart=0)
    attempts.begin(tmp_path, owner).began_from(None, 0)
    later = attempts.begin(tmp_path, attempts.this_process("job 7", restart=1))
    later.began_from(1, 1)
    writer.submit(snapshot(2))
    report = writer.close()
    assert "attempt 2 has taken over" in report.failures[0].reason
    assert names_in(tmp_path) == ["step-00000001"]


def test_the_last_checkpoint_is_tried_again_until_it_is_written(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "FINAL_RETRY_SECONDS", (0.0, 0.01, 0.02))
    gate.open.set()
    for asynchronous in (True, False):
        run = tmp_path / str(asynchronous)
        writer = CheckpointWriter(run, CheckpointConfig(asynchronous=asynchronous), "")
        gate.problems = [full_disk() for _ in range(3)]
        writer.submit(snapshot(1))
        report = writer.close()
        assert [failure.step for failure in report.failures] == [1, 1, 1]
        assert [done.step for done in report.written] == [1]
        assert report.failures_in_a_row == 0
        assert newest_valid(run) == (step_folder(run, 1), [])


def test_a_last_checkpoint_that_cannot_be_written_ends_in_a_report_not_in_waiting(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "FINAL_RETRY_SECONDS", (0.0, 0.0))
    writer = CheckpointWriter(tmp_path / "full", CONFIG, "")
    gate.open.set()
    gate.problems = [full_disk() for _ in range(9)]
    writer.submit(snapshot(1))
    report = writer.close()
    assert report.failures_in_a_row == 3
    assert report.written == ()
    gate.open.clear()
    gate.problems.clear()
    writer = CheckpointWriter(tmp_path / "hangs", CONFIG, "")
    writer.submit(snapshot(1))
    started = time.monotonic()
    report = writer.close(timeout_seconds=0.2)
    assert time.monotonic() - started < 5.0
    assert [failure.reason for failure in report.failures] == ["not finished within 0.2 s"]
    assert report.failures_in_a_row == 1, "a run whose last checkpoint hangs has not ended well"
    gate.open.set()
    until(lambda: writer._snapshot is None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("file", [STUDENT, OPTIMIZER])
def test_what_is_not_finite_is_not_saved_for_nothing_could_go_on_from_it(
    file: str, value: float, tmp_path: Path
) -> None:
    writer = CheckpointWriter(tmp_path / "run", CONFIG, "")
    good, spoilt = snapshot(1), snapshot(2)
    next(iter(spoilt.tensors[file].values()))[7] = value
    for each in (good, spoilt):
        writer.submit(each)
    report = writer.close()
    assert [done.step for done in report.written] == [1]
    [failure] = report.failures
    assert failure.step == 2
    assert f"in {file} is not finite" in failure.reason
    assert newest_valid(tmp_path / "run") == (step_folder(tmp_path / "run", 1), [])


def test_a_disk_that_is_too_full_is_told_with_numbers_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 2 of the fault catalogue: noticed early, where the file system tells how full it is."""

    class Disk:
        f_bavail, f_frsize = 1500, 1000

    monkeypatch.setattr(checkpoint_writer.os, "statvfs", lambda path: Disk)
    monkeypatch.setattr(
        checkpoint, "write_checkpoint", lambda *arguments, **named: pytest.fail("began to write")
    )
    monkeypatch.setattr(checkpoint_writer, "FINAL_RETRY_SECONDS", ())
    writer = CheckpointWriter(tmp_path, CONFIG, "")
    writer.submit(snapshot(1, num_numbers=1_000_000))  # twice 4 MB
    reason = writer.close().failures[0].reason
    assert reason.startswith(f"{tmp_path / FOLDER}: needs 9.0 MB and the disk has 1.5 MB left")


# what a child needs of this module, and a report in a form that can be printed
CHILD = """
    import json, logging, os, resource, shutil, signal, subprocess, sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from pretrain.checkpoint import newest_valid
    from pretrain.checkpoint_writer import CheckpointConfig, CheckpointWriter
    from test_checkpoint_writer import names_in, snapshot, until

    root = Path(sys.argv[1])
    run = root / "run"

    def write(writer, step, num_numbers=100_000):
        writer.submit(snapshot(step, num_numbers))
        until(lambda: writer._snapshot is None)
        report = writer.poll()
        valid, rejected = newest_valid(run)
        print(json.dumps({{
            "written": [done.step for done in report.written],
            "failures": [failure.reason for failure in report.failures],
            "in_a_row": report.failures_in_a_row,
            "valid": valid.name if valid else None,
            "rejected": rejected,
            "names": names_in(run),
        }}), flush=True)
"""


def run_child(script: str, tmp_path: Path, *prefix: str) -> list[dict[str, Any]]:
    """Run a scenario in a process of its own; gives the reports that it printed."""
    text = textwrap.dedent(CHILD.format(tests=str(Path(__file__).parent))) + textwrap.dedent(script)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", text, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def own_mounts() -> list[str]:
    """A command that gives its child mounts of its own, or a skip where the system does not allow that."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    tried = subprocess.run(
        [*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    if tried.returncode:
        pytest.skip("this system lets no user mount anything")
    return command


def test_a_disk_that_fills_up_costs_checkpoints_but_not_the_run_until_there_is_room_again(
    tmp_path: Path,
) -> None:
    """Row 2 of the fault catalogue, on a disk of 3 MB that is really full."""
    reports = run_child(
        """
        run.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", run], check=True)
        writer = CheckpointWriter(run, CheckpointConfig(keep_last=2), "")
        write(writer, 1)
        with (run / "filler").open("wb") as filler:
            filler.write(bytes(1_800_000))
        write(writer, 2)  # does not fit, and the file system says so
        CheckpointWriter._check_room = lambda self, snapshot: None  # a quota says nothing
        write(writer, 3)
        write(writer, 4)
        (run / "filler").unlink()
        write(writer, 5)
        """,
        tmp_path,
        *own_mounts(),
    )
    assert [report["written"] for report in reports] == [[1], [], [], [], [5]]
    assert [report["in_a_row"] for report in reports] == [0, 1, 2, 3, 0]
    assert "needs 1.8 MB" in reports[1]["failures"][0]
    for report in reports[2:4]:
        assert "No space left on device" in report["failures"][0]
    for report in reports[:4]:
        assert (report["valid"], report["rejected"]) == ("step-00000001", [])
        assert report["names"] == ["step-00000001"]  # nothing half-made is left on the full disk
    assert reports[4]["names"] == ["step-00000001", "step-00000005"]
    assert (reports[4]["valid"], reports[4]["rejected"]) == ("step-00000005", [])


def test_a_file_size_limit_is_survived_as_a_full_disk_is(tmp_path: Path) -> None:
    """Row 2 of the fault catalogue, where nothing can be mounted: `ulimit -f`."""
    reports = run_child(
        """
        writer = CheckpointWriter(run, CheckpointConfig(), "")
        write(writer, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        write(writer, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        write(writer, 3)
        """,
        tmp_path,
    )
    assert [report["written"] for report in reports] == [[1], [], [3]]
    assert "File too large" in reports[1]["failures"][0]
    assert reports[1]["names"] == ["step-00000001"]
    assert [report["in_a_row"] for report in reports] == [0, 1, 0]


def test_a_run_folder_that_turns_read_only_is_survived_until_it_is_writable_again(tmp_path: Path) -> None:
    """Row 47 of the fault catalogue: read-only."""
    reports = run_child(
        """
        run.mkdir()
        writer = CheckpointWriter(run, CheckpointConfig(), "")
        write(writer, 1)
        subprocess.run(["mount", "--bind", run, run], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
        write(writer, 2)
        subprocess.run(["mount", "-o", "remount,bind,rw", run], check=True)
        write(writer, 3)
        """,
        tmp_path,
        *own_mounts(),
    )
    assert [report["written"] for report in reports] == [[1], [], [3]]
    assert "Read-only file system" in reports[1]["failures"][0]
    assert reports[1]["valid"] == "step-00000001"


def test_a_run_folder_that_vanishes_is_not_made_anew_and_is_used_again_once_it_is_back(
    tmp_path: Path,
) -> None:
    """Row 47 of the fault catalogue: vanished. What lies under a lost mount point must not fill up."""
    run, away = tmp_path / "run", tmp_path / "away"
    writer = CheckpointWriter(run, CONFIG, "")
    for step in (1, 2, 3):
        if step == 2:
            run.rename(away)
        elif step == 3:
            away.rename(run)
        writer.submit(snapshot(step))
        until(lambda: writer._snapshot is None)
        report = writer.poll()
        if step == 2:
            assert "is gone" in report.failures[0].reason
            assert str(run) in report.failures[0].reason
            assert not run.exists()
        else:
            assert [done.step for done in report.written] == [step]
    assert writer.close() == Report()
    assert newest_valid(run) == (step_folder(run, 3), [])
    assert names_in(run) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_run_folder_that_vanishes_in_the_middle_of_a_write_gives_no_torn_checkpoint(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 47 of the fault catalogue: half of the files would be here and half there."""
    run, away = tmp_path / "run", tmp_path / "away"
    monkeypatch.setattr(checkpoint_writer, "FINAL_RETRY_SECONDS", ())
    writer = CheckpointWriter(run, CONFIG, "")
    writer.submit(snapshot(1))
    until(lambda: writer._snapshot is None)
    real, num_calls = checkpoint.save_file, 0

    def save_file(values: Mapping[str, Tensor], path: Path) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == moment:
            run.rename(away)
            path.parent.mkdir(parents=True)  # as if another file of the run had brought it back
        real(dict(values), path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    of_two = snapshot(2)
    in_one_folder = {STUDENT: of_two.tensors[STUDENT], TEACHER: of_two.tensors[STUDENT]}
    writer.submit(replace(of_two, tensors={**in_one_folder, OPTIMIZER: of_two.tensors[OPTIMIZER]}))
    report = writer.close()
    # nothing was written before the first moment, so what lies there now is whole
    assert [failure.step for failure in report.failures] == ([] if moment == 1 else [2])
    for place in (run, away):
        assert all(verify(folder) == [] for folder in list_checkpoints(place))
    assert newest_valid(away) == (step_folder(away, 1), [])


KILLER = """
    import random

    logging.disable()
    rng = random.Random(4)
    for trial in range(12):
        run = root / str(trial)
        reading, writing = os.pipe()
        child = os.fork()  # starting Python anew each time would take a minute
        if child == 0:
            try:
                writer = CheckpointWriter(run, CheckpointConfig(keep_last=2), "")
                for step in range(1, 1_000):
                    writer.submit(snapshot(step, 200_000))
                    for done in writer.poll().written:
                        os.write(writing, b".")
            finally:
                os._exit(1)
        os.read(reading, 1)  # one is written
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        litter = any(name.startswith(".") for name in names_in(run))
        successor = os.fork()  # or this process would have threads, with which it must not fork again
        if successor == 0:
            try:
                writer = CheckpointWriter(run, CheckpointConfig(), "")
                write(writer, 2_000, 1_000)
                print(json.dumps({"litter": litter}), flush=True)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(successor, 0)[1] == 0
"""


def test_a_run_killed_while_a_checkpoint_is_written_beside_it_has_the_one_before(tmp_path: Path) -> None:
    """Row 1 of the fault catalogue: kill -9 at twelve random moments of the writing thread."""
    lines = run_child(KILLER, tmp_path)
    reports, litter = lines[::2], [line["litter"] for line in lines[1::2]]
    assert len(reports) == 12
    assert sum(litter) >= 4  # most were in the middle of a write
    for trial, report in enumerate(reports):
        run = tmp_path / str(trial)
        assert report["rejected"] == []
        assert report["written"] == [2000]
        complete = list_checkpoints(run)
        assert len(complete) >= 2
        assert all(verify(folder) == [] for folder in complete)
        checkpoint.sweep(run)
        assert names_in(run) == sorted(folder.name for folder in complete)


def write_all(run: Path, config: CheckpointConfig, losses: Mapping[int, float], attempt: int = 1) -> None:
    writer = CheckpointWriter(run, config, "", attempt)
    for step, loss in losses.items():
        writer.submit(snapshot(step, total=loss, accuracy=-loss))
    assert writer.close().failures == ()


def steps_in(run: Path) -> list[int]:
    return sorted(step_of(folder) for folder in list_checkpoints(run))


LOSSES = {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 4.0, 6: 6.0}


@pytest.mark.parametrize(("metric", "mode"), [("total", "min"), ("accuracy", "max")])
@pytest.mark.parametrize(
    ("count", "milestones", "kept"), [(1, None, [2, 6]), (2, None, [2, 4, 6]), (1, 3, [2, 3, 6])]
)
def test_the_best_stay_beside_the_newest_and_the_milestones(
    metric: str, mode: Any, count: int, milestones: int | None, kept: list[int], tmp_path: Path
) -> None:
    best = KeepBestConfig(metric=metric, mode=mode, count=count)
    config = CheckpointConfig(keep_last=1, keep_every_steps=milestones, keep_best=best)
    write_all(tmp_path, config, LOSSES)
    assert steps_in(tmp_path) == kept
    assert list(read_best(tmp_path).values) == [f"step-{step:08d}" for step in (2, 4)[:count]]


def test_without_a_metric_only_the_newest_stay(tmp_path: Path) -> None:
    write_all(tmp_path, CheckpointConfig(keep_last=2), LOSSES)
    assert steps_in(tmp_path) == [5, 6]
    assert not (tmp_path / FOLDER / BEST).exists()


MIN = CheckpointConfig(keep_last=1, keep_best=KeepBestConfig(metric="total", mode="min"))


def test_the_best_outlives_a_restart_unless_another_metric_is_asked_for(tmp_path: Path) -> None:
    write_all(tmp_path, MIN, {1: 5.0, 2: 1.0, 3: 3.0})
    write_all(tmp_path, MIN, {4: 2.0, 5: 4.0}, attempt=2)
    assert steps_in(tmp_path) == [2, 5]
    other = CheckpointConfig(keep_last=1, keep_best=KeepBestConfig(metric="total", mode="max"))
    write_all(tmp_path, other, {6: 0.5, 7: 0.1}, attempt=2)
    assert steps_in(tmp_path) == [6, 7]


def test_values_that_are_not_finite_or_not_there_are_never_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_all(tmp_path, MIN, {1: 5.0, 2: float("nan"), 3: float("-inf"), 4: 6.0})
    assert steps_in(tmp_path) == [1, 4]
    writer = CheckpointWriter(tmp_path, MIN, "")
    writer.submit(snapshot(5, loss=0.0))
    writer.close()
    assert steps_in(tmp_path) == [1, 5]
    assert "the log of step 5 has no 'total'; it has loss" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"metric": "total"}', '{"metric": 1, "mode": 2, "best": [3]}']
)
def test_a_damaged_list_of_the_best_is_told_and_begun_anew(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_all(tmp_path, MIN, {1: 1.0, 2: 3.0})
    (tmp_path / FOLDER / BEST).write_text(text)
    write_all(tmp_path, MIN, {3: 2.0, 4: 5.0})
    assert f"{BEST} is not readable" in caplog.text
    assert steps_in(tmp_path) == [3, 4]


def test_a_best_checkpoint_that_was_taken_away_makes_room_for_the_next_best(tmp_path: Path) -> None:
    write_all(tmp_path, MIN, {1: 1.0, 2: 3.0})
    shutil.rmtree(step_folder(tmp_path, 1))
    write_all(tmp_path, MIN, {3: 2.0, 4: 5.0})
    assert steps_in(tmp_path) == [3, 4]


def test_older_checkpoints_that_cannot_be_removed_do_not_make_the_new_one_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(checkpoint, "remove_checkpoint", refuse)
    write_all(tmp_path, CheckpointConfig(keep_last=1), {1: 0.0, 2: 0.0})
    assert steps_in(tmp_path) == [1, 2]
    assert "were not removed" in caplog.text


def mirrored(tmp_path: Path, **settings: Any) -> CheckpointConfig:
    return CheckpointConfig(mirror=str(tmp_path / "mirror"), **settings)


def test_the_mirror_gets_every_checkpoint_and_keeps_the_same_ones(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "mirror" / "run"
    config = mirrored(tmp_path, keep_last=1, keep_best=MIN.keep_best)
    writer, seen = CheckpointWriter(run, config, ""), []
    for step, loss in {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0}.items():
        writer.submit(snapshot(step, total=loss))
        until(lambda: not writer._mirror_is_behind and writer._snapshot is None)
        seen += [done.step for done in writer.poll().mirrored]
    assert writer.close() == Report()
    assert seen == [1, 2, 3, 4]
    assert sorted(path.name for path in there.iterdir()) == [mirror.RUN_ID, "step-00000002", "step-00000004"]
    for folder in there.glob("step-*"):
        assert verify(folder) == []
        assert (folder / STUDENT).read_bytes() == (run / FOLDER / folder.name / STUDENT).read_bytes()


def test_a_mirror_that_fails_is_told_and_counted_and_catches_up_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, there = tmp_path / "run", tmp_path / "mirror"
    there.write_text("a file where the folder should be")
    config = mirrored(tmp_path, keep_last=5, max_failures=1)
    writer = CheckpointWriter(run, config, "")
    until(lambda: not writer._mirror_is_behind)
    for step in (1, 2):
        writer.submit(snapshot(step))
        until(lambda: not writer._mirror_is_behind and writer._snapshot is None)
        report = writer.poll()
        assert [done.step for done in report.written] == [step]
        assert report.failures_in_a_row == 0
        assert report.mirror_failures
        assert "is not up to date" in caplog.text
    there.unlink()
    writer.submit(snapshot(3))
    report = writer.close()
    assert sorted(done.step for done in report.mirrored) == [1, 2, 3]
    assert report.mirror_failures == ()


def test_a_mirror_that_hangs_holds_up_no_checkpoint_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()

    def push(folder: Path, address: str) -> int:
        assert hanging.wait(30.0)
        return 0

    monkeypatch.setattr(mirror, "push", push)
    monkeypatch.setattr(mirror, "prune", lambda *arguments, **named: [])
    writer = CheckpointWriter(tmp_path / "run", mirrored(tmp_path, keep_last=9), "")
    for step in range(1, 5):
        assert writer.submit(snapshot(step)) < 5.0
    until(lambda: writer._snapshot is None)
    report = writer.close(timeout_seconds=0.2)
    assert [done.step for done in report.written] == [1, 2, 3, 4]
    assert [(failure.step, failure.reason) for failure in report.mirror_failures] == [
        (4, "not finished within 0.2 s")
    ]
    assert report.failures == ()
    hanging.set()


def test_what_the_attempt_before_did_not_get_to_the_mirror_goes_there_at_the_start(tmp_path: Path) -> None:
    write_all(tmp_path / "run", CONFIG, {1: 0.0, 2: 0.0})
    report = CheckpointWriter(tmp_path / "run", mirrored(tmp_path), "", attempt=2).close()
    assert [done.step for done in report.mirrored] == [2, 1]  # the newest first


def test_a_checkpoint_that_the_disk_has_spoilt_is_told_once_and_does_not_hold_up_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    write_all(run, CONFIG, {1: 0.0, 2: 0.0})
    (step_folder(run, 2) / STUDENT).write_bytes(b"spoilt")
    writer = CheckpointWriter(run, mirrored(tmp_path, keep_last=9), "")
    writer.submit(snapshot(3))
    report = writer.close()
    assert sorted(done.step for done in report.mirrored) == [1, 3]
    assert [failure.step for failure in report.mirror_failures] == [2]
    assert f"{STUDENT} is damaged" in caplog.text


def test_an_error_of_the_program_does_not_end_the_mirroring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, problems = mirror.push, [ValueError("a mistake")]

    def push(folder: Path, address: str) -> int:
        if problems:
            raise problems.pop()
        return real(folder, address)

    monkeypatch.setattr(mirror, "push", push)
    writer = CheckpointWriter(tmp_path / "run", mirrored(tmp_path), "")
    writer.submit(snapshot(1))
    until(lambda: writer._snapshot is None and not writer._mirror_is_behind)
    assert [failure.reason for failure in writer.poll().mirror_failures] == ["ValueError: a mistake"]
    assert "Traceback" in caplog.text
    caplog.clear()
    writer.submit(snapshot(2))
    assert sorted(done.step for done in writer.close().mirrored) == [1, 2]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mirror": "https://host/x"}, "cannot be written to"),
        ({"mirror": "ftp://host/x"}, "'ftp:' is refused"),
        ({"max_failures": 0}, "greater than 0"),
        ({"keep_best": {"metric": "total", "mode": "least"}}, "'min' or 'max'"),
        ({"keep_best": {"metric": "total"}}, "Field required"),
        ({"every": 3}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        CheckpointConfig.model_validate_json(json.dumps(settings), strict=True)
    assert CheckpointConfig.model_validate_json('{"mirror": "s3://bucket/x"}').mirror == "s3://bucket/x"
