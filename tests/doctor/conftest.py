"""Runs of a small config that end well or are made to fail, and what the doctor says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from answers import Answer
from small_shards import samples, write_shard
from test_faults import CONFIG, Runs

from pretrain import cli
from pretrain.data.indexing import index_folder


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
