"""Ranks that hang in every way there is, in real processes; limits of a second stand in for minutes."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from pydantic import ValidationError

from pretrain import watchdog
from pretrain.watchdog import SECTIONS, Watchdog, WatchdogConfig
from pretrain.watchdog_process import (
    Place,
    Report,
    Settings,
    Trainee,
    Watch,
    furthest_behind,
    numbers,
    verdict,
)

PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
LIMITS = dict.fromkeys(SECTIONS, 60.0)

RANK = """
import ctypes, json, os, sys, time
from pathlib import Path
from pretrain import watchdog

watchdog.POLL_SECONDS, watchdog.FOLDER_SECONDS = 0.05, 0.1

def hang_in_python():
    time.sleep(60)

def hang_holding_the_interpreter_lock():
    while True:
        ctypes.PyDLL(None).sleep(60)

def wait_for_the_others():
    sys.stdin.readline()

settings, rank, world_size, folder, script = sys.argv[1:]
config = watchdog.WatchdogConfig(**json.loads(settings))
dog = watchdog.Watchdog(config, int(rank), int(world_size), Path(folder))
dog.started()
exec(script)
dog.close()
print("done", flush=True)
"""


class Rank:
    """A process that says where it is, as a trainer does, and then behaves as the test wants."""

    def __init__(
        self, folder: Path, script: str, rank: int = 0, world_size: int = 1, **seconds: float
    ) -> None:
        limits = {f"{name}_seconds": value for name, value in seconds.items()}
        limits.setdefault("grace_seconds", 3.0)
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(limits), str(rank), str(world_size), str(folder), script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def said(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def side_process(self) -> int:
        pid = self.process.pid
        return int((Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()[0])

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it and the process beside it wrote to stderr."""
        assert self.process.stderr is not None
        code = self.process.wait(timeout=30)
        return code, self.process.stderr.read()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Rank]]:
    """Start ranks; those that a failed test leaves are killed."""
    ranks: list[Rank] = []

    class Started(Rank):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            ranks.append(self)

    yield Started
    for rank in ranks:
        with suppress(ProcessLookupError):
            rank.process.kill()
        rank.process.communicate(timeout=30)


def is_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    stat = Path("/proc") / str(pid) / "stat"
    while time.monotonic() < deadline:
        try:
            if ") Z " in stat.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def report(rank: int, section: str, step: int = 12, seconds: float = 50.0, **more: object) -> Report:
    values = {
        "host": f"node{rank}",
        "pid": 1000 + rank,
        "limited_by": section,
        "counted_seconds": seconds,
        "limit_seconds": 60.0,
        "state": "S",
    }
    return Report(rank=rank, step=step, section=section, seconds=seconds, **{**values, **more})  # type: ignore[arg-type]


# hangs


def test_a_rank_that_hangs_in_data_ends_both_with_one_verdict_that_names_it(
    start: type[Rank], tmp_path: Path
) -> None:
    """Fault 15: rank 1 sleeps in data, rank 0 waits for it in forward and is the first over its limit."""
    folder = tmp_path / "health" / "attempt-0002"
    waiting = start(folder, "dog.enter('forward', 12); wait_for_the_others()", 0, 2, forward=0.7, data=60)
    hanging = start(folder, "dog.enter('data', 12); hang_in_python()", 1, 2, forward=0.7, data=60)
    (code, told), (other_code, other_told) = waiting.end(), hanging.end()
    assert (code, other_code) == (-signal.SIGKILL, -signal.SIGKILL)
    assert told == (folder / "verdict.txt").read_text()
    assert other_told == ""
    assert told.count("\n") == 1
    host = os.uname().nodename
    assert told.startswith(f"pretrain: rank 1 ({host}) has been in 'data' of step 12 for ")
    assert f"; meanwhile rank 0 ({host}) has been in 'forward' of step 12 for " in told
    assert "(limit 0.7 s, watchdog.forward_seconds)" in told
    assert told.endswith(f"; stacks of all ranks in {folder}\n")
    assert "in wait_for_the_others" in (folder / "rank-0000.stacks.txt").read_text()
    assert "in hang_in_python" in (folder / "rank-0001.stacks.txt").read_text()
    kept = json.loads((folder / "rank-0001.json").read_text())
    assert (kept["rank"], kept["step"], kept["section"], kept["limit_seconds"]) == (1, 12, "data", 60.0)
    assert kept["pid"] == hanging.process.pid


def test_a_rank_that_holds_the_interpreter_lock_still_gives_its_stack_and_ends(
    start: type[Rank], tmp_path: Path
) -> None:
    """Fault 15: no thread of the rank's own could have noticed this."""
    rank = start(tmp_path, "dog.enter('backward', 3); hang_holding_the_interpreter_lock()", backward=0.5)
    code, told = rank.end()
    assert code == -signal.SIGKILL
    assert "rank 0" in told
    assert "'backward' of step 3 for 0." in told
    assert "(limit 0.5 s, watchdog.backward_seconds)" in told
    assert "in hang_holding_the_interpreter_lock" in (tmp_path / "rank-0000.stacks.txt").read_text()


def test_the_stacks_of_all_threads_are_kept(start: type[Rank], tmp_path: Path) -> None:
    script = "import threading; threading.Thread(target=hang_in_python, daemon=True).start()\n"
    rank = start(tmp_path, script + "dog.enter('step', 0); wait_for_the_others()", step=0.5)
    assert rank.end()[0] == -signal.SIGKILL
    stacks = (tmp_path / "rank-0000.stacks.txt").read_text()
    assert "in hang_in_python" in stacks
    assert "in wait_for_the_others" in stacks
    assert f"\n{rank.process.pid} (python" in stacks  # and the threads as the kernel sees them


def test_a_stopped_rank_is_ended_and_said_to_be_stopped(start: type[Rank], tmp_path: Path) -> None:
    rank = start(tmp_path, "dog.enter('step', 4); print('in', flush=True); hang_in_python()", step=0.7)
    assert rank.said() == "in"
    os.kill(rank.process.pid, signal.SIGSTOP)
    code, told = rank.end()
    assert code == -signal.SIGKILL
    assert "'step' of step 4" in told
    assert ", and is stopped by a signal;" in told
    assert "no stacks: the process does not run" in (tmp_path / "rank-0000.stacks.txt").read_text()


def test_a_rank_that_is_gone_is_named_first(start: type[Rank], tmp_path: Path) -> None:
    """Fault 14: rank 1 dies without a word while rank 0 waits for it."""
    waiting = start(tmp_path, "dog.enter('backward', 7); hang_in_python()", 0, 2, backward=0.5, grace=0.5)
    dead = start(tmp_path, "dog.enter('backward', 7); os._exit(9)", 1, 2, backward=0.5)
    assert dead.end()[0] == 9
    code, told = waiting.end()
    assert code == -signal.SIGKILL
    assert told.startswith("pretrain: no sign from rank 1: has it died, or is its node gone? rank 0 (")
    assert told.endswith(f"; stacks of the others in {tmp_path}\n")


def test_a_rank_without_a_folder_still_ends_and_gives_its_stack_on_stderr(
    start: type[Rank], tmp_path: Path
) -> None:
    """Fault 28: the shared file system is gone."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "attempt-0001"
    code, told = start(folder, "dog.enter('data', 1); hang_in_python()", 3, 4, data=0.5).end()
    assert code == -signal.SIGKILL
    first, *rest = told.splitlines()
    assert first.startswith("pretrain: rank 3 (")
    assert first.endswith(f"watchdog.data_seconds); {folder}: Not a directory, so its stacks follow")
    assert any("in hang_in_python" in line for line in rest)


def test_a_folder_that_never_answers_delays_the_end_by_a_bounded_time(
    start: type[Rank], tmp_path: Path
) -> None:
    """Fault 28: opening a pipe that nobody reads waits for ever, as a dead network mount does."""
    os.mkfifo(tmp_path / "alarm")
    rank = start(tmp_path, "dog.enter('data', 1); hang_in_python()", 0, 2, data=0.3, grace=0.3)
    code, told = rank.end()
    assert code == -signal.SIGKILL
    assert f"; {tmp_path}: did not answer within 2 s, so its stacks follow\n" in told
    assert "in hang_in_python" in told


def test_the_limit_of_init_holds_until_the_first_step_is_done(start: type[Rank], tmp_path: Path) -> None:
    """The first step compiles; all of it counts as init, but where in it a rank is gets told."""
    script = (
        "dog._starting = time.monotonic_ns()\nfor _ in range(60): dog.enter('forward', 0); time.sleep(0.05)"
    )
    code, told = start(tmp_path, script, init=1.0, forward=0.01).end()
    assert code == -signal.SIGKILL
    assert " has been in 'init' for 1." in told
    assert "(limit 1 s, watchdog.init_seconds), the last 0." in told
    assert " s in 'forward' of step 0; stacks" in told


# no false alarms


def test_slow_sections_that_move_raise_no_alarm(start: type[Rank], tmp_path: Path) -> None:
    """Fault 28: slow storage is not a hang; three slow batches together are far beyond the limit of one."""
    script = "for step in range(3): dog.enter('data', step); time.sleep(0.5); dog.enter('forward', step)"
    rank = start(tmp_path / "health", script, data=1.2, forward=1.2)
    assert rank.end() == (0, "")
    assert not (tmp_path / "health").exists()


def test_a_fast_loop_raises_no_alarm(start: type[Rank], tmp_path: Path) -> None:
    script = """
until = time.monotonic() + 1.0
step = 0
while time.monotonic() < until:
    step += 1
    for name in ("data", "forward", "backward", "step"):
        dog.enter(name, step)
"""
    rank = start(tmp_path, script, data=0.3, forward=0.3, backward=0.3, step=0.3)
    assert rank.end() == (0, "")


def test_a_machine_that_stood_still_gives_a_fresh_limit(start: type[Rank], tmp_path: Path) -> None:
    """0.4 s, a pause of 1.2 s that both processes share, 0.4 s: not one second of hanging."""
    rank = start(tmp_path, "dog.enter('data', 1); print('in', flush=True); wait_for_the_others()", data=1.0)
    assert rank.said() == "in"
    pids = rank.side_process(), rank.process.pid
    time.sleep(0.4)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.2)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    time.sleep(0.4)
    rank.tell()
    assert rank.end() == (0, "")


def test_no_alarm_while_a_debugger_is_attached_to_any_rank(start: type[Rank], tmp_path: Path) -> None:
    """Rank 1 is looked at; rank 0, which waits for it, keeps waiting; afterwards both end as usual."""
    script = "dog.enter('data', 1); print('in', flush=True); hang_in_python()"
    ranks = [start(tmp_path, script, rank, 2, data=0.6) for rank in range(2)]
    assert [rank.said() for rank in ranks] == ["in", "in"]
    detach, seized = threading.Event(), []

    def debug() -> None:  # a tracer is a thread; it lets go when it ends
        ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        seized.append(ptrace(PTRACE_SEIZE, ranks[1].process.pid, None, None))
        detach.wait(20)

    thread = threading.Thread(target=debug)
    thread.start()
    try:
        time.sleep(2.0)
        if seized != [0]:
            pytest.skip("this system lets no process trace another")
        assert [rank.process.poll() for rank in ranks] == [None, None]
        assert not (tmp_path / "verdict.txt").exists()
    finally:
        detach.set()
        thread.join()
    assert [rank.end()[0] for rank in ranks] == [-signal.SIGKILL] * 2


# the process beside a rank


def test_the_side_process_dies_with_its_rank(start: type[Rank], tmp_path: Path) -> None:
    rank = start(tmp_path, "print('in', flush=True); hang_in_python()")
    assert rank.said() == "in"
    beside = rank.side_process()
    rank.process.kill()
    assert is_gone(beside)


def test_signals_meant_for_the_rank_do_not_end_the_side_process(start: type[Rank], tmp_path: Path) -> None:
    """Also from its very first moment, when it has not yet come to ignore them."""
    script = """
import signal
numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
for _ in range(5):
    for number in numbers:
        os.kill(dog._process.pid, number)
    time.sleep(0.05)
time.sleep(0.2)
print(dog._process.poll(), flush=True)
"""
    rank = start(tmp_path, script)
    assert rank.said() == "None"
    assert rank.end() == (0, "")


def test_close_leaves_no_process_and_no_descriptor(tmp_path: Path) -> None:
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    dog = Watchdog(WatchdogConfig(), 0, 1, tmp_path / "health")
    assert dog._process is not None
    beside = dog._process.pid
    began = time.monotonic()
    dog.close()
    assert time.monotonic() - began < 10  # when asked: it is killed after 15
    dog.close()
    assert is_gone(beside)
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
    assert not (tmp_path / "health").exists()
    dog.enter("data", 3)  # of a closed watch: nothing


def test_two_ranks_that_end_well_leave_no_folder(start: type[Rank], tmp_path: Path) -> None:
    folder = tmp_path / "health"
    first = start(folder, "wait_for_the_others()", 0, 2)
    start(folder, "time.sleep(0.3)", 1, 2).end()
    assert (folder / "alarm").read_bytes() == b""  # there from the start, for network file systems
    first.tell()
    assert first.end() == (0, "")
    assert not folder.exists()


def test_a_side_process_that_died_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "LOOK_NANOSECONDS", 1_000_000)
    dog = Watchdog(WatchdogConfig(), 0, 1, tmp_path)
    assert dog._process is not None
    os.kill(dog._process.pid, signal.SIGKILL)
    assert is_gone(dog._process.pid)
    with caplog.at_level(logging.WARNING, "pretrain"):
        for step in range(10):
            time.sleep(0.002)
            dog.enter("data", step)
    assert [record.getMessage() for record in caplog.records] == [
        "the watchdog's process ended (code -9): hangs are not noticed any more"
    ]
    dog.close()


def test_the_side_process_starts_at_once_and_stays_small(tmp_path: Path) -> None:
    """Under 20 MB of memory (its own pages; 14 measured), and no library but Python's own."""
    with closing(Watchdog(WatchdogConfig(), 0, 1, tmp_path)) as dog:
        assert dog._process is not None
        proc = Path("/proc") / str(dog._process.pid)
        deadline = time.monotonic() + 5
        status: dict[str, str] = {}
        while time.monotonic() < deadline:
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            if int(status["SigIgn"], 16) >> signal.SIGTERM - 1 & 1:  # all is imported
                break
            time.sleep(0.01)
        assert int(status["VmRSS"].split()[0]) < 20_000
        assert "site-packages" not in (proc / "maps").read_text()


# what a rank says of itself


def place_of(dog: Watchdog) -> Place:
    assert dog._record is not None
    fd = os.memfd_create("copy")
    os.write(fd, dog._record)
    try:
        return Trainee(Settings(0, 1, os.getpid(), "", LIMITS, 1, 1, 1, fd, 0, 0, 0)).place()
    finally:
        os.close(fd)


def test_sections_nest_and_the_outer_ones_time_begins_anew(tmp_path: Path) -> None:
    with closing(Watchdog(WatchdogConfig(), 0, 1, tmp_path)) as dog:
        assert place_of(dog)[1:3] == ("init", -1)
        assert place_of(dog).starting_since is not None
        dog.started()
        assert place_of(dog).starting_since is None
        with dog.section("step", 5):
            outer = place_of(dog)
            with dog.section("checkpoint", 6):
                assert place_of(dog)[1:3] == ("checkpoint", 6)
            back = place_of(dog)
        assert back[1:3] == outer[1:3] == ("step", 5)
        assert back.since > outer.since
        # between two steps a rank is still where it was last: not back in init, as if behind all others
        assert place_of(dog)[1:3] == ("step", 5)
        with pytest.raises(RuntimeError), dog.section("data", 6), dog.section("evaluation", 6):
            raise RuntimeError
        assert place_of(dog)[1:3] == ("data", 6)
        dog.enter("forward", 6)
        with dog.section("checkpoint", 6):
            pass
        assert place_of(dog)[1:3] == ("forward", 6)


def test_a_reader_sees_no_mixture_of_two_places() -> None:
    """Another process writes places as fast as it can in which all numbers belong together."""
    writer = """
import mmap, sys, time
from pathlib import Path
from pretrain.watchdog import SECTIONS, Watchdog, WatchdogConfig
dog = Watchdog(WatchdogConfig(enabled=False), 0, 1, Path("nowhere"))
dog._record = memoryview(mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE)).cast("q")
time.monotonic_ns = lambda: (dog._count + 1) * 1000
while True:
    dog._starting = (dog._count + 1) * 1000
    dog.enter(SECTIONS[(dog._count + 1) % 7], dog._count + 1)
    sum(range(100))  # or there is no moment to read in
"""
    fd = os.memfd_create("record")
    os.ftruncate(fd, mmap.PAGESIZE)
    trainee = Trainee(Settings(0, 1, os.getpid(), "", LIMITS, 1, 1, 1, fd, 0, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", writer, str(fd)], pass_fds=[fd])
    seen = set()
    try:
        deadline = time.monotonic() + 5
        while not trainee.place().num_entries and time.monotonic() < deadline:
            time.sleep(0.01)
        deadline = time.monotonic() + 10
        while len(seen) < 300 and time.monotonic() < deadline:
            place = trainee.place()
            if not place.is_whole:  # the writer lost its turn in the middle
                continue
            assert SECTIONS.index(place.section) == place.num_entries % 7
            assert place.step == place.num_entries
            assert place.since == place.starting_since == place.num_entries * 1000 / 1e9
            seen.add(place.num_entries)
    finally:
        process.kill()
        process.wait()
        os.close(fd)
    assert len(seen) == 300


def test_a_half_written_place_is_given_up_after_many_tries() -> None:
    """A rank may be stopped while it writes; that must not hold up the process beside it."""
    fd = os.memfd_create("record")
    os.write(fd, struct.pack("@6q", 8, 1, 12, 10**9, 0, 7).ljust(mmap.PAGESIZE, b"\0"))
    trainee = Trainee(Settings(0, 1, os.getpid(), "", LIMITS, 1, 1, 1, fd, 0, 0, 0))
    os.close(fd)
    assert trainee.place() == Place(8, "data", 12, 1.0, None, is_whole=False)


def test_to_enter_a_section_costs_less_than_two_microseconds(tmp_path: Path) -> None:
    with closing(Watchdog(WatchdogConfig(), 0, 1, tmp_path)) as dog:
        enter, best = dog.enter, float("inf")
        for _ in range(300):  # the best of many short ones: other processes share the machine
            began = time.perf_counter()
            for step in range(200):
                enter("data", step)
            best = min(best, (time.perf_counter() - began) / 200)
        assert best < 2e-6


def test_a_disabled_watchdog_does_nothing(tmp_path: Path) -> None:
    children = Path("/proc/self/task") / str(os.getpid()) / "children"
    before = children.read_text()
    dog = Watchdog(WatchdogConfig(enabled=False), 0, 2, tmp_path / "health")
    with dog.section("data", 0):
        dog.enter("forward", 0)
    dog.started()
    assert children.read_text() == before
    dog.close()


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_limits_are_finite_and_positive(seconds: float) -> None:
    with pytest.raises(ValidationError):
        WatchdogConfig(data_seconds=seconds)


def test_every_section_has_a_limit_of_its_own() -> None:
    limits = WatchdogConfig().limits()
    assert tuple(limits) == SECTIONS
    assert limits == {
        "init": 1800, "data": 600, "forward": 600, "backward": 600, "step": 600, "checkpoint": 1800,
        "evaluation": 7200,
    }  # fmt: skip


def test_what_a_report_counts_against_the_limit() -> None:
    """The section's time after the first step; all since the start before; never from before a pause."""
    fd = os.memfd_create("record")
    os.ftruncate(fd, mmap.PAGESIZE)
    limits = {**LIMITS, "init": 1800.0}
    watch = Watch(Settings(0, 1, os.getpid(), "", limits, 1, 1, 1, fd, 0, 0, 0))
    os.close(fd)
    watch.fresh = 0.0
    found = watch.report(Place(9, "data", 4, 100.0, None), now=170.0)
    assert (found.limited_by, found.counted_seconds, found.is_over) == ("data", 70.0, True)
    found = watch.report(Place(9, "data", 4, 100.0, 20.0), now=170.0)
    assert (found.limited_by, found.counted_seconds, found.seconds, found.is_over) == (
        "init",
        150.0,
        70.0,
        False,
    )
    watch.fresh = 165.0
    found = watch.report(Place(9, "data", 4, 100.0, None), now=170.0)
    assert (found.counted_seconds, found.seconds, found.is_over) == (5.0, 70.0, False)


# the verdict


@pytest.mark.parametrize(
    ("reports", "behind"),
    [
        ([report(0, "forward"), report(1, "data")], [1]),
        ([report(0, "data", step=13), report(1, "checkpoint", step=12)], [1]),  # an earlier step counts first
        ([report(0, "data"), report(1, "init", step=-1)], [1]),
        ([report(0, "backward"), report(1, "backward", seconds=49.0), report(2, "step")], [0, 1]),
        (
            [report(0, "backward"), report(1, "backward", seconds=61.0), report(2, "step")],
            [1],
        ),  # alone before
        ([report(0, "backward"), report(1, "backward", state="T")], [1]),
        ([report(0, "step", state="T"), report(1, "backward")], [1]),  # stopped, but further than another
    ],
)
def test_the_ranks_the_others_wait_for(reports: list[Report], behind: list[int]) -> None:
    assert [found.rank for found in furthest_behind(reports, SECTIONS)] == behind
    assert [found.rank for found in furthest_behind(reports[::-1], SECTIONS)] in (behind, behind[::-1])


def test_the_verdict_in_words() -> None:
    over = report(1, "data", seconds=61.0)
    assert verdict([report(0, "forward"), over], 2, SECTIONS) == (
        "rank 1 (node1) has been in 'data' of step 12 for 61 s (limit 60 s, watchdog.data_seconds)"
    )
    assert verdict([report(0, "forward", seconds=61.0), report(1, "data", seconds=60.0)], 4, SECTIONS) == (
        "no sign from ranks 2, 3: have they died, or is their node gone? "
        "rank 1 (node1) has been in 'data' of step 12 for 60 s; "
        "meanwhile rank 0 (node0) has been in 'forward' of step 12 for 61 s "
        "(limit 60 s, watchdog.forward_seconds)"
    )
    together = [report(rank, "backward", seconds=60.0 + rank / 2) for rank in range(4)]
    assert verdict(together, 4, SECTIONS) == (
        "ranks 0-3 have been in 'backward' of step 12 for 62 s (limit 60 s, watchdog.backward_seconds)"
    )
    assert verdict([report(0, "data", seconds=61.0, state="D")], 1, SECTIONS).endswith(
        "watchdog.data_seconds), and waits in the kernel (storage or a driver)"
    )


def test_ranks_are_told_in_runs() -> None:
    assert numbers([3]) == "rank 3"
    assert numbers([7, 2, 4, 5, 6]) == "ranks 2, 4-7"
    assert numbers([0, 1]) == "ranks 0, 1"
