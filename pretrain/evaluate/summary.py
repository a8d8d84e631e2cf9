"""What a run has learned: its pretext tasks from start to end, and its features beside plain ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UserError
from pretrain.evaluate.frozen import run_knn, run_linear, take_features
from pretrain.evaluate.report import EvaluateConfig, save_result
from pretrain.evaluate.table import aligned
from pretrain.tasks import TASKS

LAST_SHARE = 0.1  # of a run's records that make up its end


@dataclass(frozen=True)
class TaskProgress:
    """A task's headline metric over a run; `chance` is what a model that learned nothing gets, at the end."""

    task: str
    metric: str
    start: float
    end: float
    chance: float
    is_better_than_chance: bool


def task_progress(run: Path) -> list[TaskProgress]:
    """Read `metrics.jsonl` of a run: the first step, and the mean over the last tenth of the records."""
    path = run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        tasks = yaml.safe_load((run / "config.yaml").read_text())["tasks"]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; summary wants the folder of a run") from None
    if not records:
        raise UserError(f"{path}: holds no records yet; let the run take a few steps")
    last = records[-max(1, round(LAST_SHARE * len(records))) :]

    def mean(name: str) -> float:
        values = [record[name] for record in last if record.get(name) is not None]
        return sum(values) / len(values) if values else float("nan")

    progress = []
    for task, settings in tasks.items():
        if settings is None:
            continue
        spec = TASKS[task]
        end, chance = mean(f"{task}/{spec.headline}"), mean(f"{task}/chance")
        start = records[0].get(f"{task}/{spec.headline}")
        better = end > chance if spec.higher_is_better else end < chance
        progress.append(
            TaskProgress(task, spec.headline, float("nan") if start is None else start, end, chance, better)
        )
    return progress


def run_summary(run: Path, train: str, test: str, config: EvaluateConfig) -> dict[str, Any]:
    """Pretext metrics, and k-NN and linear accuracy of trained, untrained and raw-pixel features.

    The result is also written to <run>/eval/summary.json.
    """
    progress = task_progress(run)
    features = {}
    for name, weights in (("trained", str(run)), ("untrained", f"untrained:{run}"), ("pixels", "pixels")):
        quiet = replace(config, save=False, feature=None if name == "pixels" else config.feature)
        sets = take_features(weights, train, test, quiet)
        nearest = run_knn(weights, train, test, quiet, sets=sets)
        linear = run_linear(weights, train, test, quiet, sets=sets)
        features[name] = {"knn": nearest, "linear": linear}
    result = {
        "method": "summary",
        "run": str(run),
        "tasks": [vars(row) for row in progress],
        "features": features,
    }
    if sets.accelerator.is_main_process:
        save_result((config.out or run) / "eval", result)
    return result


def format_summary(result: dict[str, Any]) -> str:
    """Two tables of plain text."""
    tasks = [("task", "metric", "start", "end", "chance", "")]
    for row in result["tasks"]:
        verdict = "better than chance" if row["is_better_than_chance"] else "NOT better than chance"
        numbers = [f"{row[key]:.3f}" for key in ("start", "end", "chance")]
        tasks.append((row["task"], row["metric"], *numbers, verdict))
    features = [("features", "k-NN (k=20) %", "linear probe %")]
    for name, methods in result["features"].items():
        features.append(
            (name, *(f"{100 * methods[method]['top1_ratio']:.1f}" for method in ("knn", "linear")))
        )
    return f"{aligned(tasks)}\n\n{aligned(features)}"
