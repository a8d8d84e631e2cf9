"""Few labels: every cell once, over any number of interruptions, and a table with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folder import tiny_config, write_checkpoint
from test_finetune import QUICK, write_data

from pretrain.cli import main
from pretrain.errors import CheckpointError, UserError
from pretrain.evaluate import fewshot as module
from pretrain.evaluate.fewshot import FewshotRequest, run_fewshot
from pretrain.evaluate.frozen import run_linear
from pretrain.evaluate.intervals import over_seeds
from pretrain.evaluate.recipes import recipe_with
from pretrain.evaluate.report import EvaluateConfig

PROBE = {"num_epochs": 3}
REQUEST = FewshotRequest("relvit", recipe_with("relvit", QUICK), (0.3, 1.0), (0, 1), PROBE, num_workers=0)
CONFIG = EvaluateConfig(device="cpu", batch_size=16, save=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "run", tiny_config())
    return tmp_path / "run"


def without_seconds(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in result["cells"]]


def test_the_table_has_both_read_outs_of_every_share_over_seeds(run: Path, data: Path) -> None:
    result = run_fewshot(run, data, data, REQUEST, CONFIG)
    assert list(result["rows"]) == ["0pct", "30pct", "100pct"]
    assert [row["num_train"] for row in result["rows"].values()] == [0, 9, 30]  # 3 of each of 3 classes
    pretrained = result["rows"]["0pct"]
    assert pretrained["finetuned"] is None
    quiet = EvaluateConfig(device="cpu", batch_size=16)
    alone = run_linear(run, data, data, quiet, changes=PROBE, seeds=(0, 1))
    assert pretrained["linear"]["top1_ratio"] == pytest.approx(alone["top1_ratio"])
    for row in list(result["rows"].values())[1:]:
        for read_out in ("finetuned", "linear"):
            of_row = [
                cell[f"{read_out}_top1_ratio"]
                for cell in result["cells"]
                if cell["fraction_ratio"] == row["fraction_ratio"]
            ]
            expected = over_seeds(of_row)
            assert row[read_out]["top1_ratio"] == expected["mean"]
            assert row[read_out]["top1_ratio_std"] == expected["std"]
            assert row[read_out]["top1_ratio_95"] == expected["interval_95"]
    assert json.loads((run / "eval" / "fewshot.json").read_text()) == json.loads(json.dumps(result))
    assert sorted(path.name for path in (run / "fewshot" / "relvit").iterdir()) == sorted(
        f"{share}pct_seed{seed}.json" for share in (0, 30, 100) for seed in (0, 1)
    )


def test_an_interrupted_table_goes_on_and_equals_one_never_stopped(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_fewshot(run, data, data, REQUEST, EvaluateConfig(device="cpu", batch_size=16))
    assert not (run / "eval").exists()
    finetune_once, made = module.finetune_once, []

    def stop_at_the_third(*arguments: Any) -> Any:
        made.append(arguments[2].name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return finetune_once(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune_once", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_fewshot(run, data, data, REQUEST, CONFIG)
        assert not (run / "eval" / "fewshot.json").exists()
        del made[:]
        patch.setattr(module, "finetune_once", lambda *a: made.append(a[2].name) or finetune_once(*a))
        resumed = run_fewshot(run, data, data, REQUEST, CONFIG)
        assert len(made) == 2  # of four
        again = run_fewshot(run, data, data, REQUEST, CONFIG)
        assert len(made) == 2
    assert without_seconds(resumed) == without_seconds(expected)
    assert again["rows"] == resumed["rows"]


def test_cells_made_otherwise_are_never_mixed_in(run: Path, data: Path) -> None:
    one = FewshotRequest("relvit", REQUEST.recipe, (1.0,), (0,), PROBE, num_workers=0)
    run_fewshot(run, data, data, one, CONFIG)
    other = FewshotRequest("relvit", recipe_with("relvit", [*QUICK, "clip_norm=2"]), (1.0,), (0,), PROBE)
    with pytest.raises(CheckpointError, match="made with another recipe; use another --out"):
        run_fewshot(run, data, data, other, CONFIG)
    path = run / "fewshot" / "relvit" / "100pct_seed0.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_fewshot(run, data, data, one, CONFIG)


@pytest.mark.parametrize(
    ("fractions", "seeds", "told"),
    [((0.0,), (0,), "--fraction 0"), ((1.5,), (0,), "--fraction 1.5"), ((1.0,), (3, 3), "--seeds: 3 3")],
)
def test_impossible_cells_are_told_before_the_work(
    fractions: tuple[float, ...], seeds: tuple[int, ...], told: str, run: Path, data: Path
) -> None:
    with pytest.raises(UserError, match=told):
        run_fewshot(run, data, data, FewshotRequest("relvit", REQUEST.recipe, fractions, seeds), CONFIG)
    assert not (run / "fewshot").exists()


def test_the_command_line_prints_the_table(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "fewshot", str(run), "--train", str(data), "--test", str(data), "--device", "cpu"]
    command += ["--recipe", "relvit", "--epochs", "1", "--batch-size", "16", "--linear-epochs", "2"]
    command += ["--fractions", "0.3", "--seeds", "0", "1", "--workers", "0"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("seed 0, 30 % of the labels (9 images): fine-tuned") for line in lines)
    table = [line.split() for line in lines[-3:]]
    assert [row[:3] for row in table] == [
        ["labels", "images", "fine-tuned"],
        ["0", "%", "0"],
        ["30", "%", "9"],
    ]
    assert "+-" in lines[-1]
    assert main([*command, "weight_decay=0.1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
