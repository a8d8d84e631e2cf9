"""Checkpoints as the loop sees them: all ranks gather, rank 0 hands over to the writer and tells of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import checkpoint, cluster
from pretrain.checkpoint_writer import CheckpointWriter, Report, Snapshot
from pretrain.config import RunConfig
from pretrain.engine.engine import Engine
from pretrain.engine.host_memory import HostMemory
from pretrain.errors import TrainingError
from pretrain.metrics import names
from pretrain.metrics.exporter import Exporter
from pretrain.models.teacher import Teacher

SETTLE_SECONDS = 600.0  # for a last write, and for the mirror after it
ABANDON_SECONDS = 45.0  # the same in a run that has failed: launchers kill what is left after a minute
SLICE_SECONDS = 5.0

logger = logging.getLogger("pretrain")


class Saver:
    """Saves the state of a run. Every rank has one; that of rank 0 writes.

    exporter: where rank 0 publishes what became of the checkpoints.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, attempt: int, is_first: bool, exporter: Exporter | None
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.attempt = attempt
        self.is_first = is_first
        self.exporter = exporter
        self.failures_in_a_row = 0
        self._memory = HostMemory()
        self._writer = self._open_writer()
        self._problem: str | None = None  # of the last one

    def _open_writer(self) -> CheckpointWriter | None:
        if not self.is_first:
            return None
        return CheckpointWriter(self.run_dir, self.config.checkpoint, self.config.to_yaml(), self.attempt)

    def save(
        self,
        step: int,
        engine: Engine,
        teacher: Teacher | None,
        state: Mapping[str, Any],
        values: Mapping[str, float],
    ) -> None:
        """Take a copy of the state after `step` steps; the training is held up for the copy alone."""
        started = time.perf_counter()
        self._together(CheckpointWriter.wait)
        student = engine.weights(self._memory)
        optimizer = engine.optimizer_state(self._memory)
        if self._writer is not None:
            tensors: dict[str, Mapping[str, Tensor]] = {
                checkpoint.STUDENT: student,
                checkpoint.OPTIMIZER: optimizer.tensors,
            }
            if teacher:
                tensors[checkpoint.TEACHER] = {
                    name: self._memory.copy(f"teacher.{name}", value)
                    for name, value in teacher.state_dict().items()
                }
            whole = {**state, "step": step, "optimizer_steps": optimizer.num_steps}
            self._writer.submit(Snapshot(step, tensors, whole, dict(values)))
        seconds = time.perf_counter() - started
        if self.exporter:
            self.exporter.set(names.CHECKPOINT_STALL_SECONDS, seconds)
        self.report()

    def report(self) -> None:
        """Tell what the writer has done since; on rank 0."""
        if self._writer is not None:
            self._tell(self._writer.poll())

    def _tell(self, report: Report) -> None:
        for written in report.written:
            logger.info("checkpoint of step %d written in %.1f s", written.step, written.seconds)
        for mirrored in report.mirrored:
            logger.info("checkpoint of step %d on the mirror in %.1f s", mirrored.step, mirrored.seconds)
        if self.exporter:
            for written in report.written:
                self.exporter.set(names.CHECKPOINT_SECONDS, written.seconds)
                self.exporter.set(names.CHECKPOINT_STEP, written.step)
                self.exporter.set(names.CHECKPOINT_BYTES, written.num_bytes)
                self.exporter.set(names.CHECKPOINT_TIME, time.time())
                if written.free_bytes is not None:
                    self.exporter.set(names.DISK_FREE, written.free_bytes)
            self.exporter.add(names.CHECKPOINT_FAILURES, len(report.failures))
            self.exporter.add(names.MIRROR_FAILURES, len(report.mirror_failures))
        if report.failures:
            self._problem = report.failures[-1].reason
        self.failures_in_a_row = report.failures_in_a_row

    def check(self, failures_in_a_row: float) -> None:
        """Stop, on all ranks, where rank 0 could not write so often; the number is what all agreed on."""
        if failures_in_a_row >= self.config.checkpoint.max_failures:
            why = f": {self._problem}" if self._problem else ""
            is_of_values = self._problem is not None and self._problem.endswith("is not finite")
            remedy = "lower optim.base_lr" if is_of_values else "make room or mend the disk"
            raise TrainingError(
                f"{int(failures_in_a_row)} checkpoints in a row could not be written{why}; {remedy}, then "
                "continue with --resume auto"
            )

    def finish(self, wait_for_mirror: bool = True) -> None:
        """Wait until the last checkpoint is written; every rank calls this, and learns if it was not.

        wait_for_mirror: else what it lacks is left to the next attempt, as when little time remains.
        """
        self._together(lambda writer: writer.finish(SETTLE_SECONDS))
        problem = None
        if self._writer is not None:
            report = self._writer.poll()
            self._tell(report)
            if report.failures_in_a_row:
                problem = f"the last checkpoint could not be written: {self._problem}"
        problem = cluster.from_first(problem)
        if wait_for_mirror and not problem:
            self._together(lambda writer: writer.wait_for_mirror(SETTLE_SECONDS))
        if self._writer is not None:
            # all have waited for it already: a disk that hangs would hold up the end once more
            self._tell(self._writer.close(0.0 if problem else SETTLE_SECONDS, mirror_seconds=0.0))
            self._writer = None
        if problem:
            raise TrainingError(problem)

    def newest_up_to(self, step: int) -> Path | None:
        """The newest whole checkpoint of at most `step` steps, on every rank; waits for a write under way."""
        self._together(lambda writer: writer.finish(SETTLE_SECONDS))
        found, problem = None, None
        if self._writer is not None:
            self._tell(self._writer.poll())
            if self._writer.is_busy:  # and might end after the run has gone back
                problem = f"a checkpoint is not written within {SETTLE_SECONDS:g} s; the disk may hang"
            for folder in checkpoint.list_checkpoints(self.run_dir):
                if checkpoint.step_of(folder) <= step and not checkpoint.verify(folder):
                    found = folder
                    break
        found, problem = cluster.from_first((found, problem))
        if problem:
            raise TrainingError(problem)
        return found

    def _together(self, task: Callable[[CheckpointWriter], object]) -> None:
        """Rank 0 waits for its disk and the others for rank 0, in slices that no time-out notices."""
        thread = None
        if self._writer is not None:
            thread = threading.Thread(target=task, args=(self._writer,), daemon=True)
            thread.start()
        while cluster.from_first(thread is not None and _still_runs(thread)):
            pass

    def forget_after(self, step: int) -> None:
        """Put aside, on rank 0, what was written after `step`, to which the run goes back."""
        for folder in checkpoint.set_aside(self.run_dir, step):
            logger.warning("a checkpoint of steps that are taken again was renamed to %s", folder)

    def abandon(self) -> None:
        """The run has failed: give what is being written a while, and raise nothing."""
        if self._writer is not None:
            self._tell(self._writer.close(ABANDON_SECONDS, mirror_seconds=0.0))
            self._writer = None


def _still_runs(thread: threading.Thread) -> bool:
    thread.join(SLICE_SECONDS)
    return thread.is_alive()
