"""Turns steps into log lines, `metrics.jsonl` and published metrics. Nothing here can stop a run."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.metrics import names
from pretrain.metrics.exporter import Exporter

logger = logging.getLogger("pretrain")


class JsonLines:
    """Appends one JSON object per line; a write that fails is reported once and the run goes on."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        self._failed = False
        self.num_taken_again = 0  # steps that were recorded beyond the one that the run goes on from
        self.keep_until(resumed_at)

    def keep_until(self, step: int) -> None:
        """Remove what was recorded beyond a step."""
        try:
            self._keep_until(step)
        except OSError as error:
            self._warn(error)

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(errors="replace").splitlines()
        reached = max((at for at in map(_step_in, lines) if at < math.inf), default=0)
        self.num_taken_again = max(0, int(reached) - step)
        kept = self.path.with_name(f".{self.path.name}")
        kept.write_text("".join(f"{line}\n" for line in lines if _step_in(line) <= step))
        kept.replace(self.path)

    def write(self, record: Mapping[str, object]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            logger.warning(
                "%s cannot be written (%s); training goes on without it", self.path, error.strerror
            )
        self._failed = True


def _step_in(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, of a run that was killed while writing it


# values that count from the start of the process, and where they are published
_COUNTERS = {
    "storage_retries": names.STORAGE_RETRIES,
    "backbone_calls": names.BACKBONE_CALLS,
    "teacher_calls": names.TEACHER_CALLS,
}


class Meter:
    """Counts what one rank saw; only rank 0 has one that writes.

    headlines: the metric of each task that a log line shows.
    """

    def __init__(
        self,
        lines: JsonLines,
        exporter: Exporter,
        headlines: Mapping[str, str],
        *,
        every_steps: int,
        num_steps: int,
        global_batch: int,
        images_per_epoch: int,
        attempt: int = 1,
    ) -> None:
        self.lines = lines
        self.exporter = exporter
        self.headlines = headlines
        self.every_steps = every_steps
        self.num_steps = num_steps
        self.global_batch = global_batch
        self.images_per_epoch = images_per_epoch
        self.attempt = attempt
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._window_steps = 0
        self._window_seconds = 0.0
        self._window_wait_seconds = 0.0
        self._window_skipped = 0
        self._recent_seconds: list[float] = []
        self._counted = dict.fromkeys(_COUNTERS, 0.0)

    def record(
        self, step: int, values: Mapping[str, float], *, skipped: bool, seconds: float, wait_seconds: float
    ) -> None:
        """Take in step number `step`, from 1. Values are averaged until the next record is written."""
        publish = self.exporter
        publish.add(names.STEPS, 1)
        publish.add(names.IMAGES, self.global_batch)
        publish.add(names.NONFINITE_STEPS, int(skipped))
        publish.add(names.DATA_WAIT, wait_seconds)
        publish.observe(names.STEP_SECONDS, seconds)
        publish.set(names.EPOCH, step * self.global_batch / self.images_per_epoch)
        publish.set(names.GRAD_NORM, values["grad_norm"])
        publish.set(names.LEARNING_RATE, values["lr"])
        if "momentum" in values:
            publish.set(names.MOMENTUM, values["momentum"])
        if "feature_std" in values:
            publish.set(names.FEATURE_STD, values["feature_std"])
        for name, metric in _COUNTERS.items():
            if name in values:
                publish.add(metric, max(0.0, values[name] - self._counted[name]))
                self._counted[name] = values[name]
        publish.publish_step(
            {name: value for name, value in values.items() if name == "total" or "/" in name}
        )
        for name, value in values.items():
            if math.isfinite(value):
                self._sums[name] += value
                self._counts[name] += 1
        self._window_steps += 1
        self._window_seconds += seconds
        self._window_wait_seconds += wait_seconds
        self._window_skipped += int(skipped)
        if step == 1 or step % self.every_steps == 0 or step == self.num_steps:
            self._write(step, values)

    def publish_ranks(self, speeds: Sequence[float]) -> None:
        """How fast each rank works, in rank order."""
        self.exporter.set(names.RANK_SPEED, speeds[0])

    def publish_evaluation(self, name: str, k: int, accuracy_ratio: float) -> None:
        self.exporter.set(names.EVAL_ACCURACY, accuracy_ratio, name, str(k))

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step: what was recorded beyond it is taken away."""
        self.exporter.add(names.ROLLBACKS, 1)
        self.lines.keep_until(step)
        self._begin_window()

    def _begin_window(self) -> None:
        self._sums.clear()
        self._counts.clear()
        self._window_steps = self._window_skipped = 0
        self._window_seconds = self._window_wait_seconds = 0.0

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        rate = self.global_batch * self._window_steps / max(self._window_seconds, 1e-9)
        self.exporter.set(names.IMAGES_PER_SECOND, rate)
        # the first step compiles and warms up, so it does not count towards the time left
        if step > 1:
            self._recent_seconds.append(self._window_seconds / self._window_steps)
            del self._recent_seconds[:-20]
        counts = self._counts
        means = {
            name: self._sums[name] / counts[name] if counts.get(name) else None
            for name in {**values, **counts}
        }
        record: dict[str, object] = {
            "step": step,
            "attempt": self.attempt,
            "images": step * self.global_batch,
            "epoch": round(step * self.global_batch / self.images_per_epoch, 4),
            "images_per_second": round(rate, 2),
            "step_seconds": round(self._window_seconds / self._window_steps, 5),
            "data_wait_seconds": round(self._window_wait_seconds / self._window_steps, 5),
            "skipped_steps": self._window_skipped,
            **means,
            "unix_time": round(time.time(), 2),
        }
        # the digest of the samples identifies one batch, and the others count from the start: a mean of
        # them would say nothing
        for name in ("samples", "bad_samples", *_COUNTERS):
            value = values.get(name)
            record[name] = value if value is None or math.isfinite(value) else None
        self.lines.write(record)
        logger.info(self._line(step, means, rate))
        self._begin_window()

    def _line(self, step: int, means: Mapping[str, float | None], rate: float) -> str:
        def shown(value: float | None) -> str:
            return "nan" if value is None else f"{value:.3f}"

        parts = [f"step {step}/{self.num_steps}", f"loss {shown(means['total'])}"]
        for task, metric in self.headlines.items():
            parts.append(
                f"{task} {shown(means[f'loss/{task}'])} ({metric} {shown(means[f'{task}/{metric}'])})"
            )
        parts.append(f"lr {means['lr']:.2e}")
        parts.append(f"{rate:.0f} images/s")
        if self._window_skipped:
            parts.append(f"{self._window_skipped} skipped")
        if self._recent_seconds:
            left = (self.num_steps - step) * sum(self._recent_seconds) / len(self._recent_seconds)
            parts.append(f"eta {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}")
        return " | ".join(parts)
