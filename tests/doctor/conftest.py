"""Runs of a small config that end well or are made to fail, and what the doctor says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_shards import samples, write_shard
from test_faults import CONFIG, Runs

from pretrain import cli
from pretrain.data.indexing import index_folder


class Answer:
    """What `pretrain doctor RUN --json` prints, and its exit code."""

    def __init__(self, code: int, printed: str) -> None:
        self.code = code
        self.whole: dict[str, Any] = json.loads(printed)
        self.verdict: str = self.whole["verdict"]
        self.findings: list[dict[str, Any]] = self.whole["findings"]

    @property
    def causes(self) -> dict[str, str]:
        """Cause -> severity."""
        return {finding["cause"]: finding["severity"] for finding in self.findings}

    def of(self, cause: str) -> str:
        """Everything that is said of one cause."""
        [found] = [finding for finding in self.findings if finding["cause"] == cause]
        return "\n".join([found["what"], *found["evidence"], found["do"], found["command"]])


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def asked(run: Path, *flags: str) -> Answer:
        capsys.readouterr()
        code = cli.main(["doctor", str(run), "--json", *flags])
        return Answer(code, capsys.readouterr().out)

    return asked


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write_shard(folder / f"images-{number}.tar", samples(number * 20, 20, height=32, width=32))
    index_folder(folder)
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(folder)))
    return path


@pytest.fixture
def runs(config: Path, tmp_path: Path) -> Runs:
    return Runs(config, tmp_path)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that nothing disturbs, and that has exported its weights."""
    folder = tmp_path_factory.mktemp("whole")
    settings = ["schedule.steps=40", "checkpoint.every_steps=20"]
    Runs(config, folder).start("one", settings=settings).ends(0)
    return folder / "one"
