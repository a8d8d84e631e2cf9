"""The studies that come along, each one command: at toy size, so that it works where time is dear."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_scenes import write_folder
from small_shards import real_data, samples, write_shard

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from study.report import write

from pretrain.cli import main
from pretrain.data.indexing import index_folder
from pretrain.sweep.study import load_study

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "configs" / "studies"
ON_CIFAR = sorted(path for path in STUDIES.glob("*.yaml") if not path.stem.startswith("repre"))
NETWORK = [
    "model.args={depth: 2, embed_dim: 24, num_heads: 2}",
    "engine={kind: local, precision: fp32}",
    "batch.global_size=16",
    "data.lanes=4",
    "log={every_steps: 1, prometheus: {enabled: false}, gradients: {every_steps: 1}}",
    "checkpoint.every_steps=2",
]
# rows that together have every config and every read-out of their study
ROWS = {
    "core_question": ["contrastive", "all", "all-separate", "all-fixed-scaled"],
    "core_question_compute": ["contrastive", "all-separate"],
    "core_cpu": ["contrastive", "all", "all-separate", "all-fixed"],
    "core_cpu_compute": ["all", "all-separate"],
    "cpu_relvit": ["no_positions", "positions_shuffled"],
    "cpu_sit": ["sit"],
    "relvit_control": ["relvit", "joint", "positions"],
    "relvit_table4": ["angle", "all"],
    "sit_table4": ["reconstruction", "all", "all-uncertainty"],
}
# what makes a read-out of each kind short
SHORT = {
    "knn": [],
    "linear": ["--epochs", 1],
    "probes": ["--epochs", 1, "--num-train", 2000, "--num-test", 500],
    "dense": ["--epochs", 1, "--size-px", 24, 32],
    "finetune": ["num_epochs=1", "warmup_epochs=0", "--fraction", 0.01],
    "pretext": [],
    "head": [],
}


def folders(where: Path) -> None:
    """What the studies are run on, under the names that they use."""
    shards = where / "data_shards"
    for place, name in enumerate(("cifar10/train", "cifar10/test", "cifar10-lossless/test")):
        (shards / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(shards / f"{name}-0.tar", samples(20 * place, 20))
    for name in ("cifar10", "cifar10-lossless"):
        index_folder(shards / name)
    scenes = write_folder(shards / "camvid-segmentation")
    for kind in ("images", "masks"):
        (scenes / kind / "val").rename(scenes / kind / "test")


@pytest.mark.real_shards
@pytest.mark.parametrize("path", ON_CIFAR, ids=lambda path: path.stem)
def test_every_line_of_a_study_can_be_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every config of every row, every read-out's command and every set of data that it names."""
    folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(path), "--dry-run", "--results", "results"]) == 0, capsys.readouterr().err
    assert "runs into" in capsys.readouterr().out


def toy(path: Path, folder: Path) -> Path:
    """The same study with a small network and short read-outs, its first rows with one seed."""
    study: dict[str, Any] = yaml.safe_load(path.read_text())
    study["seeds"] = study.get("seeds", [0])[:1]
    study["base"] = str((path.parent / study["base"]).resolve())
    for row in study.get("variants", {}).values():
        if isinstance(row, dict) and "base" in row:
            row["base"] = str((path.parent / row["base"]).resolve())
    study["measure_steps"] = 6
    study["overrides"] = [*study.get("overrides", []), *NETWORK]
    for read_out in study["evaluate"]:
        given = [str(one) for one in read_out.get("args", [])]
        for flag in ("--num-train", "--num-test", "--fraction"):
            if flag in given:
                del given[given.index(flag) : given.index(flag) + 2]
        if "--size-px" in given:
            del given[given.index("--size-px") : given.index("--size-px") + 3]
        given = [one for one in given if not one.startswith("num_epochs")]
        read_out["args"] = [*given, *SHORT[read_out["kind"]]]
    (folder / path.name).write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / path.name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "variants"), ROWS.items(), ids=list(ROWS))
def test_a_study_runs_to_the_document_in_slices(name: str, variants: list[str], tmp_path: Path) -> None:
    """Runs for real, stopped by the clock and gone on with, to records and to the page."""
    shards = tmp_path / "data_shards"
    for part, where in (("cifar10", "cifar10"), ("cifar10-lossless-subset", "cifar10-lossless")):
        index_folder(real_data(part), shards / where)
    (shards / "camvid-segmentation").symlink_to(real_data("camvid"))
    study = toy(STUDIES / f"{name}.yaml", tmp_path)
    steps = ["schedule={steps: 3, warmup_steps: 1}"]
    command = [sys.executable, "-m", "pretrain", "sweep", study.name, *steps, "--results", "results"]
    told = ""
    measured = [["--measure-only"]] if "compute" in name and "cpu" not in name else []
    rows = list(load_study(study).all_variants())
    chosen = [["--index", str(rows.index(variant))] for variant in variants]
    for part in (*measured, *chosen):
        for minutes in ("0.2", "20"):  # the first is too short for all of it
            done = subprocess.run(
                [*command, *part, "--max-minutes", minutes],
                cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True,
            )  # fmt: skip
            told += done.stdout + done.stderr
            if done.returncode != 75:
                break
        assert done.returncode == 0, told[-3000:]
    records = {path.parent.name for path in (tmp_path / "results" / study.stem).glob("*/seed-0.json")}
    assert records == set(variants), told[-3000:]
    write(tmp_path / "results", tmp_path / "study.md")
    page = (tmp_path / "study.md").read_text()
    for variant in variants:
        assert f"| {variant} | 1 | " in page
