"""Stopping early: what a signal does, when the clock says stop, and how all ranks come to one reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain import preempt
from pretrain.preempt import REASONS, PreemptConfig, Preemption, decode, encode, should_requeue


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_a_signal_is_noted_and_the_process_lives_on(name: str) -> None:
    """Fault 10: the step under way can be finished and saved."""
    preemption = Preemption(PreemptConfig())
    preemption.install()
    assert preemption.asked_for() is None
    assert preemption.code() == 0
    send(signal.Signals[f"SIG{name}"])
    assert preemption.asked_for() == preemption.asked == f"signal {name}"
    assert decode(preemption.code(), 1) == f"signal {name}"


def test_the_same_signal_within_a_second_is_one_arrival(clock: Clock) -> None:
    """Slurm sends SIGTERM twice at the time limit; either would end the test if it counted as the second."""
    preemption = Preemption(PreemptConfig(), clock=clock)
    preemption.install()
    for clock.now in (1000.0, 1000.0, 1000.9):
        send(signal.SIGTERM)
    assert preemption.asked == "signal TERM"


CHILD = """
import os, signal, sys, time
from pretrain.preempt import Preemption, PreemptConfig
now = [0.0]
preemption = Preemption(PreemptConfig(), clock=lambda: now[0])
preemption.install()
"""


def run_child(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD + textwrap.dedent(body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("first", "seconds", "second"),
    [("TERM", 1.0, "TERM"), ("USR1", 0.0, "TERM"), ("USR1", 300.0, "USR2"), ("USR2", 1.5, "USR2")],
)
def test_a_second_signal_ends_the_process_at_once_and_says_so(
    first: str, seconds: float, second: str
) -> None:
    """Fault 10: 128 plus the number, as a shell would report it, and no clean-up that could hang."""
    done = run_child(
        f"""
        os.kill(os.getpid(), signal.SIG{first})
        now[0] += {seconds}
        try:
            os.kill(os.getpid(), signal.SIG{second})
            time.sleep(20)
        finally:
            print("cleaned up", flush=True)
        """
    )
    assert done.returncode == 128 + signal.Signals[f"SIG{second}"]
    assert done.stderr == f"pretrain: SIG{second} after SIG{first}: ends at once\n"
    assert done.stdout == ""


def test_once_it_is_leaving_nothing_changes_the_exit_code() -> None:
    """Slurm sends SIGTERM to a job as soon as it is requeued."""
    done = run_child(
        """
        os.kill(os.getpid(), signal.SIGUSR1)
        preemption.leave()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            now[0] += 5
        sys.exit(75)
        """
    )
    assert (done.returncode, done.stderr) == (75, "")


def test_leaving_ignores_sigterm_even_where_it_was_not_listened_to() -> None:
    preemption = Preemption(PreemptConfig(signals=("USR1",)))
    before = signal.getsignal(signal.SIGTERM)
    preemption.install()
    preemption.leave()
    send(signal.SIGTERM)
    assert preemption.asked is None
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_held_back_since_the_start_is_heard_when_the_run_listens() -> None:
    """Without it the process would be killed by a signal that comes while it imports torch."""
    command = """
import os, signal, threading, time
from pretrain.preempt import Preemption, PreemptConfig, held_back
holding = held_back()
holding.__enter__()
threading.Thread(target=time.sleep, args=(1,)).start()  # inherits that
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.1)
preemption = Preemption(PreemptConfig())
print(preemption.asked_for())
preemption.install()
print(preemption.asked_for())
os.kill(os.getpid(), signal.SIGUSR1)
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split("\n")) == (0, ["None", "signal USR1", "set()", ""])


def test_only_the_signals_of_the_settings_are_listened_to_and_old_handlers_come_back() -> None:
    heard = []
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: heard.append(number))
    preemption = Preemption(PreemptConfig(signals=("USR1",)))
    preemption.install()
    preemption.install()  # twice changes nothing
    send(signal.SIGUSR2)
    assert heard == [signal.SIGUSR2]
    assert preemption.asked_for() is None
    preemption.close()
    send(signal.SIGUSR1)
    assert heard == [signal.SIGUSR2, signal.SIGUSR1]
    assert preemption.asked_for() is None


# --- the clock


def test_the_run_stops_so_many_minutes_after_the_start_of_the_process(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worked by hand: of 2 minutes 30 s have gone by in imports, so 90 s are left."""
    monkeypatch.setattr(preempt, "process_age_seconds", lambda: 30.0)
    preemption = Preemption(PreemptConfig(max_minutes=2), clock=clock)
    clock.now = 1089.9
    assert preemption.asked_for() is None
    clock.now = 1090.0
    assert preemption.asked_for() == "time limit"


def test_the_run_stops_before_the_end_of_the_job_and_the_earlier_limit_counts(clock: Clock) -> None:
    """Worked by hand: 600 s are left and it wants to stop 180 s before: after 420 s."""
    preemption = Preemption(PreemptConfig(before_end_seconds=180, max_minutes=1000), 600.0, clock)
    clock.now = 1419.9
    assert preemption.asked_for() is None
    clock.now = 1420.0
    assert preemption.asked_for() == "time limit"


def test_without_a_known_end_there_is_none(clock: Clock) -> None:
    for config, left in ((PreemptConfig(before_end_seconds=60), None), (PreemptConfig(), 5.0)):
        preemption = Preemption(config, left, clock)
        clock.now += 1e9
        assert preemption.asked_for() is None


def test_a_signal_is_the_reason_even_after_the_time_is_up(clock: Clock) -> None:
    """A `scancel` after the limit, before the step ended, is still not undone."""
    preemption = Preemption(PreemptConfig(before_end_seconds=0), 10.0, clock)
    preemption.install()
    clock.now += 20
    assert preemption.asked_for() == "time limit"
    send(signal.SIGTERM)
    assert preemption.asked_for() == "signal TERM"


def test_the_age_of_the_process_includes_its_start() -> None:
    """Agreement with a clock of the parent: the child is asked after half a second."""
    started = time.monotonic()
    body = "time.sleep(0.5); from pretrain.preempt import process_age_seconds as age; print(age())"
    done = run_child(body)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - started + 0.02


def test_where_proc_says_nothing_the_age_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "1 (a) b")
    assert preempt.process_age_seconds() == 0.0


# --- agreement


asked_by_ranks = st.lists(st.sampled_from([None, *REASONS]), min_size=1, max_size=64)


@given(asked_by_ranks, st.randoms())
@settings(max_examples=200, deadline=None)
def test_ranks_come_to_one_reason_whoever_was_asked_what(asked: list[str | None], order: object) -> None:
    """Fault 11: agreement with the slow reference that looks at every rank's reason."""
    expected = next((reason for reason in REASONS if reason in asked), None)
    total = sum(encode(reason) for reason in asked)
    assert decode(total, len(asked)) == expected
    order.shuffle(asked)  # type: ignore[attr-defined]
    assert sum(encode(reason) for reason in asked) == total


@given(st.lists(st.integers(0, 4095), min_size=4, max_size=4).filter(lambda counts: 0 < sum(counts) <= 4095))
@settings(max_examples=200, deadline=None)
def test_sums_over_thousands_of_ranks_are_exact(counts: list[int]) -> None:
    total = 0.0
    for reason, count in zip(REASONS, counts, strict=True):
        for _ in range(count):
            total += encode(reason)
    assert decode(total, 4095) == next(reason for reason, n in zip(REASONS, counts, strict=True) if n)


def test_one_rank_of_many_is_enough_and_nobody_is_nothing() -> None:
    """Fault 11: a signal that reaches one rank only stops all of them."""
    assert decode(encode("signal USR1"), 4095) == "signal USR1"
    assert decode(0.0, 4095) is None


def test_a_sum_that_cannot_be_is_our_own_mistake() -> None:
    for total, world_size in ((2.0, 1), (4096.0**4, 8), (0.0, 4096)):
        with pytest.raises(AssertionError):
            decode(total, world_size)


def test_what_was_ended_on_purpose_is_not_started_again() -> None:
    config = PreemptConfig()
    assert {reason: should_requeue(reason, config) for reason in REASONS} == {
        "signal TERM": False,
        "signal USR1": True,
        "signal USR2": True,
        "time limit": True,
    }
    only_term = PreemptConfig(requeue_on=("TERM",))
    assert [reason for reason in REASONS if should_requeue(reason, only_term)] == ["signal TERM"]
    # of ranks that heard different things, the one that must not be undone decides
    assert decode(encode("signal USR1") + encode("signal TERM") + encode("time limit"), 8) == "signal TERM"


@pytest.mark.parametrize(
    "wrong",
    [
        {"signals": ["KILL"]},
        {"requeue_on": ["always"]},
        {"max_minutes": 0},
        {"max_minutes": float("inf")},
        {"before_end_seconds": -1},
        {"minutes": 3},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PreemptConfig(**wrong)  # type: ignore[arg-type]
