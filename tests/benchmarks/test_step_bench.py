"""The benchmark of step times runs, says what it measured, and the README shows what is kept."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from small_shards import make_shards

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import step
from steps import core, ours, report, turns

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "shards"
    make_shards(folder, [12, 12])
    return folder


def part(name: str, shards: Path, folder: Path, rounds: int = 3) -> dict[str, Any]:
    out = folder / f"{name}.json"
    assert (
        step.main(
            ["--part", name, "--toy", "--rounds", str(rounds), "--shards", str(shards), "--out", str(out)]
        )
        == 0
    )
    table: dict[str, Any] = json.loads(out.read_text())
    return table


def test_ratios_are_of_times_in_the_same_round() -> None:
    seconds = {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]}
    assert turns.ratio(seconds, "a", "b") == {
        "median": 3.0,
        "lower": 2.5,
        "upper": 3.5,
        "low": 2.0,
        "high": 4.0,
    }


def test_variants_take_turns_and_each_is_first_in_some_round() -> None:
    taken: list[str] = []
    steps = {name: lambda name=name: taken.append(name) for name in "abc"}
    seconds = turns.take_turns(steps, 5)
    rounds = ["".join(taken[start : start + 3]) for start in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 5, "b": 5, "c": 5}


def test_tasks_in_one_pass_are_compared_with_as_many_passes_as_tasks(shards: Path, tmp_path: Path) -> None:
    table = part("passes", shards, tmp_path)
    assert table["encoder_calls_per_step"] == {"one pass": 1, "a pass for each task": 6}
    (line,) = table["rows"]
    assert line["ratio"]["lower"] <= line["ratio"]["median"] <= line["ratio"]["upper"]
    assert table["rounds"] == 3


def test_separate_passes_give_the_losses_of_the_one_pass(shards: Path) -> None:
    setting = ours.Setting(shards, toy=True)
    config = ours.configuration(
        core.CORE, *ours.LOCAL, setting.model(224, 16), *core.views(setting, 224), setting.batch(4)
    )
    inputs = ours.inputs_for(config, shards)
    module = core.build.module(config, core.ALONE, inputs.device).eval()
    shared, separate = module._outputs(inputs)[1], core.separate_outputs(module, inputs)[1]
    losses = [{name: output.loss.item() for name, output in of.items()} for of in (separate, shared)]
    assert losses[0] == pytest.approx(losses[1])


def test_timm_s_step_stands_beside_ours(shards: Path, tmp_path: Path) -> None:
    table = part("supervised", shards, tmp_path)
    assert set(table["median_seconds"]) == {"ours", "timm"}
    assert table["rows"][0]["wanted"] == 1.0


@pytest.mark.skipif(find_spec("lightly") is not None, reason="lightly is installed here")
def test_a_peer_that_is_not_installed_is_named(shards: Path, tmp_path: Path) -> None:
    table = part("simclr", shards, tmp_path, rounds=1)
    assert list(table["median_seconds"]) == ["ours"]
    assert [line["absent"] for line in table["rows"]] == 2 * [
        "lightly is not installed (make bench installs it)"
    ]
    shown = report.markdown({"tables": {"simclr": table}, "machine": step.machine(), "versions": {}})
    assert "| SimCLR: ours / lightly | lightly is not installed" in shown


def test_a_step_trains(shards: Path) -> None:
    setting = ours.Setting(shards, toy=True)
    config = ours.configuration(
        core.CORE, *ours.LOCAL, setting.model(224, 16), *core.views(setting, 224), setting.batch(4)
    )
    inputs = ours.inputs_for(config, shards)
    module = core.build.module(config, core.ALONE, inputs.device)
    before = {name: value.clone() for name, value in module.named_parameters()}
    ours.training_step(config, inputs, module=module)()
    assert any(not value.equal(before[name]) for name, value in module.named_parameters())


def test_shards_without_an_index_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--shards", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "make shards" in said


def test_the_readme_shows_the_kept_result() -> None:
    kept = json.loads(step.RESULT.read_text())
    assert report.in_readme(README.read_text()) == report.markdown(kept)


@pytest.mark.slow
def test_all_tables_are_measured_and_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.json"
    assert step.main(["--toy", "--rounds", "2", "--shards", str(shards), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["tables"]) == list(step.SHOWN)
    assert {"command", "date", "machine", "threads", "versions", "images"} <= result.keys()
    assert {"torch", "timm", "deepspeed"} <= result["versions"].keys()
    printed = capsys.readouterr().out
    assert all(line["label"] in printed for line in report.lines_of(result))
