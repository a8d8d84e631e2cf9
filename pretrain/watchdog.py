"""Say where this rank is, so that a process beside it can end the run when it stays there too long."""

from __future__ import annotations

import faulthandler
import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger("pretrain")

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

# in the order in which a step passes them: who is in an earlier one is waited for by the others
SECTIONS = ("init", "data", "forward", "backward", "step", "checkpoint", "evaluation")
POLL_SECONDS = 0.5  # between two looks at this rank
FOLDER_SECONDS = 2.0  # between two looks at what the other ranks say
LOOK_NANOSECONDS = 5_000_000_000  # between two looks whether the process beside us lives
CLOSE_SECONDS = 5.0
# blocked while the process starts, which inherits that: a signal to the whole job cannot hit it too early
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WatchdogConfig(BaseModel):
    """How long a rank may be in one section before the run counts as hanging."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    init_seconds: Seconds = 1800.0  # all from the start to the end of the first step, which compiles
    data_seconds: Seconds = 600.0
    forward_seconds: Seconds = 600.0
    backward_seconds: Seconds = 600.0
    step_seconds: Seconds = 600.0
    checkpoint_seconds: Seconds = 1800.0
    evaluation_seconds: Seconds = 7200.0
    grace_seconds: Seconds = 10.0  # for the other ranks to report after the alarm

    def limits(self) -> dict[str, float]:
        """Seconds by section, in the order of a step."""
        return {name: getattr(self, f"{name}_seconds") for name in SECTIONS}


class Watchdog:
    """One per rank, made in the thread that runs the loop.

    `folder` is shared by all ranks and used by one start of the run only. Where the settings or the
    operating system say no, every call does nothing.
    """

    def __init__(self, config: WatchdogConfig, rank: int, world_size: int, folder: Path) -> None:
        self._record: memoryview | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._index = {name: index for index, name in enumerate(SECTIONS)}
        self._count = 0
        self._section, self._step = "init", -1
        self._is_outside = True  # of all sections; the place is then where the rank was last
        self._starting = time.monotonic_ns()
        self._look_at = self._starting + LOOK_NANOSECONDS
        self._close_seconds = config.grace_seconds + CLOSE_SECONDS
        if config.enabled and hasattr(os, "memfd_create"):  # Linux
            self._start(config, rank, world_size, folder)

    def _start(self, config: WatchdogConfig, rank: int, world_size: int, folder: Path) -> None:
        record_fd = os.memfd_create("watchdog-record")
        os.ftruncate(record_fd, mmap.PAGESIZE)
        self._record = memoryview(mmap.mmap(record_fd, mmap.PAGESIZE)).cast("q")
        self.enter(self._section, self._step)
        self._is_outside = True
        # in memory, so that the stacks of a rank are had even where its file system hangs
        self._stacks_fd = os.memfd_create("watchdog-stacks")
        # a real-time signal, which nothing else here uses; its default is to end the process, so the
        # handler comes before the process that sends it
        self._stacks_signal = next(
            number
            for number in range(signal.SIGRTMIN + 4, signal.SIGRTMAX)
            if signal.getsignal(number) is signal.SIG_DFL
        )
        faulthandler.register(self._stacks_signal, file=self._stacks_fd, all_threads=True, chain=False)
        control_fd, self._control_fd = os.pipe()
        settings = {
            "rank": rank,
            "world_size": world_size,
            "pid": os.getpid(),
            "folder": str(folder),
            "limits": config.limits(),
            "grace_seconds": config.grace_seconds,
            "poll_seconds": POLL_SECONDS,
            "folder_seconds": FOLDER_SECONDS,
            "record_fd": record_fd,
            "stacks_fd": self._stacks_fd,
            "control_fd": control_fd,
            "stacks_signal": self._stacks_signal,
        }
        script = Path(__file__).with_name("watchdog_process.py")
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(record_fd, self._stacks_fd, control_fd),
            )
        except OSError as error:
            logger.warning("the watchdog could not be started (%s): a hang of rank %d goes on", error, rank)
            self._release()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(record_fd)
            os.close(control_fd)

    def enter(self, section: str, step: int) -> None:
        """Say that `section` of `step` begins now. Costs about a microsecond."""
        record = self._record
        if record is None:
            return
        now = time.monotonic_ns()
        self._section, self._step, self._is_outside = section, step, False
        self._count = count = self._count + 1
        # from front to back, one store each, so that a reader in between finds two counts; struct.pack_into
        # would not do: it begins with zeros everywhere
        record[0] = count
        record[1] = self._index[section]
        record[2] = step
        record[3] = now  # on a clock that all processes of a machine share
        record[4] = self._starting  # 0: no longer
        record[5] = count
        if now > self._look_at:
            self._look(now)

    @contextmanager
    def section(self, name: str, step: int) -> Iterator[None]:
        """Be in a section, then in the one around it, whose time begins anew.

        Without one around it the rank counts as still in this one: back in init it would seem behind others.
        """
        is_outermost, outer = self._is_outside, (self._section, self._step)
        self.enter(name, step)
        try:
            yield
        finally:
            self.enter(*((name, step) if is_outermost else outer))
            self._is_outside = is_outermost

    def started(self) -> None:
        """The first step is done: from now on each section has its own limit."""
        self._starting, is_outside = 0, self._is_outside
        self.enter(self._section, self._step)
        self._is_outside = is_outside

    def close(self) -> None:
        """End the process beside us; may be called twice."""
        if self._process is None:
            return
        with suppress(OSError):
            os.write(self._control_fd, b"c")
        try:
            # it may be busy with the alarm of another rank, and is then about to end this one as well
            self._process.wait(self._close_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._release()

    def _release(self) -> None:
        assert self._record is not None
        faulthandler.unregister(self._stacks_signal)
        os.close(self._stacks_fd)
        os.close(self._control_fd)
        self._record.release()
        self._record = None

    def _look(self, now: int) -> None:
        assert self._process is not None
        self._look_at = now + LOOK_NANOSECONDS
        code = self._process.poll()
        if code is not None:
            logger.warning("the watchdog's process ended (code %d): hangs are not noticed any more", code)
            self.close()
