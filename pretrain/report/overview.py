"""The head of the report: what ran, how far it came, and in one sentence how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pretrain.report.chart import number
from pretrain.report.curves import Progress
from pretrain.report.markup import Markup, join, tag

MIN_FEATURE_STD = 0.02  # below it features of different images are nearly the same, as the run's guard has it


@dataclass(frozen=True)
class Facts:
    """Everything the verdict is made from."""

    step: int  # of the newest record or checkpoint
    num_steps: int | None  # of the whole run, where it is known
    num_attempts: int
    outcome: str | None  # of the newest attempt: done, preempted, failed; None: it has not ended
    progress: tuple[Progress, ...]
    first_loss: float | None = None
    last_loss: float | None = None
    feature_std: float | None = None
    num_skipped: int = 0  # steps that were not finite
    num_rollbacks: int = 0
    num_bad_samples: int = 0
    accuracies: tuple[str, ...] = ()  # "k-NN 37.4 % (untrained 22.5 %)"


@dataclass(frozen=True)
class Overview:
    """What stands above the sections."""

    name: str
    facts: Facts
    rows: tuple[tuple[str, str], ...]  # what, and its value
    kicker: str = "Pretraining report"
    warnings: tuple[str, ...] = field(default=())


def header(overview: Overview) -> Markup:
    words, is_good = verdict(overview.facts)
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in overview.rows]
    return tag(
        "header",
        tag("p", overview.kicker, class_="kicker"),
        tag("h1", overview.name),
        tag("p", words, class_="verdict" if is_good else "verdict warn", role="note"),
        join(tag("p", warning, class_="reading") for warning in overview.warnings),
        tag("dl", *rows, class_="facts"),
    )


def verdict(facts: Facts) -> tuple[str, bool]:
    """One line on how the run went, and whether there is nothing to look into."""
    parts, worries = [_how_far(facts)], []
    judged = [row for row in facts.progress if row.is_better_than_chance is not None]
    better = [row for row in judged if row.is_better_than_chance]
    if judged:
        parts.append(_judged(judged, better))
        if len(better) < len(judged):
            worries.append("chance")
    if facts.first_loss is not None and facts.last_loss is not None and facts.first_loss != facts.last_loss:
        moved = "fell" if facts.last_loss < facts.first_loss else "rose"
        parts.append(f"the total loss {moved} from {number(facts.first_loss)} to {number(facts.last_loss)}")
    parts += facts.accuracies
    if facts.feature_std is not None and facts.feature_std < MIN_FEATURE_STD:
        worries.append("collapse")
        parts.append(
            f"features of different images are nearly the same (spread {facts.feature_std:.3f}): collapse"
        )
    for count, words in (
        (facts.num_skipped, "step was not finite and skipped|steps were not finite and skipped"),
        (facts.num_rollbacks, "return to an earlier checkpoint|returns to an earlier checkpoint"),
        (facts.num_bad_samples, "damaged image was replaced|damaged images were replaced"),
    ):
        if count:
            one, many = words.split("|")
            worries.append(words)
            parts.append(f"{count} {one if count == 1 else many}")
    if facts.outcome == "failed":
        worries.append("failed")
    sentence = "; ".join(parts)
    return sentence[:1].upper() + sentence[1:] + ".", not worries


def _how_far(facts: Facts) -> str:
    state = {
        "done": "finished",
        "preempted": "stopped on request, can be continued,",
        "failed": "failed",
        None: "still going or killed",
    }.get(facts.outcome, facts.outcome or "")
    of_all = f" of {facts.num_steps}" if facts.num_steps else ""
    attempts = f" in {facts.num_attempts} attempts" if facts.num_attempts > 1 else ""
    return f"{state} at step {facts.step}{of_all}{attempts}"


def _judged(judged: Sequence[Progress], better: Sequence[Progress]) -> str:
    if len(judged) == 1:
        name = judged[0].task.name
        return f"{name} is {'solved better than' if better else 'not solved better than'} by chance"
    if len(better) == len(judged):
        return f"all {len(judged)} tasks are solved better than by chance"
    others = _listed([row.task.name for row in judged if row not in better])
    return f"{len(better)} of {len(judged)} tasks are solved better than by chance, not {others}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
