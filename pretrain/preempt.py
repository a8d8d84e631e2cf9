"""When a run has to stop before its end: signals and clocks set a flag, the loop asks between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SignalName = Literal["USR1", "USR2", "TERM"]
TIME = "time limit"
# the first that any rank has wins: what a person or Slurm ended (TERM) must not be started again
REASONS = ("signal TERM", "signal USR1", "signal USR2", TIME)
MAX_WORLD_SIZE = 4095  # ranks that one digit of the agreed number can count
SAME_SECONDS = 1.0  # Slurm sends SIGTERM twice at the time limit, and torchrun repeats what Slurm sent


class PreemptConfig(BaseModel):
    """What ends a run early, with a checkpoint and exit code 75, and after what it is to be started again.

    A TERM comes from `scancel` or from Slurm's own preemption, which requeues by itself: neither is undone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    signals: tuple[SignalName, ...] = ("USR1", "USR2", "TERM")
    requeue_on: tuple[SignalName | Literal["time"], ...] = ("USR1", "USR2", "time")
    # after the start of the process
    max_minutes: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    before_end_seconds: Annotated[int, Field(ge=0)] | None = None  # of the Slurm job


class Preemption:
    """Hears that the run has to stop.

    The first signal is only noted, so that the step under way can end and be saved. A second one ends the
    process at once. job_seconds_left: until the end of the Slurm job, if that is known.
    """

    def __init__(
        self,
        config: PreemptConfig,
        job_seconds_left: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.asked: str | None = None  # the signal that came first
        self._clock = clock
        self._arrived: tuple[int, float] | None = None  # the first signal, and when
        self._numbers = tuple(signal.Signals[f"SIG{name}"] for name in config.signals)
        self._before: dict[int, Any] = {}
        self._deadline = min(self._deadlines(job_seconds_left), default=None)

    def _deadlines(self, job_seconds_left: float | None) -> Iterable[float]:
        if self.config.max_minutes is not None:
            yield self._clock() - process_age_seconds() + 60.0 * self.config.max_minutes
        if self.config.before_end_seconds is not None and job_seconds_left is not None:
            yield self._clock() + job_seconds_left - self.config.before_end_seconds

    def install(self) -> None:
        """Listen from now on. A signal that was held back since the start of the process comes now."""
        assert threading.current_thread() is threading.main_thread(), "Python lets no other thread do this"
        for number in self._numbers:
            self._before.setdefault(number, signal.signal(number, self._handle))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    def close(self) -> None:
        """Put back the handlers of before."""
        while self._before:
            # None: a handler that was not set from Python, which cannot be put back from here
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def leave(self) -> None:
        """Ignore what comes from now on: all is saved, and the process is about to end with its own code.

        A job that is requeued gets SIGTERM at once, and so do all ranks as soon as one of them has ended
        (`srun --kill-on-bad-exit`).
        """
        for number in {*self._numbers, signal.SIGTERM}:
            self._before.setdefault(number, signal.signal(number, signal.SIG_IGN))

    def asked_for(self) -> str | None:
        """Why this rank would stop now: 'signal USR1', 'time limit', or None."""
        if self.asked is None and self._deadline is not None and self._clock() >= self._deadline:
            return TIME
        return self.asked

    def code(self) -> float:
        """`asked_for()` as a number; the sum over ranks goes to `decode`."""
        return encode(self.asked_for())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self._arrived is None:
            self._arrived = number, now
            self.asked = f"signal {_name(number)}"
            return
        first, when = self._arrived
        if number == first and now - when < SAME_SECONDS:
            return
        # not print: the signal may have come in the middle of one
        os.write(2, f"pretrain: SIG{_name(number)} after SIG{_name(first)}: ends at once\n".encode())
        os._exit(128 + number)


def _name(number: int) -> str:
    return signal.Signals(number).name.removeprefix("SIG")


HELD_BACK = (signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def held_back() -> Iterator[None]:
    """Keep signals that ask for a checkpoint until `install()`: unheard, they kill a process that starts.

    To be entered before there are other threads, such as torch's: one that holds nothing back would get it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode(asked: str | None) -> float:
    """A reason as a number whose sum over up to 4095 ranks says how many had which.

    One digit to the base of 4096 for each reason: four are 48 bits, exact in float64 (not in float32).
    """
    return 0.0 if asked is None else float((MAX_WORLD_SIZE + 1) ** REASONS.index(asked))


def decode(total: float, world_size: int) -> str | None:
    """The one reason that all ranks agree on, from the sum of their numbers; None if nobody had one."""
    assert 1 <= world_size <= MAX_WORLD_SIZE, f"{world_size} ranks do not fit into a digit"
    rest = int(total)
    counts = []
    for _ in REASONS:
        rest, count = divmod(rest, MAX_WORLD_SIZE + 1)
        counts.append(count)
    assert rest == 0, f"{total} is no sum of reasons"
    assert sum(counts) <= world_size, f"{total} is not the sum of {world_size} ranks' reasons"
    return next((reason for reason, count in zip(REASONS, counts, strict=True) if count), None)


def should_requeue(reason: str, config: PreemptConfig) -> bool:
    """Whether the run is to be started again by itself after this reason."""
    return ("time" if reason == TIME else reason.removeprefix("signal ")) in config.requeue_on


def process_age_seconds() -> float:
    """How long this process has lived, its imports included; 0 where /proc does not say."""
    try:
        # after the name in parentheses: state is field 3, the start in ticks after boot is field 22 (proc(5))
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_seconds = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_seconds)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
