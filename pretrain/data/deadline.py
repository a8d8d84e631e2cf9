"""Give a task that cannot be interrupted, such as a read from a hung file system, a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_IDLE_THREADS = 16  # kept for the next task; beyond them a thread ends with its task


class DeadlineError(Exception):
    """A task took longer than it may."""


class _Job(Generic[T]):
    """A task and its outcome, which is either taken or, after the deadline, thrown away."""

    def __init__(self, task: Callable[[], T], late: Callable[[T], None] | None) -> None:
        self.task = task
        self.late = late
        self.result: T
        self.error: BaseException | None = None
        self._given_up = False
        self._state = threading.Lock()
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        try:
            self.result = self.task()
        except BaseException as error:
            self.error = error
        with self._state:
            self._running.release()
            too_late = self._given_up
        if too_late and self.error is None and self.late is not None:
            self.late(self.result)

    def outcome(self, seconds: float) -> T:
        if not self._running.acquire(timeout=seconds):
            with self._state:
                self._given_up = self._running.locked()
            if self._given_up:
                raise DeadlineError(f"no answer within {seconds:g} seconds")
        if self.error is not None:
            raise self.error
        return self.result


class _Thread(threading.Thread):
    """Runs one job after another, as long as there is room among the idle ones."""

    def __init__(self) -> None:
        super().__init__(name="storage", daemon=True)  # so that a hung one cannot hold up the exit
        self.jobs: SimpleQueue[_Job[object]] = SimpleQueue()

    def run(self) -> None:
        while True:
            self.jobs.get().run()
            if len(_IDLE) >= MAX_IDLE_THREADS:
                return
            _IDLE.append(self)


_IDLE: list[_Thread] = []  # of this process


def in_time(task: Callable[[], T], seconds: float, late: Callable[[T], None] | None = None) -> T:
    """Run a task in another thread and leave it behind after `seconds`; `late` gets what it gives then."""
    job = _Job(task, late)
    _idle_thread().jobs.put(job)  # type: ignore[arg-type]
    return job.outcome(seconds)


def _idle_thread() -> _Thread:
    while True:
        try:
            thread = _IDLE.pop()
        except IndexError:
            break
        if thread.is_alive():  # not one that a fork left behind
            return thread
    thread = _Thread()
    thread.start()
    return thread
