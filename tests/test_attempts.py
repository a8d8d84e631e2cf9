from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_config import small_config

from pretrain import attempts, checkpoint
from pretrain.attempts import (
    FOLDER,
    Attempt,
    FencedError,
    Owner,
    begin,
    check_progress,
    is_over,
    joined,
    lineage,
    this_process,
)
from pretrain.errors import TrainingError, UserError
from pretrain.preflight import Inspected, Request
from pretrain.run_folder import begin_attempt, open_folder

LEASE_SECONDS = 0.4  # of tests in which one is waited for
WATCH_SECONDS = 4.0  # of tests in which the other lives, and shows it well before the end
NEVER_SECONDS = 3600.0  # of tests that must not wait for it


def elsewhere(job: str | None = None, restart: int = 0) -> Owner:
    """A process of another machine, of which only the beat can be seen."""
    return replace(this_process(job, restart), host="node9", boot_id="another")


def dead(job: str | None = None, restart: int = 0) -> Owner:
    """A process of this machine that is gone: its pid is ours, but began at another time."""
    return replace(this_process(job, restart), start_ticks=1)


def content(run: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / FOLDER / f"{number:04d}.json").read_text())
    return found


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / FOLDER).iterdir())


def wait_until(holds: Callable[[], bool]) -> None:
    """However slow the machine is; the suite's own time limit ends what never holds."""
    while not holds():
        time.sleep(0.005)


def beat_of(run: Path) -> int:
    return int((run / FOLDER / "0001.beat").read_text())


@contextmanager
def beating(attempt: Attempt) -> Iterator[None]:
    """Alive, as if on another machine."""
    attempt.watch(lambda newer: None)
    try:
        yield
    finally:
        attempt._stopping.set()
        assert attempt._thread is not None
        attempt._thread.join()


OTHER = """
    import sys
    from pathlib import Path
    from pretrain import attempts
    attempt = attempts.begin(Path(sys.argv[1]), attempts.this_process("slurm 7", 0), 3600)
    print(attempt.number, flush=True)
    {then}
"""


def start_other(run: Path, then: str = "sys.stdin.read()") -> subprocess.Popen[str]:
    """Another process that has begun an attempt, and then does what is told."""
    command = [sys.executable, "-c", textwrap.dedent(OTHER).format(then=then), str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdecimal()
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=30)


def test_an_attempt_tells_who_holds_the_run_from_where_it_began_and_how_it_ended(tmp_path: Path) -> None:
    attempt = begin(tmp_path / "run", this_process("slurm 7", 2), about={"commit": "abc"})
    attempt.began_from(None, 0)
    attempt.finish("done", 120)
    found = content(tmp_path / "run", 1)
    assert found.pop("since").startswith("20")
    owner = found.pop("owner")
    assert (owner["pid"], owner["job"], owner["restart"]) == (os.getpid(), "slurm 7", 2)
    assert found == {
        "attempt": 1,
        "about": {"commit": "abc"},
        "began_from": {"attempt": None, "step": 0},
        "outcome": "done",
        "step": 120,
    }
    assert names(tmp_path / "run") == ["0001.beat", "0001.json"]


def test_a_second_job_is_refused_with_the_owner_and_a_killed_one_is_replaced_at_once(tmp_path: Path) -> None:
    """Row 9: the pid tells on the same machine, so that nobody waits for a lease of an hour."""
    other = start_other(tmp_path)
    try:
        with pytest.raises(UserError) as caught:
            begin(tmp_path, this_process("slurm 8"), NEVER_SECONDS)
        line = str(caught.value)
        since = content(tmp_path, 1)["since"]
        for told in (
            f"pid {other.pid}",
            this_process().host,
            "slurm 7",
            since,
            "--output-dir",
            str(tmp_path),
        ):
            assert told in line
        assert "\n" not in line
        assert names(tmp_path) == ["0001.beat", "0001.json"]
        other.kill()
        while other.poll() is None:
            time.sleep(0.01)
    finally:
        end(other)
    assert begin(tmp_path, this_process("slurm 8"), NEVER_SECONDS).number == 2


def test_a_killed_process_that_nobody_has_reaped_is_dead(tmp_path: Path) -> None:
    """Row 9: a launcher that hangs leaves its dead rank 0 as a zombie, which still has its pid."""
    other = start_other(tmp_path)
    try:
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and still not reaped
        assert begin(tmp_path, this_process(), NEVER_SECONDS).number == 2
    finally:
        end(other)


def test_a_pid_that_was_given_to_another_process_does_not_hold_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 9."""
    begin(tmp_path, dead("slurm 7"), NEVER_SECONDS)
    with caplog.at_level(logging.WARNING, "pretrain"):
        assert begin(tmp_path, this_process(), NEVER_SECONDS).number == 2
    assert "attempt 1 (pid" in caplog.text
    assert "is dead" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"host": "node9"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"boot_id": ""}]
)
def test_an_attempt_of_another_machine_boot_or_container_holds_the_run_while_it_beats(
    changes: dict[str, str], tmp_path: Path
) -> None:
    """Row 9: a pid says something only where it was given; its lease is waited for, and not cut short."""
    first = begin(tmp_path, replace(this_process(), start_ticks=1, **changes), LEASE_SECONDS)  # type: ignore[arg-type]
    with beating(first), pytest.raises(UserError, match=r"attempt 1 \(pid .* still runs"):
        begin(tmp_path, this_process(), WATCH_SECONDS)
    began = time.monotonic()
    assert begin(tmp_path, this_process(), LEASE_SECONDS).number == 2
    assert time.monotonic() - began >= LEASE_SECONDS


def test_a_run_that_ends_while_it_is_watched_is_taken_at_once(tmp_path: Path) -> None:
    first = begin(tmp_path, elsewhere(), LEASE_SECONDS)
    threading.Timer(0.1, first.finish, ["preempted", 5]).start()
    began = time.monotonic()
    assert begin(tmp_path, this_process(), 20.0).number == 2
    assert time.monotonic() - began < 10


def test_a_requeued_job_takes_over_from_its_own_former_start_though_that_still_beats(tmp_path: Path) -> None:
    first = begin(tmp_path, elsewhere("slurm 7", 0), LEASE_SECONDS)
    with beating(first):
        for job, restart in (("slurm 7", 0), ("slurm 8", 1), (None, 1)):
            with pytest.raises(UserError, match="still runs"):
                begin(tmp_path, this_process(job, restart), WATCH_SECONDS)
        began = time.monotonic()
        assert begin(tmp_path, this_process("slurm 7", 1), NEVER_SECONDS).number == 2
        assert time.monotonic() - began < 2
    assert first.is_fenced()


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("after", ["nothing", "a dead attempt"])
def test_of_many_starts_at_once_exactly_one_gets_the_run(
    after: str, hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 9, also on file systems without hard links."""
    if not hard_links:

        def link(*arguments: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)
    if after != "nothing":
        begin(tmp_path, dead(), NEVER_SECONDS)
    together, got, refused = threading.Barrier(8), [], []

    def start() -> None:
        together.wait()
        try:
            got.append(begin(tmp_path, this_process(), LEASE_SECONDS).number)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = 1 if after == "nothing" else 2
    assert got == [expected]
    assert len(refused) == 7
    assert all(f"attempt {expected} (pid" in line for line in refused)
    assert names(tmp_path) == [
        f"{number:04d}.{kind}" for number in range(1, expected + 1) for kind in ("beat", "json")
    ]


def test_a_link_that_succeeded_but_was_answered_twice_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does when an answer gets lost: the second request finds what the first has made."""
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link)
    assert begin(tmp_path, this_process(), NEVER_SECONDS).number == 1


def test_every_rank_of_a_stale_attempt_learns_once_of_the_one_that_took_over(tmp_path: Path) -> None:
    first = begin(tmp_path, elsewhere("slurm 7", 0), LEASE_SECONDS)
    rank_1 = joined(tmp_path, 1, LEASE_SECONDS)
    told: dict[int, list[str]] = {0: [], 1: []}
    first.watch(told[0].append)
    rank_1.watch(told[1].append)
    time.sleep(LEASE_SECONDS / 2)
    assert told == {0: [], 1: []}
    second = begin(tmp_path, this_process("slurm 7", 1), LEASE_SECONDS)
    wait_until(lambda: all(told.values()))
    before = beat_of(tmp_path)
    time.sleep(LEASE_SECONDS)
    assert beat_of(tmp_path) == before  # it holds nothing any more
    assert all(len(of_rank) == 1 for of_rank in told.values())
    for (line,) in told.values():
        assert f"attempt 2 (pid {os.getpid()} on {this_process().host}, slurm 7 (restart 1)" in line
    assert (first.is_fenced(), rank_1.is_fenced(), second.is_fenced()) == (True, True, False)
    with pytest.raises(FencedError, match="attempt 2"):
        first.began_from(None, 0)
    rank_1.finish("failed", 3)
    assert content(tmp_path, 1)["outcome"] is None  # rank 0 alone writes
    assert content(tmp_path, 2)["began_from"] is None


def test_the_counter_rises_while_an_attempt_is_watched_and_stops_with_it(tmp_path: Path) -> None:
    attempt = begin(tmp_path, this_process(), 0.06)
    attempt.watch(lambda newer: None)
    wait_until(lambda: beat_of(tmp_path) > 5)
    attempt.finish("done", 1)
    last = beat_of(tmp_path)
    time.sleep(0.1)
    assert beat_of(tmp_path) == last
    attempt.finish("failed", 2)  # as a `finally` does
    assert (content(tmp_path, 1)["outcome"], content(tmp_path, 1)["step"]) == ("done", 1)


def test_a_folder_that_vanishes_is_told_once_and_stops_neither_the_run_nor_the_beat(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = begin(tmp_path / "run", this_process(), 0.06)
    attempt.watch(lambda newer: pytest.fail("fenced by nobody"))
    (tmp_path / "run").rename(tmp_path / "gone")
    with caplog.at_level(logging.WARNING, "pretrain"):
        wait_until(lambda: "cannot show that it lives" in caplog.text)
        told_at = attempt._count
        wait_until(lambda: attempt._count > told_at + 3)
        assert caplog.text.count("cannot show that it lives") == 1
    (tmp_path / "gone").rename(tmp_path / "run")
    before = beat_of(tmp_path / "run")
    wait_until(lambda: beat_of(tmp_path / "run") > before)
    (tmp_path / "run").rename(tmp_path / "gone")
    attempt.finish("failed", 1)
    assert "how attempt 1 ended could not be written down" in caplog.text


def test_a_full_disk_ends_a_start_as_trouble_that_may_pass_and_is_a_warning_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = begin(tmp_path, this_process(), NEVER_SECONDS)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "pwrite"):
        monkeypatch.setattr(os, name, full)
    attempt.beat()
    attempt.beat()
    attempt.finish("preempted", 3)
    assert caplog.text.count("No space left") == 2  # the beat, and the end
    with pytest.raises(TrainingError, match=r"cannot be written \(No space left.*make room"):
        begin(tmp_path / "other", this_process(), NEVER_SECONDS)
    assert names(tmp_path) == ["0001.beat", "0001.json"]
    assert names(tmp_path / "other") == []


def test_clocks_that_jump_or_disagree_between_machines_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 40: durations are of the monotonic clock, order is by number; wall time is shown to people only."""
    jumps = iter([10_000.0, 1e9, 5.0, 2e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    first = begin(tmp_path, elsewhere(), LEASE_SECONDS)
    path = tmp_path / FOLDER / "0001.json"
    path.write_text(json.dumps({**content(tmp_path, 1), "since": "2999-12-31T23:59:59+00:00"}))
    os.utime(path, (0, 0))
    with beating(first), pytest.raises(UserError, match="since 2999-12-31"):
        begin(tmp_path, this_process(), WATCH_SECONDS)
    began = time.monotonic()
    assert begin(tmp_path, this_process(), LEASE_SECONDS).number == 2
    assert LEASE_SECONDS <= time.monotonic() - began < 10 * LEASE_SECONDS
    assert first.is_fenced()


def test_a_watch_during_which_the_machine_or_its_storage_stood_still_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 40: what stopped us may have stopped the other, which beats again a little later than we look."""
    first = begin(tmp_path, elsewhere(), LEASE_SECONDS)
    clock, looks = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal clock, looks
        looks += 1
        clock += 1000 if looks == 1 else seconds
        if looks == 10:
            first.beat()

    monkeypatch.setattr(attempts, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock))
    with pytest.raises(UserError, match="still runs"):
        begin(tmp_path, this_process(), 60.0)
    assert looks == 10


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00\x80"),
    "null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "another form": lambda path: path.write_text('{"attempt": 1, "owner": "me"}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "another number": lambda path: path.write_text(path.read_text().replace('"attempt": 1', '"attempt": 7')),
    "a wrong type": lambda path: path.write_text(path.read_text().replace('"step": 10', '"step": "10"')),
    "a negative step": lambda path: path.write_text(path.read_text().replace('"step": 10', '"step": -1')),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_attempt_file_is_told_not_believed_and_costs_no_checkpoint(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = begin(tmp_path, elsewhere(), LEASE_SECONDS)
    first.began_from(None, 10)
    first.finish("failed", 10)
    damage(tmp_path / FOLDER / "0001.json")
    found = lineage(tmp_path)
    assert len(found.problems) == 1
    assert "0001.json: is damaged" in found.problems[0]
    assert found.allows(1, 20)
    check_progress(tmp_path, 0, 1)
    assert not is_over(tmp_path, 1)
    with caplog.at_level(logging.WARNING, "pretrain"):
        second = begin(tmp_path, this_process(), LEASE_SECONDS)
    assert second.number == 2
    assert "0001.json: is damaged" in caplog.text
    second.began_from(1, 30)
    assert [lineage(tmp_path).allows(1, step) for step in (30, 31)] == [True, False]


def test_an_attempt_whose_file_is_damaged_still_holds_the_run_while_it_beats(tmp_path: Path) -> None:
    first = begin(tmp_path, this_process(), LEASE_SECONDS)
    (tmp_path / FOLDER / "0001.json").write_text("")
    with beating(first), pytest.raises(UserError, match="attempt 1, whose file is damaged, still runs"):
        begin(tmp_path, this_process(), WATCH_SECONDS)


def run_of(tmp_path: Path, *origins: tuple[int | None, int] | None) -> Path:
    """A run with an attempt for each origin; None has begun from nowhere yet."""
    for number, origin in enumerate(origins, start=1):
        attempt = begin(tmp_path, dead(), NEVER_SECONDS)
        assert attempt.number == number
        if origin:
            attempt.began_from(*origin)
    return tmp_path


def test_the_lineage_is_what_the_newest_attempt_wrote_and_what_led_to_it(tmp_path: Path) -> None:
    """Worked by hand: 2 began at step 100 of 1, 3 as well (2 was stale), 4 at step 150 of 3."""
    run = run_of(tmp_path, (None, 0), (1, 100), (1, 100), (3, 150), None)
    found = lineage(run)
    assert found.problems == ()
    allowed = {
        number: [s for s in (50, 100, 101, 150, 151, 9999) if found.allows(number, s)] for number in range(7)
    }
    every = [50, 100, 101, 150, 151, 9999]
    assert allowed == {0: [], 1: [50, 100], 2: [], 3: [50, 100, 101, 150], 4: every, 5: [], 6: []}


def test_a_run_that_goes_back_twice_keeps_only_what_lies_before_both_places(tmp_path: Path) -> None:
    found = lineage(run_of(tmp_path, (None, 0), (1, 100), (2, 50)))
    assert [found.allows(1, 50), found.allows(1, 60), found.allows(2, 50), found.allows(2, 60)] == [
        True,
        False,
        True,
        False,
    ]


def test_runs_without_attempts_and_attempts_that_began_from_nowhere_allow_everything(tmp_path: Path) -> None:
    assert lineage(tmp_path / "absent").allows(1, 1000)
    (tmp_path / "copied" / FOLDER).mkdir(parents=True)
    assert lineage(tmp_path / "copied").allows(3, 1000)
    assert lineage(run_of(tmp_path / "run", None, None)).allows(1, 1000)
    begin(tmp_path / "run", this_process(), NEVER_SECONDS).began_from(None, 0)
    assert not lineage(tmp_path / "run").allows(1, 1000)


@pytest.mark.parametrize("origin", [(1, 5), (2, 5), (9, 5)])
def test_an_attempt_that_claims_to_descend_from_itself_or_from_none_ends_the_lineage(
    origin: tuple[int, int], tmp_path: Path
) -> None:
    found = lineage(run_of(tmp_path, origin, (1, 7)))
    assert found.allows(2, 100)
    assert found.allows(1, 7)
    assert not found.allows(1, 8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=7))
def test_the_lineage_of_any_history_is_the_set_carried_from_each_attempt_to_the_next(
    tmp_path_factory: pytest.TempPathFactory, choices: list[tuple[int, int]]
) -> None:
    """Against a slow reference that carries the whole set of allowed places forward."""
    allowed: dict[int, set[tuple[int, int]]] = {}
    run = tmp_path_factory.mktemp("history")
    for number, (choice, step) in enumerate(choices, start=1):
        parent = choice % number  # 0: of none
        inherited = {place for place in allowed.get(parent, set()) if place[1] <= step}
        allowed[number] = inherited | {(number, own) for own in range(10)}
        record = attempts.Record(number, dead(), "", {}, attempts.Origin(parent or None, step))
        path = run / FOLDER / f"{number:04d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(attempts._RECORD.dump_json(record))
        found = lineage(run)
        places = {(n, s) for n in range(1, len(choices) + 2) for s in range(10)}
        assert {place for place in places if found.allows(*place)} == allowed[number]


CRASH = "attempt.began_from(*((None, 0) if attempt.number == 1 else (1, 500))); import os; os._exit(1)"


def test_a_job_that_crashes_at_the_same_step_three_times_is_not_started_a_fourth_time(tmp_path: Path) -> None:
    """Row 13: with real processes; the first one came as far as the checkpoint of step 500."""
    for number in range(1, 5):
        check_progress(tmp_path, 500 if number > 1 else 0, 3)
        other = start_other(tmp_path, CRASH)
        assert other.wait(30) == 1
        end(other)
    with pytest.raises(UserError) as caught:
        check_progress(tmp_path, 500, 3)
    line = str(caught.value)
    for told in ("attempts 2, 3, 4 ", "step 500;", str(tmp_path / "train.log"), "guard.max_idle_attempts"):
        assert told in line
    assert "\n" not in line
    for newest_step, limit in ((501, 3), (500, 4), (500, 0)):
        check_progress(tmp_path, newest_step, limit)


@pytest.mark.parametrize(
    ("history", "newest_step", "is_refused"),
    [
        ([(0, "failed"), (0, None), (0, "preempted")], 0, True),  # requeued before it had time to progress
        ([(0, "failed"), (0, "failed")], 0, False),
        ([(0, "failed"), (0, "done"), (0, "failed")], 0, False),
        ([(0, "done"), (0, "done"), (0, "done")], 0, False),
        ([(0, "failed"), (0, "failed"), (40, "failed")], 40, False),
        ([(0, None), (40, None), (40, None), (40, None)], 40, True),
        ([(None, None), (None, "failed"), (None, None)], 0, True),  # over before they began from anywhere
        ([(0, None), (None, None), (None, None), (40, None)], 40, True),
        ([(0, None), (None, None), (None, None)], 40, False),
        ([(40, None), (40, None), (40, None)], 30, True),  # and what they began from is damaged now
    ],
)
def test_what_counts_as_no_progress(
    history: list[tuple[int | None, attempts.Outcome | None]],
    newest_step: int,
    is_refused: bool,
    tmp_path: Path,
) -> None:
    """Row 13."""
    for step, outcome in history:
        attempt = begin(tmp_path, dead(), NEVER_SECONDS)
        if step is not None:
            attempt.began_from(None, step)
        if outcome:
            attempt.finish(outcome, step or 0)
    own = None
    for _ in range(2):  # the one that asks counts neither before it has begun nor after
        if is_refused:
            with pytest.raises(UserError, match=f"wrote no checkpoint beyond step {newest_step}"):
                check_progress(tmp_path, newest_step, 3)
        else:
            check_progress(tmp_path, newest_step, 3)
        own = own or begin(tmp_path, this_process(), NEVER_SECONDS)


KILLER = """
    import os, signal, sys
    from pathlib import Path
    from pretrain import attempts

    def die_at(moment):
        def counted(function):
            def wrapper(*arguments, **settings):
                nonlocal moment
                moment -= 1
                if moment == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **settings)
            return wrapper
        for name in ("fsync", "link", "pwrite", "open", "close"):
            setattr(os, name, counted(getattr(os, name)))
        for name in ("open", "replace", "unlink"):
            setattr(Path, name, counted(getattr(Path, name)))

    moment, code = 0, None
    while code != 0:
        moment += 1
        run = Path(sys.argv[1], str(moment))
        child = os.fork()
        if child == 0:
            die_at(moment)
            attempt = attempts.begin(run, attempts.this_process(), 3600)
            attempt.began_from(None, 0)
            attempt.finish("done", 5)
            os._exit(0)
        code = os.waitpid(child, 0)[1]
        assert code in (0, signal.SIGKILL), code
"""


def test_a_start_killed_at_any_moment_leaves_files_that_are_whole_and_a_run_that_can_be_taken(
    tmp_path: Path,
) -> None:
    """Row 1, of the attempt files: just before each thing that touches the disk."""
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path)], check=True, timeout=120, cwd=tmp_path
    )
    moments = sorted(int(path.name) for path in tmp_path.iterdir())
    assert len(moments) > 20
    num_with_litter = 0
    for moment in moments:
        run = tmp_path / str(moment)
        num_before = len(list((run / FOLDER).glob("*.json")))
        num_with_litter += any(path.name.endswith(".new") for path in (run / FOLDER).iterdir())
        assert lineage(run).problems == ()
        attempt = begin(run, this_process(), NEVER_SECONDS)
        assert attempt.number == num_before + 1
        assert not [path for path in (run / FOLDER).iterdir() if path.name.endswith(".new")]
    assert num_with_litter > 3


def test_an_attempt_gets_a_number_above_every_checkpoint_of_a_run_older_than_attempts(tmp_path: Path) -> None:
    for name in ("step-00000100", ".writing-step-00000300.6-4711", "aside-step-00000200.4", "step-7.x"):
        (tmp_path / checkpoint.FOLDER / name).mkdir(parents=True)
    attempt = begin_attempt(tmp_path, this_process())
    assert attempt.number == 7
    about = content(tmp_path, 7)["about"]
    assert about["command"] == sys.argv
    assert about["packages"]["torch"]
    attempt.finish("failed", 0)


def test_a_run_that_opens_its_folder_records_its_origin_and_puts_aside_what_does_not_lead_there(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    request = Request(small_config(tmp_path), run, "auto")

    def opened(resume_from: Path | None) -> int:
        attempt = begin_attempt(run, dead(), NEVER_SECONDS)
        handler = open_folder(request, cast(Inspected, SimpleNamespace(resume_from=resume_from)), attempt)
        logging.getLogger("pretrain").removeHandler(handler)
        handler.close()
        return attempt.number

    def written(step: int, attempt: int) -> Path:
        weights = {checkpoint.STUDENT: {"w": torch.zeros(1)}, checkpoint.OPTIMIZER: {}}
        return checkpoint.write_checkpoint(run, step, weights, {"step": step}, "", attempt)

    def left() -> list[str]:
        return sorted(path.name for path in (run / checkpoint.FOLDER).iterdir())

    assert opened(None) == 1
    assert content(run, 1)["began_from"] == {"attempt": None, "step": 0}
    old, beyond = written(100, 1), written(200, 1)
    assert opened(old) == 2
    assert content(run, 2)["began_from"] == {"attempt": 1, "step": 100}
    assert left() == ["aside-step-00000200", "step-00000100"]
    newer = written(200, 2)
    # attempt 1 lives on and writes where no check stops it
    stale = checkpoint.step_folder(run, 150)
    stale.mkdir()
    assert checkpoint.list_checkpoints(run) == [newer, old]
    assert opened(newer) == 3
    assert left() == ["aside-step-00000150", "aside-step-00000200", "step-00000100", "step-00000200.2"]
    assert not beyond.exists()
    # what was put aside can be chosen again, by its path
    assert opened(run / checkpoint.FOLDER / "aside-step-00000200") == 4
    assert content(run, 4)["began_from"] == {"attempt": 1, "step": 200}
    assert checkpoint.list_checkpoints(run) == [old]
