"""The CIFAR-10 protocol runs commands that there are, each once, over any number of slices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cifar10_protocol

from pretrain.cli import parse
from pretrain.sweep.processes import StoppedError

HERE = Path(__file__).parents[2]


def arguments_of(folder: Path, *more: str) -> list[str]:
    config = HERE / "configs" / "methods" / "sit_vits4_cifar10.yaml"
    return [
        "--config",
        str(config),
        "--folder",
        str(folder / "run"),
        "--out",
        str(folder / "out.json"),
        *more,
    ]


def test_every_stage_is_a_command_that_there_is(tmp_path: Path) -> None:
    given = arguments_of(
        tmp_path, "schedule.epochs=2", "--seeds", "0", "--recipe", "deit", "--linear-epochs", "3"
    )
    stages = cifar10_protocol.commands(cifar10_protocol.parse([*given, "--recipe-settings", "num_epochs=1"]))
    assert list(stages) == ["train", "export", "knn", "linear", "fewshot"]
    parsed = {name: parse(command) for name, (_, command) in stages.items()}
    assert parsed["train"].resume == "auto"
    assert "schedule.epochs=2" in parsed["train"].overrides
    assert parsed["fewshot"].fractions == [0.01, 0.1, 0.25, 0.5, 1.0]
    assert (parsed["fewshot"].overrides, parsed["linear"].epochs) == (["num_epochs=1"], 3)


class Slices:
    """Stands for the processes: a slice has room for one stage, which leaves its product."""

    def __init__(self, products: dict[str, Path]) -> None:
        self.products, self.started, self.room = products, list[str](), 1

    def call(self, command: list[str], log: Path) -> float:
        if not self.room:
            raise StoppedError
        self.room -= 1
        kind = command[3] if command[3] != "evaluate" else command[4]
        self.started.append(kind)
        product = self.products["export" if kind == "export" else kind]
        if kind != "train":
            product.parent.mkdir(parents=True, exist_ok=True)
            product.write_text("{}")
        return 1.0


def test_a_slice_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    arguments = cifar10_protocol.parse(arguments_of(tmp_path))
    stages = cifar10_protocol.commands(arguments)
    processes: Any = Slices({name: product for name, (product, _) in stages.items()})
    for _ in range(6):
        processes.room = 2
        try:
            cifar10_protocol.run_stages(stages, processes, arguments.folder)
        except StoppedError:
            continue
        break
    assert processes.started == ["train", "export", "knn", "linear", "fewshot"]


def test_a_folder_is_gone_on_with_by_the_same_settings_only(tmp_path: Path) -> None:
    cifar10_protocol.refuse_changed(tmp_path / "run", {"train": ["a"], "knn": ["b"]})
    cifar10_protocol.refuse_changed(tmp_path / "run", {"train": ["a"], "knn": ["b"]})
    with pytest.raises(SystemExit, match="begun with another knn; choose another --folder"):
        cifar10_protocol.refuse_changed(tmp_path / "run", {"train": ["a"], "knn": ["c"]})
    assert not (tmp_path / "run").exists()
    assert json.loads((tmp_path / "run.protocol.json").read_text())["knn"] == ["b"]
