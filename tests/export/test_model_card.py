"""The card of an export tells what is so, and what evaluations have found since."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from run_folder import seal, tiny_config, write_checkpoint

from pretrain.export.exporting import Exported, Target, export_run
from pretrain.export.options import ExportOptions


def export(folder: Path, **asked: Any) -> Exported:
    (done,) = export_run(folder / "run", [Target("timm", folder / "out")], ExportOptions(**asked))
    assert isinstance(done, Exported)
    return done


def card_of(folder: Path) -> str:
    return (folder / "out" / "README.md").read_text()


def result(method: str, top1_ratio: float, sha256: str) -> dict[str, Any]:
    """As `pretrain evaluate` writes it."""
    return {
        "method": method,
        "top1_ratio": top1_ratio,
        "encoder": {"weights": "run", "feature": "class", "sha256": sha256},
        "test": {"folder": "/data/cifar10", "split": "test", "num_samples": 10000},
    }


def save(folder: Path, name: str, content: Any) -> None:
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "eval" / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("pooling", [None, "avg"])
def test_the_three_lines_of_the_card_load_the_weights(
    pooling: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(), ("rotation",))
    export(tmp_path, global_pool=pooling, img_px=48)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path), re.DOTALL)
    assert len(code.splitlines()) == 3
    assert "pretrained=True" in code
    assert "normalised (B, 3, 48, 48) -> (B, 24)" in code
    monkeypatch.chdir(tmp_path)
    named: dict[str, Any] = {"images": torch.zeros(1, 3, 48, 48)}
    exec(code, named)
    model = timm.create_model("local-dir:out", pretrained=True).eval()
    assert torch.equal(named["features"], model(named["images"]))


def test_the_card_names_the_data_by_what_cannot_be_mistaken_and_no_path(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", tiny_config())
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    config["data"] = {"sources": [{"shards": "/secret/place/cats"}, {"shards": "s3://bucket/dogs/"}]}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    state = json.loads((checkpoint / "state.json").read_text())
    state["identity"] = {"manifest_hash": ["c0ffee", "decade"]}
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    export(tmp_path, license="cc-by-4.0")
    card = card_of(tmp_path)
    assert "| data | cats (manifest c0ffee), dogs (manifest decade) |" in card
    assert "secret" not in card
    assert "| method | contrastive, rotation |" in card
    assert card.startswith("---\nlibrary_name: timm\nlicense: cc-by-4.0\n")


def test_results_of_these_weights_are_told_and_those_of_others_are_not(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    report = export(tmp_path).report
    assert "## Results" not in card_of(tmp_path)
    trained, untrained = result("knn", 0.366, report.source_sha256), result("knn", 0.225, "")
    del untrained["encoder"]["sha256"]
    save(tmp_path / "run", "summary.json", {"features": {"trained": trained, "untrained": untrained}})
    save(tmp_path / "run", "linear.json", result("linear", 0.9, "of another step"))
    save(tmp_path / "run", "broken.json", "{")
    save(tmp_path / "out", "linear.json", result("linear", 0.507, report.model_sha256))
    modified = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    done = export(tmp_path)
    assert (done.state, done.kept) == ("new results", None)
    assert re.findall(r"^\| (?:knn|linear) .*$", card_of(tmp_path), re.MULTILINE) == [
        "| knn | class | cifar10 (test), 10000 images | 36.60 |",
        "| linear | class | cifar10 (test), 10000 images | 50.70 |",
    ]
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == modified
    assert export(tmp_path).state == "up to date"
    stored = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert [row["top1_ratio"] for row in stored["results"]] == [0.366, 0.507]


def test_a_card_that_someone_has_written_in_is_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    report = export(tmp_path).report
    (tmp_path / "out" / "README.md").write_text("my own words")
    save(tmp_path / "run", "knn.json", result("knn", 0.366, report.source_sha256))
    assert export(tmp_path).state == "up to date"
    assert card_of(tmp_path) == "my own words"


def test_the_card_says_which_timm_is_too_old(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(pos_embed="none"), ("rotation",))
    note = export(tmp_path).report.note
    assert note == (
        "needs timm 1.0.26 or later: an older one silently drops class token and registers where there are "
        "no positions"
    )
    assert f"It {note}." in card_of(tmp_path)
