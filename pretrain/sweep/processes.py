"""Other commands, one process at a time, until the time is used up or this process is told to stop."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pretrain.cluster.local import PASSED_ON, PR_SET_PDEATHSIG
from pretrain.errors import EXIT_PREEMPTED

logger = logging.getLogger("pretrain")

POLL_SECONDS = 0.1
GRACE_SECONDS = 120.0  # between asking a command to stop and killing it: enough to write a checkpoint
NUM_LAST_LINES = 5  # of a failed command's log


class StoppedError(Exception):
    """The command was stopped, or not started; the same sweep can go on later."""


class CommandError(Exception):
    """A command that failed."""

    def __init__(self, exit_code: int, last_lines: list[str]) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code
        self.last_lines = last_lines


class Processes:
    """Starts commands. max_seconds: from now on, over all of them; None: no limit."""

    def __init__(self, max_seconds: float | None = None, grace_seconds: float = GRACE_SECONDS) -> None:
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.grace_seconds = grace_seconds
        self.told: int | None = None  # the signal that asked this process to stop

    @property
    def must_stop(self) -> bool:
        return self.told is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, a signal to stop is passed on to the command that runs, and ends the sweep."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.told = number

        before = {number: signal.signal(number, handler) for number in PASSED_ON}
        try:
            yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)

    def call(self, command: Sequence[str], log: Path) -> float:
        """Run `command`, its output appended to `log`; returns its seconds.

        Raises CommandError if it fails, StoppedError if the time is used up before its end.
        """
        if self.must_stop:
            raise StoppedError
        started = time.monotonic()
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            begin = output.tell()
            code = self._wait(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # or what is printed comes after the errors, and a log ends with something else
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                    preexec_fn=_end_with_parent,
                )
            )
        if code == 0:
            return time.monotonic() - started
        # a command that was told to stop may end in any way, and one may be told without us
        if self.must_stop or code == EXIT_PREEMPTED:
            raise StoppedError
        raise CommandError(code if code > 0 else 128 - code, last_lines(log, begin))

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        asked_at: float | None = None
        try:
            while process.poll() is None:
                if self.must_stop and asked_at is None:
                    asked_at = time.monotonic()
                    process.send_signal(self.told or signal.SIGTERM)
                if asked_at is not None and time.monotonic() >= asked_at + self.grace_seconds:
                    process.kill()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        finally:
            if process.poll() is None:  # Ctrl-C, which the command got too
                process.terminate()
                try:
                    process.wait(self.grace_seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        return process.returncode


def _end_with_parent() -> None:
    """Let Linux kill the command when the sweep is killed, so that no two ever write to one run."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def last_lines(log: Path, begin: int = 0) -> list[str]:
    """The end of what was written to a log from byte `begin` on."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-NUM_LAST_LINES:]


@contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Whether no other process holds this file; if so, hold it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): run no second sweep in this folder", path, error)
        yield True
