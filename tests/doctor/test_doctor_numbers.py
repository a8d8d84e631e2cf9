"""What takes hours to go wrong: the log of a real run, with some of its numbers changed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from answers import Answer
from outcomes import records

from pretrain.doctor import learning
from pretrain.doctor.run_files import read_run
from pretrain.tasks import TASKS

Ask = Callable[..., Answer]
Change = Callable[[float], Mapping[str, Any]]  # of how far the run is, from 0 to 1


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(change: Change, steps: int = 2000, **settings: Any) -> Path:
        """A copy of a healthy run, made longer, whose log lines say something else."""
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        lines = records(run)
        factor = steps // lines[-1]["step"]
        for line in lines:
            line["step"] = 1 if line["step"] == 1 else line["step"] * factor
            line |= {"step_seconds": 0.1, "data_wait_seconds": 0.01, "goodput_ratio": 0.9}
            line |= change(line["step"] / steps)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["schedule"]["steps"] = steps
        for name, value in settings.items():
            part, _, key = name.partition("__")
            config[part][key] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        log = (run / "train.log").read_text()
        (run / "train.log").write_text(log.replace("/40 |", f"/{steps} |"))
        record = json.loads((run / "attempts" / "0001.json").read_text())
        (run / "attempts" / "0001.json").write_text(json.dumps({**record, "step": steps}))
        return run

    return make


def test_a_longer_log_of_the_same_numbers_is_healthy(changed: Callable[..., Path], ask: Ask) -> None:
    answer = ask(changed(lambda progress: {"contrastive/accuracy": 0.5, "rotation/accuracy": 0.6}))
    assert answer.verdict == "healthy: finished, step 2000 of 2000"
    assert answer.findings == []


CASES: dict[str, tuple[Change, str, str]] = {
    "features fall into a point": (
        lambda progress: {"feature_std": 0.6 * (1 - progress) ** 2 + 0.03},
        "collapse",
        "feature_std fell from 0.6",
    ),
    "one direction": (lambda progress: {"effective_rank": 1.0 + 30 * (progress < 0.5)}, "collapse", "1.00"),
    "all alike": (
        lambda progress: {"similarity/same": 0.999, "similarity/different": 0.998},
        "collapse",
        "two views of an image are as similar (0.999) as two images are (0.998)",
    ),
    "embeddings in one point": (
        lambda progress: {"contrastive/embedding_std": 0.09 * (1 - progress) ** 2},
        "collapse",
        "contrastive/embedding_std fell from 0.0",
    ),
    "a teacher that says nothing": (
        lambda progress: {"dino/teacher_entropy": 8.31, "dino/entropy_bound": math.log(4096)},
        "collapse",
        "the teacher's entropy is 8.310 nats of at most 8.318 (ln K)",
    ),
    "a teacher with one answer": (
        lambda progress: {"dino/teacher_entropy": 0.01, "dino/entropy_bound": 8.3, "dino/chance": 0.99},
        "collapse",
        "0.010 nats",
    ),
    "a loss that rises": (
        lambda progress: {"loss/rotation": 1.4 * math.exp(2 * progress)},
        "diverging",
        "loss/rotation: 1.4",
    ),
    "a task at chance": (
        lambda progress: {"loss/rotation": 1.386, "rotation/accuracy": 0.252, "rotation/chance": 0.25},
        "dead task",
        "rotation: accuracy 0.252, by guessing 0.25",
    ),
    "a rank behind": (
        lambda progress: {"slowest_rank": 3, "slowest_rank_speed": 0.4},
        "straggler",
        "All ranks wait for rank 3",
    ),
    "tasks against each other": (
        lambda progress: {"gradient_cosine/contrastive:rotation": -0.6},
        "gradient conflict",
        "contrastive and rotation: mean cosine -0.60",
    ),
    "steps that take longer and longer": (
        lambda progress: {"step_seconds": 0.1 + progress},
        "getting slower",
        "as long as at first",
    ),
    "a loader that cannot keep up": (
        lambda progress: {"step_seconds": 0.1, "data_wait_seconds": 0.06, "images_per_second": 240.0},
        "data-bound",
        "240 images/s; without waiting about 600",
    ),
    "a storage that fails": (
        lambda progress: {"storage_retries": 500 * progress},
        "storage retries",
        "500 reads of shards failed",
    ),
    "time that is lost": (
        lambda progress: {"goodput_ratio": 0.4, "unix_time": 1e9 + 9e4 * progress, "began_unix_time": 1e9},
        "low goodput",
        "40% went into steps that count",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_have_gone_wrong_are_named(name: str, changed: Callable[..., Path], ask: Ask) -> None:
    change, cause, told = CASES[name]
    well = {"contrastive/accuracy": 0.5, "rotation/accuracy": 0.6}
    answer = ask(changed(lambda progress: {**well, **change(progress)}))
    assert list(answer.causes) == [cause]
    assert answer.causes[cause] != "note"
    assert told in answer.of(cause), answer.of(cause)
    assert answer.findings[0]["do"]


def test_a_task_that_the_balance_has_switched_off(changed: Callable[..., Path], ask: Ask) -> None:
    run = changed(
        lambda progress: {"weight/rotation": math.exp(-8 * progress), "rotation/accuracy": 0.6},
        balance__kind="uncertainty",
    )
    assert "weight/rotation: 0.9" in ask(run).of("task switched off")


def test_a_warm_up_as_long_as_the_run(changed: Callable[..., Path], ask: Ask) -> None:
    run = changed(lambda progress: {"rotation/accuracy": 0.6}, schedule__warmup_steps=2000)
    assert "set schedule.warmup_steps=200" in ask(run).of("learning rate")


def test_what_is_bad_early_is_not_judged_early(changed: Callable[..., Path], ask: Ask) -> None:
    """Chance, a uniform teacher and slow loading belong to the first hundred steps."""

    def young(progress: float) -> Mapping[str, Any]:
        chance = {"loss/rotation": 1.386, "rotation/accuracy": 0.25, "rotation/chance": 0.25}
        return {**chance, "dino/teacher_entropy": 8.317, "dino/entropy_bound": 8.318}

    assert ask(changed(young, steps=320)).findings == []


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_headline_of_every_task_is_found_in_its_metrics(task: str, whole: Path, tmp_path: Path) -> None:
    """The table of tasks imports torch, so the doctor has the names of headlines and which way is better."""
    spec = TASKS[task]
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "train.log", run)
    line = {"step": 1, f"{task}/{spec.headline}": 0.5, f"{task}/chance": 0.1, f"{task}/other": 0.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = learning.headline(read_run(run), task)
    assert found == spec.headline
    assert (found in learning.HIGHER_IS_BETTER) == spec.higher_is_better
