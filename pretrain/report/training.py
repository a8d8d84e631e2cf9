"""The sections on the training itself: curves of every task, weights, speed, health, attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.report.chart import ABSENT, Chart, Mark, line_chart, number
from pretrain.report.curves import (
    Progress,
    Record,
    Series,
    TaskKind,
    attempt_starts,
    data_wait,
    progress,
    series,
    sparse_series,
)
from pretrain.report.markup import Markup, join, tag
from pretrain.report.page import Section, how_to_read, left_out, section, table

MAX_LINES = 8  # of one chart, as many as there are colours
MAX_ANOMALIES = 20  # that are listed


@dataclass(frozen=True)
class Attempt:
    """One start of the run, as its file tells."""

    number: int
    since: str
    began_at: int | None  # step
    outcome: str | None
    step: int | None  # at which it ended


@dataclass(frozen=True)
class Training:
    """What was recorded while the run trained."""

    records: tuple[Record, ...]
    tasks: tuple[TaskKind, ...]
    num_steps: int | None
    attempts: tuple[Attempt, ...] = ()
    anomalies: tuple[Mapping[str, Any], ...] = ()  # of anomalies.jsonl
    bad_samples: tuple[Mapping[str, Any], ...] = ()  # of quarantine.jsonl
    learns_weights: bool = False

    @property
    def marks(self) -> tuple[Mark, ...]:
        marks = [Mark(step, f"attempt {which}") for step, which in attempt_starts(self.records)]
        for anomaly in self.anomalies:
            step = anomaly.get("step")
            if isinstance(step, int | float):
                marks.append(Mark(float(step), str(anomaly.get("kind", "anomaly")), is_alarm=True))
        return tuple(marks)

    def chart(
        self, title: str, *lines: Series | None, reference: Series | None = None, unit: str = ""
    ) -> Markup:
        found = tuple(line for line in lines if line is not None)
        is_going = self.num_steps and self.records and self.records[-1]["step"] < self.num_steps
        end = float(self.num_steps) if is_going and self.num_steps else None
        return line_chart(Chart(title, found, reference, self.marks, unit, end))


def training_sections(training: Training) -> list[Section]:
    if not training.records:
        why = "the run has written no record into metrics.jsonl yet"
        return [left_out("tasks", "Tasks", why), left_out("training", "Speed and learning rate", why)]
    return [
        _tasks(training),
        _weights(training),
        _speed(training),
        _health(training),
        _attempts(training),
    ]


def _tasks(training: Training) -> Section:
    rows = progress(training.records, training.tasks)
    total = series(training.records, "total", "loss")
    alone = len(training.tasks) == 1 and series(training.records, f"loss/{training.tasks[0].name}", "loss")
    cards = [] if total is None or alone == total else [training.chart("Total loss", total)]
    nearest = sparse_series(training.records, "knn_top1_ratio", "accuracy")
    if nearest:
        cards.append(training.chart("k-NN on labelled images, on the way", nearest))
    for task in training.tasks:
        cards += _task_cards(training, task)
    missing_loss = [
        task.name for task in training.tasks if series(training.records, f"loss/{task.name}") is None
    ]
    note = f" Not recorded: {', '.join(missing_loss)}." if missing_loss else ""
    return section(
        "tasks",
        "Tasks: losses and metrics",
        how_to_read(
            "Every task has its loss and the metric that tells how well it is solved. The dashed line is "
            "chance: what a network gets that has learned nothing. ",
            tag("b", "Good"),
            ": the metric leaves chance and moves on from it; a line that lies on chance says that the task "
            "is not learned. A dashed upright line is where another attempt went on." + note,
        ),
        _progress_table(rows),
        tag("div", join(cards), class_="cards"),
    )


def _task_cards(training: Training, task: TaskKind) -> list[Markup]:
    cards = []
    loss = series(training.records, f"loss/{task.name}", "loss")
    metric = series(training.records, f"{task.name}/{task.headline}", task.headline)
    chance = series(training.records, f"{task.name}/chance", "chance")
    is_loss = loss is not None and metric is not None and loss.values == metric.values
    if loss and not is_loss:
        cards.append(training.chart(f"{task.name}: loss", loss))
    if metric:
        wanted = "higher is better" if task.higher_is_better else "lower is better"
        told = f"{task.headline}, its loss" if is_loss else f"{task.headline}, {wanted}"
        cards.append(training.chart(f"{task.name}: {told}", metric, reference=chance))
    return cards


def _progress_table(rows: Sequence[Progress]) -> Markup | None:
    if not rows:
        return None
    lines = []
    for row in rows:
        told: Markup | str = "no chance known"
        if row.is_better_than_chance is not None:
            good = row.is_better_than_chance
            told = tag(
                "span",
                "better than chance" if good else "not better than chance",
                class_="good" if good else "bad",
            )
        lines.append(
            (row.task.name, row.task.headline, number(row.start), number(row.end), number(row.chance), told)
        )
    return table(("task", "metric", "start", "end", "chance", ""), lines, numbers=(2, 3, 4))


def _weights(training: Training) -> Section:
    title = "Weights of the tasks"
    lines = [
        line
        for task in training.tasks
        if (line := series(training.records, f"weight/{task.name}", task.name)) is not None
    ]
    if len(lines) < 2:
        return left_out("weights", title, "one task alone has nothing to be weighed against")
    if not training.learns_weights:
        fixed = ", ".join(f"{line.name} {number(line.known[-1])}" for line in lines)
        return left_out("weights", title, f"they are fixed, not learned: {fixed}")
    cards = [
        training.chart("Weight of each loss", *lines[start : start + MAX_LINES])
        for start in range(0, len(lines), MAX_LINES)
    ]
    shares = [
        _share(training.records, line.name, [other.name for other in lines]) for line in lines[:MAX_LINES]
    ]
    cards.append(training.chart("Share of the weighted losses", *shares, unit=" %"))
    return section(
        "weights",
        title,
        how_to_read(
            "What each loss is multiplied by in the total; the balance learns it from how uncertain each "
            "task remains (Kendall et al., 2018). Beside it, the part that each weighted loss makes of their "
            "sum. ",
            tag("b", "Good"),
            ": weights settle, and no task's share runs to 0 or to 100 %.",
        ),
        tag("div", join(cards), class_="cards"),
    )


def _share(records: Sequence[Record], name: str, names: Sequence[str]) -> Series | None:
    """Weight times loss of one task, in percent of the sum over all."""
    losses = {other: series(records, f"loss/{other}") for other in names}
    weights = {other: series(records, f"weight/{other}") for other in names}
    steps, values = [], []
    for place, record in enumerate(records):
        terms = {}
        for other in names:
            loss, weight = losses[other], weights[other]
            if loss is None or weight is None:
                continue
            value, factor = loss.values[place], weight.values[place]
            if value is not None and factor is not None:
                terms[other] = value * factor
        total = sum(terms.values())
        steps.append(float(record["step"]))
        values.append(100 * terms[name] / total if name in terms and total > 0 else None)
    found = Series(name, tuple(steps), tuple(values))
    return found if found.known else None


def _speed(training: Training) -> Section:
    records = training.records
    cards = [
        training.chart(title, line, unit=unit)
        for title, line, unit in (
            ("Learning rate", series(records, "lr", "rate"), ""),
            ("Throughput", series(records, "images_per_second", "images/s"), ""),
            ("Waiting for data", data_wait(records), " %"),
            ("Teacher's momentum", series(records, "momentum", "momentum"), ""),
        )
        if line is not None
    ]
    if not cards:
        return left_out("training", "Speed and learning rate", "none of it was recorded")
    return section(
        "training",
        "Speed and learning rate",
        how_to_read(
            "Images per second over all ranks, and how much of a step passes waiting for images. ",
            tag("b", "Good"),
            ": a level rate, and a wait of a few percent; more says that readers or decoders are the "
            "bottleneck (pretrain shards bench). The first record includes warming up.",
        ),
        tag("div", join(cards), class_="cards"),
    )


def _health(training: Training) -> Section:
    records = training.records
    cards = [
        training.chart(title, line)
        for title, line in (
            ("Spread of features", series(records, "feature_std", "spread")),
            ("Norm of the gradient", series(records, "grad_norm", "norm")),
        )
        if line is not None
    ]
    skipped = sum(int(record.get("skipped_steps") or 0) for record in records)
    notes = [tag("p", f"Steps skipped because a loss or gradient was not finite: {skipped}.")]
    if training.bad_samples:
        reasons: dict[str, int] = {}
        for sample in training.bad_samples:
            reason = str(sample.get("reason", "unknown"))
            reasons[reason] = reasons.get(reason, 0) + 1
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        notes.append(tag("p", f"Images that could not be used and were replaced (quarantine.jsonl): {told}."))
    if training.anomalies:
        last = training.anomalies[-MAX_ANOMALIES:]
        rows = [(str(one.get("step", "?")), str(one.get("kind", "?")), _details(one)) for one in last]
        more = len(training.anomalies) - len(last)
        notes.append(
            tag(
                "p",
                f"Noted in anomalies.jsonl{f'; the last {len(last)} of {len(last) + more}' if more else ''}:",
            )
        )
        notes.append(table(("step", "what", "numbers"), rows, wrapped=(2,)))
    else:
        notes.append(tag("p", "No loss spike, collapse or step that was not finite was noted."))
    if not cards:
        return left_out("health", "Health", "neither the spread of features nor gradients were recorded")
    return section(
        "health",
        "Health",
        how_to_read(
            "The spread tells how far apart the directions of different images' features lie, from 0, all "
            "the same, to 1. ",
            tag("b", "Good"),
            ": the spread stays well above 0 (below 0.02 is collapse), and the gradient's norm stays in one "
            "order of magnitude. Triangles are anomalies.",
        ),
        tag("div", join(cards), class_="cards"),
        *notes,
    )


def _details(anomaly: Mapping[str, Any]) -> str:
    parts = [
        f"{key} {number(value) if isinstance(value, float) else value}"
        for key, value in anomaly.items()
        if key not in ("step", "kind", "sample_ids", "unix_time")
    ]
    samples = anomaly.get("sample_ids")
    if isinstance(samples, list) and samples:
        parts.append(f"{len(samples)} samples")
    return ", ".join(parts)


def _attempts(training: Training) -> Section:
    if len(training.attempts) < 2:
        return left_out("attempts", "Attempts", "the run was started once and never resumed")
    rows = [
        (
            str(one.number),
            one.since,
            ABSENT if one.began_at is None else str(one.began_at),
            one.outcome or "still going, or killed",
            ABSENT if one.step is None else str(one.step),
        )
        for one in training.attempts
    ]
    return section(
        "attempts",
        "Attempts",
        how_to_read(
            "Every start of the run, from which step it went on and how it ended. ",
            tag("b", "Good"),
            ": each goes on from where the one before was saved; steps in between were taken again.",
        ),
        table(("attempt", "since", "from step", "ended", "at step"), rows, numbers=(2, 4)),
    )
