"""Watches a run by the numbers that all ranks agree on, and says when to go back or to stop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.engine.engine import StepOutput
from pretrain.errors import TrainingError
from pretrain.guard import (
    Collapse,
    GuardConfig,
    LossSpikes,
    NonfiniteRun,
    Stragglers,
    Verdict,
    rollback_or_stop,
)

logger = logging.getLogger("pretrain")

ANOMALIES = "anomalies.jsonl"
KINDS = ("not finite", "loss spike", "collapse")  # of what is noted there, beside "went back"
FEATURE_STD = "feature_std"


class Oversight:
    """Sees every step. All ranks come to the same verdict from the same numbers; rank 0 writes it down.

    host_of: the name of a rank's machine, for people. noted: told the kind of each anomaly.
    """

    def __init__(
        self,
        config: GuardConfig,
        world_size: int,
        path: Path | None = None,
        host_of: Callable[[int], str] = lambda rank: "",
        noted: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self.config = config
        self.spikes = LossSpikes(config.loss_spike)
        self.collapse = Collapse(config.collapse)
        self.nonfinite = NonfiniteRun(config)
        self.stragglers = Stragglers(world_size, config.straggler)
        self.num_rollbacks = 0
        self.first_bad_step = 0  # of what asked for the last rollback
        self._path = path
        self._host_of = host_of
        self._noted = noted

    def saw(
        self,
        step: int,
        output: StepOutput,
        work_seconds: Sequence[float],
        sample_ids: Callable[[], list[int]],
    ) -> Verdict:
        """Take in training step `step`, from 0. sample_ids: asked on all ranks, where they are needed."""
        self._look_at_ranks(step, work_seconds)
        if output.skipped:
            logger.warning(
                "step %d: a loss or gradient was not finite on some rank; skipped on all", step + 1
            )
            self._note(step, "not finite", sample_ids(), loss=output.values["total"])
        verdict = self.nonfinite.saw(step, output.skipped, self.num_rollbacks)
        if verdict != "go on":
            assert self.nonfinite.first_step is not None
            self.first_bad_step = self.nonfinite.first_step
            return self._decided(
                verdict,
                f"step {step + 1}: {self.nonfinite.num_steps} steps in a row were not finite; lower "
                "optim.base_lr or set engine.precision=fp32",
            )
        if output.skipped:
            return verdict
        return self._look_at_loss(step, output.values, sample_ids)

    def _look_at_loss(
        self, step: int, values: Mapping[str, float], sample_ids: Callable[[], list[int]]
    ) -> Verdict:
        if FEATURE_STD in values and self.collapse.saw(values[FEATURE_STD]):
            self._note(step, "collapse", [], feature_std=values[FEATURE_STD])
            message = (
                f"step {step + 1}: features of different images have been nearly the same for "
                f"{self.config.collapse.patience_steps} steps (feature_std {values[FEATURE_STD]:.4f}); lower "
                "optim.base_lr, or check the teacher and the balance of losses"
            )
            if self.config.collapse.action == "stop":
                return self._decided("stop", message)
            logger.warning("%s", message)
        score = self.spikes.saw(values["total"])
        if score is None:
            return "go on"
        self._note(step, "loss spike", sample_ids(), loss=values["total"], score=round(score, 2))
        message = (
            f"step {step + 1}: the loss is {values['total']:.4g}, {score:.1f} scaled deviations above the "
            f"last ones; its samples are listed in {ANOMALIES}"
        )
        if self.config.loss_spike.action == "log":
            logger.warning("%s", message)
            return "go on"
        self.first_bad_step = step
        stops = self.config.loss_spike.action == "stop"
        return self._decided(
            "stop" if stops else rollback_or_stop(self.num_rollbacks, self.config.max_rollbacks), message
        )

    def _decided(self, verdict: Verdict, why: str) -> Verdict:
        if verdict == "stop":
            so_often = f" after going back {self.num_rollbacks} times" if self.num_rollbacks else ""
            raise TrainingError(f"{why}{so_often}")
        logger.warning("%s", why)
        return verdict

    def _look_at_ranks(self, step: int, work_seconds: Sequence[float]) -> None:
        news = self.stragglers.saw(work_seconds)
        scores = self.stragglers.scores() if news.slow or news.recovered else []
        for rank in news.slow:
            logger.warning(
                "step %d: rank %d%s works at %.2f of the speed of the others, who wait for it",
                step + 1,
                rank,
                self._host_of(rank),
                scores[rank],
            )
        for rank in news.recovered:
            logger.info(
                "step %d: rank %d%s is as fast as the others again", step + 1, rank, self._host_of(rank)
            )

    def went_back(self, step: int, state: Mapping[str, Any] | None) -> None:
        """The run goes on from a checkpoint of `step`, with what that one knew."""
        self.num_rollbacks += 1
        self.spikes = LossSpikes(self.config.loss_spike)
        self.collapse = Collapse(self.config.collapse)
        self.nonfinite = NonfiniteRun(self.config)
        if state:
            self.load(state)
        self._note(step, "went back", [], rollbacks=self.num_rollbacks)

    def state(self) -> dict[str, list[float]]:
        """For the checkpoint, so that a resumed run decides as one that was never stopped."""
        return {
            "loss_spikes": self.spikes.state(),
            "collapse": self.collapse.state(),
            "nonfinite": self.nonfinite.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.spikes.load(state["loss_spikes"])
        self.collapse.load(state["collapse"])
        self.nonfinite.load(state["nonfinite"])

    def _note(self, step: int, kind: str, sample_ids: Sequence[int], **numbers: float) -> None:
        """One line in anomalies.jsonl; failing to write it stops nothing."""
        self._noted(kind)
        if self._path is None:
            return
        finite = {name: value if abs(value) < float("inf") else None for name, value in numbers.items()}
        record = {"step": step + 1, "kind": kind, **finite, "sample_ids": list(sample_ids)}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({**record, "unix_time": round(time.time(), 2)}, allow_nan=False) + "\n")
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be written (%s)", self._path, error)
