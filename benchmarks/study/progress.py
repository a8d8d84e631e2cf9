"""How far the tasks themselves came in the runs of a study, which tells what a comparison can be about."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pretrain.tasks import TASKS
from pretrain.tasks.balance import settled_product
from study.records import Record, Results


def chances(results: Results, metrics: Sequence[str]) -> dict[str, list[float]]:
    """Metric of a task -> what one that learned nothing gets in the same unit, in every run that tells."""
    found = {}
    for metric in metrics:
        known = [record["metrics"].get(f"{metric.partition('/')[0]}/chance") for record in results.records]
        found[metric] = [value for value in known if value is not None]
    return found


def is_better_lower(metric: str) -> bool:
    task, _, name = metric.partition("/")
    return task in TASKS and TASKS[task].headline == name and not TASKS[task].higher_is_better


def last(record: Record, curve: str) -> float | None:
    found = record["curves"].get(curve)
    return found["values"][-1] if found else None


def weights(results: Results, variant: str) -> dict[str, dict[str, list[float]]]:
    """Task -> its weight at the first and the last step that were logged, and what its weighted loss came to.

    `reached` is (weight / the weight that the config gives) x loss at the end, `settles`: where that product
    comes to rest, if the weight is learned for long enough.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for record in results.runs.get(variant, {}).values():
        for task, settings in record["config"]["tasks"].items():
            curve, loss = record["curves"].get(f"weight/{task}"), last(record, f"loss/{task}")
            if settings is None or curve is None or loss is None:
                continue
            spec = TASKS[task]
            of_task = found.setdefault(task, {"first": [], "last": [], "reached": [], "settles": []})
            first, end = curve["values"][0], curve["values"][-1]
            likelihood = spec.likelihood_of(spec.config.model_validate(settings))
            for name, value in (
                ("first", first),
                ("last", end),
                ("reached", end / settings["weight"] * loss),
                ("settles", settled_product(likelihood)),
            ):
                of_task[name].append(value)
    return found


def told(values: Sequence[float], digits: int = 3) -> str:
    text = f"{statistics.fmean(values):.{digits}g}"
    return f"{text} ± {statistics.stdev(values):.1g}" if len(set(values)) > 1 else text
