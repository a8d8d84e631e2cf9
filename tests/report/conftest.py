"""Real runs of a few steps, made once for all tests of the report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_runs import MULTITASK, write_photographs

from pretrain.cli import main


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(
        tmp_path_factory.mktemp("photographs") / "shapes", ("red", "green", "blue", "yellow")
    )


@pytest.fixture(scope="session")
def multitask_run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tasks, four steps, then resumed for four more. Not to be written into: copy it."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "multitask.yaml"
    config.write_text(MULTITASK)
    run = folder / "six tasks"
    shards = f"data.shards={photographs}"
    assert main(["train", str(config), "--output-dir", str(run), shards]) == 0
    again = ["--resume", "auto", "schedule={kind: constant, steps: 8}"]
    assert main(["train", str(config), "--output-dir", str(run), shards, *again]) == 0
    return run


@pytest.fixture(scope="session")
def complete(multitask_run: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated and exported, with its report."""
    run = Path(shutil.copytree(multitask_run, tmp_path_factory.mktemp("complete") / "six tasks"))
    shards = str(photographs)
    assert main(["export", str(run), "--out", str(run / "exported")]) == 0
    assert main(["evaluate", "knn", str(run), "--train", shards, "--test", shards]) == 0
    assert main(["report", str(run), "--eval", shards, "--train", shards]) == 0
    return run
