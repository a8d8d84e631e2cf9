"""Checkpoints as the loop sees them: all ranks gather, rank 0 hands over to the writer and tells of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
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
        self.stalled_seconds = 0.0  # of the training, by checkpoints
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
        self.stalled_seconds += seconds
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
        if self.exporter:
            for written in report.written:
                self.exporter.set(names.CHECKPOINT_SECONDS, written.seconds)
                self.exporter.set(names.CHECKPOINT_STEP, written.step)
            self.exporter.add(names.CHECKPOINT_FAILURES, len(report.failures))
            self.exporter.add(names.MIRROR_FAILURES, len(report.mirror_failures))
        if report.failures:
            self._problem = report.failures[-1].reason
        self.failures_in_a_row = report.failures_in_a_row

    def check(self, failures_in_a_row: float) -> None:
        """Stop, on all ranks, where rank 0 could not write so often; the number is what all agreed on."""
        if failures_in_a_row >= self.config.checkpoint.max_failures:
            why = f": {self._problem}" if self._problem else ""
            raise TrainingError(
                f"{int(failures_in_a_row)} checkpoints in a row could not be written{why}; make room or mend "
                "the disk, then continue with --resume auto"
            )

    def finish(self) -> None:
        """Wait until the last checkpoint is written; every rank calls this, and learns if it was not."""
        problem = None
        if self._writer is not None:
            report = self._writer.close()
            self._tell(report)
            self._writer = None
            if report.failures_in_a_row:
                problem = f"the last checkpoint could not be written: {self._problem}"
        problem = cluster.from_first(problem)
        if problem:
            raise TrainingError(problem)

    def newest_up_to(self, step: int) -> Path | None:
        """The newest whole checkpoint of at most `step` steps, on every rank; waits for a write under way."""
        found = None
        if self._writer is not None:
            self._tell(self._writer.close())
            self._writer = self._open_writer()
            for folder in checkpoint.list_checkpoints(self.run_dir):
                if checkpoint.step_of(folder) <= step and not checkpoint.verify(folder):
                    found = folder
                    break
        return cluster.from_first(found)

    def forget_after(self, step: int) -> None:
        """Put aside what was written after `step`, to which the run went back."""
        if self.is_first:
            for folder in checkpoint.set_aside(self.run_dir, step):
                logger.warning("a checkpoint of steps that are taken again was renamed to %s", folder)

    def abandon(self) -> None:
        """The run has failed: give what is being written a while, and raise nothing."""
        if self._writer is not None:
            self._tell(self._writer.close(timeout_seconds=60.0))
            self._writer = None
