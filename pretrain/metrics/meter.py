"""Turns steps into log lines, `metrics.jsonl` and published metrics. Nothing here can stop a run."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.metrics import names
from pretrain.metrics.exporter import Exporter

PUBLISH_SECONDS = 1.0  # Prometheus asks less often than this

logger = logging.getLogger("pretrain")


class JsonLines:
    """Appends one JSON object per line; a write that fails is reported once and the run goes on."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        self._failed = False
        self.num_taken_again = 0  # steps that were recorded beyond the one that the run goes on from
        self.last: dict[str, object] = {}  # the record that the run goes on from
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
        whole = [line for line in lines if _step_in(line) <= step]
        kept.write_text("".join(f"{line}\n" for line in whole))
        kept.replace(self.path)
        self.last = json.loads(whole[-1]) if whole else {}

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


# values that count from the start of the process
_COUNTERS = ("bad_samples", "storage_retries", "backbone_calls", "teacher_calls")
# values that are published under a name of their own
_GAUGES = {
    "grad_norm": names.GRAD_NORM,
    "lr": names.LEARNING_RATE,
    "weight_decay": names.WEIGHT_DECAY,
    "momentum": names.MOMENTUM,
    "feature_std": names.FEATURE_STD,
    "effective_rank": names.EFFECTIVE_RANK,
}


@dataclass(frozen=True)
class Work:
    """What a step costs the devices of a run, and what they can do."""

    flops_per_image: float  # of the model, its backward pass included
    peak_flops_per_second: float  # of all devices together
    source: str  # of the peak


class Goodput:
    """How much of the time since a run first began went into steps that count, over all its starts."""

    def __init__(self, last: Mapping[str, object]) -> None:
        """last: the record of metrics.jsonl that the run goes on from."""
        self.go_back(last)

    def go_back(self, last: Mapping[str, object]) -> None:
        self.useful_seconds = _number(last.get("useful_seconds"), 0.0)
        self.began = _number(last.get("began_unix_time"), time.time())

    @property
    def ratio(self) -> float:
        elapsed = time.time() - self.began
        return min(1.0, self.useful_seconds / elapsed) if elapsed > 0 else 0.0


def _number(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


class Meter:
    """Counts what one rank saw; only rank 0 has one that writes.

    headlines: the metric of each task that a log line shows. also: gets every record that is written.
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
        work: Work | None = None,
        also: Callable[[Mapping[str, object]], None] | None = None,
    ) -> None:
        self.also = also
        self.lines = lines
        self.exporter = exporter
        self.headlines = headlines
        self.every_steps = every_steps
        self.num_steps = num_steps
        self.global_batch = global_batch
        self.images_per_epoch = images_per_epoch
        self.attempt = attempt
        self.work = work
        self.goodput = Goodput(lines.last)
        self._published = -PUBLISH_SECONDS
        self._unpublished_steps = 0
        self._seen: dict[str, list[float]] = {}  # values since the last record, by name
        self._section_seconds: dict[str, float] = defaultdict(float)
        self._window_steps = 0
        self._window_seconds = 0.0
        self._window_wait_seconds = 0.0
        self._window_skipped = 0
        self._recent_seconds: list[float] = []
        self._noted: dict[str, float] = {}
        if work:
            exporter.set(names.PEAK_FLOPS, work.peak_flops_per_second, work.source)
        exporter.set(names.PLANNED_STEPS, num_steps)

    def record(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        skipped: bool,
        seconds: float,
        wait_seconds: float,
        sections: Mapping[str, float] | None = None,
    ) -> None:
        """Take in step number `step`, from 1. Values are averaged until the next record is written.

        sections: seconds of rank 0, by section of the step.
        """
        for name, value in values.items():
            if (seen := self._seen.get(name)) is None:
                self._seen[name] = [value]
            else:
                seen.append(value)
        for section, spent in (sections or {}).items():
            self._section_seconds[section] += spent
        self._window_steps += 1
        self._window_seconds += seconds
        self._window_wait_seconds += wait_seconds
        self._window_skipped += int(skipped)
        self._unpublished_steps += 1
        if skipped:
            self.exporter.add(names.NONFINITE_STEPS, 1)
        else:
            self.goodput.useful_seconds += seconds
        is_due = step == 1 or step % self.every_steps == 0 or step == self.num_steps
        now = time.monotonic()
        if is_due or now - self._published >= PUBLISH_SECONDS:
            self._published = now
            self._publish(step, values)
        if is_due:
            self._write(step, values)

    def _publish(self, step: int, values: Mapping[str, float]) -> None:
        """What a scrape finds until the next time; more often than Prometheus asks would be for nothing."""
        publish = self.exporter
        num_images = self._unpublished_steps * self.global_batch
        publish.add(names.STEPS, self._unpublished_steps)
        publish.add(names.IMAGES, num_images)
        if self.work:
            publish.add(names.MODEL_FLOPS, num_images * self.work.flops_per_image)
        self._unpublished_steps = 0
        publish.set(names.STEP, step)
        publish.set(names.EPOCH, step * self.global_batch / self.images_per_epoch)
        publish.set(names.GOODPUT, self.goodput.ratio)
        for name, metric in _GAUGES.items():
            if name in values:
                publish.set(metric, values[name])
        publish.publish_step(
            {name: value for name, value in values.items() if name == "total" or "/" in name}
        )

    def publish_anomaly(self, kind: str) -> None:
        self.exporter.add(names.ANOMALIES, 1, kind)

    def publish_gradients(self, found: Mapping[str, float]) -> None:
        """found: `gradient_norm/T` and `gradient_cosine/A:B`; they go into the next record too."""
        for name, value in found.items():
            kind, _, tasks = name.partition("/")
            if kind == "gradient_norm":
                self.exporter.set(names.TASK_GRAD_NORM, value, tasks)
            else:
                self.exporter.set(names.TASK_GRAD_COSINE, value, *tasks.split(":"))
        self.note({name: round(value, 6) for name, value in found.items()})

    def note(self, values: Mapping[str, float]) -> None:
        """Numbers that some steps have, for the next record."""
        self._noted |= values

    def publish_evaluation(self, name: str, k: int, accuracy_ratio: float) -> None:
        self.exporter.set(names.EVAL_ACCURACY, accuracy_ratio, name, str(k))

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step: what was recorded beyond it is taken away."""
        self.exporter.add(names.ROLLBACKS, 1)
        self.lines.keep_until(step)
        self.goodput.go_back(self.lines.last)
        self._begin_window()

    def _begin_window(self) -> None:
        self._noted.clear()
        self._seen.clear()
        self._section_seconds.clear()
        self._window_steps = self._window_skipped = 0
        self._window_seconds = self._window_wait_seconds = 0.0

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        rate = self.global_batch * self._window_steps / max(self._window_seconds, 1e-9)
        self.exporter.set(names.IMAGES_PER_SECOND, rate)
        # the first step compiles and warms up, so it does not count towards the time left
        if step > 1:
            self._recent_seconds.append(self._window_seconds / self._window_steps)
            del self._recent_seconds[:-20]
        means = self._means()
        timed = {
            f"seconds/{section}": round(spent / self._window_steps, 6)
            for section, spent in self._section_seconds.items()
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
            **timed,
            **self._noted,
            "goodput_ratio": round(self.goodput.ratio, 4),
            "useful_seconds": round(self.goodput.useful_seconds, 3),
            "began_unix_time": round(self.goodput.began, 3),
            "unix_time": round(time.time(), 2),
        }
        if self.work:
            mfu = rate * self.work.flops_per_image / self.work.peak_flops_per_second
            self.exporter.set(names.MFU, mfu)
            record["mfu_ratio"] = round(mfu, 4)
        # the digest of the samples identifies one batch, and the others count from the start: a mean of
        # them would say nothing
        for name in ("samples", *_COUNTERS):
            value = values.get(name)
            record[name] = value if value is None or math.isfinite(value) else None
        self.lines.write(record)
        if self.also:
            self.also(record)
        logger.info(self._line(step, means, rate))
        self._begin_window()

    def _means(self) -> dict[str, float | None]:
        """Of what was finite; None where nothing was."""
        means: dict[str, float | None] = {}
        for name, seen in self._seen.items():
            total = sum(seen)
            finite = seen if math.isfinite(total) else [value for value in seen if math.isfinite(value)]
            means[name] = sum(finite) / len(finite) if finite else None
        return means

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
