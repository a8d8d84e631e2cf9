"""A finished run leaves its weights ready for timm, and nothing that goes wrong there spoils the run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from outcomes import records
from safetensors.torch import load_file
from small_shards import samples, write_shard

from pretrain import checkpoint
from pretrain.cli import main
from pretrain.data.indexing import index_folder
from pretrain.final_export import export_at_end

NUM_STEPS = 4

CONFIG = """
seed: 3
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 8, args: {depth: 1, embed_dim: 24, num_heads: 2}}
data: {shards: SHARDS, lanes: 4, shuffle_block: 4, resident: true}
views:
  one: &view {size_px: 32, turn: true, interpolation: bilinear}
  two: *view
tasks:
  contrastive: {hidden_dim: 16, out_dim: 8}
  rotation: {}
teacher: {momentum: 0.9}
schedule: {steps: 4}
batch: {global_size: 8}
engine: {precision: fp32}
checkpoint: {every_steps: 2}
log: {every_steps: 1, prometheus: {enabled: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train-0.tar", samples(0, 32, height=32, width=32))
    index_folder(folder)
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(folder)))
    return path


def train(config: Path, run: Path, *more: str) -> int:
    return main(["train", str(config), "--output-dir", str(run), "engine.kind=local", *more])


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(config, run) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def report_of(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "exported" / "export_report.json").read_text())
    return found


def test_a_finished_run_has_its_teacher_ready_for_timm(finished: Path) -> None:
    model = timm.create_model(f"local-dir:{finished / 'exported'}", pretrained=True).eval()
    saved = load_file(checkpoint.step_folder(finished, NUM_STEPS) / checkpoint.TEACHER)
    loaded = model.state_dict()
    assert loaded
    assert all(torch.equal(saved[f"backbone.{name}"], value) for name, value in loaded.items())
    report = report_of(finished)
    assert (report["source_weights"], report["source_step"]) == ("teacher", NUM_STEPS)
    assert "exported: " in (finished / "train.log").read_text().splitlines()[-1]


def test_what_the_run_exports_is_what_the_command_would(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run / "exported")
    assert main(["export", str(run)]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert contents(run / "exported") == before
    assert main(["export", str(run), "--out", str(run.parent / "by hand")]) == 0
    by_hand = run.parent / "by hand" / "model.safetensors"
    assert by_hand.read_bytes() == before["model.safetensors"][0]


def test_a_run_that_is_done_already_exports_only_what_is_lacking(
    run: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run / "exported")
    assert train(config, run, "--resume", "auto") == 0
    assert f"the weights of step 4 are in {run / 'exported'} already" in capsys.readouterr().out
    assert contents(run / "exported") == before
    shutil.rmtree(run / "exported")
    assert train(config, run, "--resume", "auto") == 0
    assert set(contents(run / "exported")) == set(before)


def test_a_run_that_goes_on_replaces_its_export_and_keeps_what_the_user_had_asked_for(
    run: Path, config: Path
) -> None:
    assert main(["export", str(run), "--license", "mit", "--weights", "student", "--img-px", "48"]) == 0
    assert train(config, run, "--resume", "auto", "schedule.steps=6") == 0
    report = report_of(run)
    assert (report["source_step"], report["source_weights"]) == (6, "student")
    assert report["options"]["license"] == "mit"  # type: ignore[index]
    model = timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True)
    assert model.patch_embed.img_size == (48, 48)
    assert not list(run.glob("exported.*"))


def test_the_switch_and_an_early_end_leave_no_export(config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "off", "export.at_end=false") == 0
    assert records(tmp_path / "off")[-1]["step"] == NUM_STEPS
    assert train(config, tmp_path / "early", "preempt.max_minutes=0.0001") == 75
    for run in ("off", "early"):
        assert not (tmp_path / run / "exported").exists()
        assert not list((tmp_path / run).glob(".exported*"))


def test_an_export_that_fails_is_a_warning_with_the_command_to_repeat_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    assert train(config, run, "export.at_end=false") == 0
    (run / "exported").mkdir()
    (run / "exported" / "thesis.tex").write_text("mine")
    capsys.readouterr()
    assert train(config, run, "--resume", "auto") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"the run is done, but its weights were not exported ({run / 'exported'}: exists and is not an "
        f"export of ours; choose another --out or remove it): pretrain export '{run}'"
    )
    assert [path.name for path in (run / "exported").iterdir()] == ["thesis.tex"]
    assert json.loads((run / "attempts" / "0002.json").read_text())["outcome"] == "done"


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, and nothing written to the output of a test before."""
    monkeypatch.setattr(logging.getLogger("pretrain"), "handlers", [caplog.handler])
    return caplog


@pytest.fixture
def hanging(run: Path, heard: pytest.LogCaptureFixture) -> Iterator[Path]:
    """A run whose newest checkpoint is on a disk that does not answer: reading it waits for ever."""
    shutil.rmtree(run / "exported")
    manifest = checkpoint.step_folder(run, NUM_STEPS) / checkpoint.MANIFEST
    manifest.unlink()
    os.mkfifo(manifest)
    yield run
    with manifest.open("w"):  # lets the thread go
        pass
    for thread in threading.enumerate():
        if thread.name == "export":
            thread.join(30)


def test_a_disk_that_hangs_holds_the_end_of_a_run_up_for_a_bounded_time(
    hanging: Path, heard: pytest.LogCaptureFixture
) -> None:
    export_at_end(hanging, is_first=True, limit_seconds=0.3)
    (record,) = heard.records
    assert record.levelno == logging.WARNING
    assert "not done within 0.3 s; the disk may hang" in record.getMessage()
    assert record.getMessage().endswith(f"pretrain export {hanging}")
    assert not (hanging / "exported").exists()


def test_only_the_first_rank_exports(run: Path) -> None:
    shutil.rmtree(run / "exported")
    export_at_end(run, is_first=False, limit_seconds=60.0)
    assert not (run / "exported").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_every_zero_stage_and_number_of_ranks_ends_with_the_export_of_its_checkpoint(
    stage: int, ranks: int, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain", "train", str(config), "--output-dir", str(run)]
    settings = ["--nproc", str(ranks), f"engine.deepspeed.zero_optimization.stage={stage}"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("exported: ") for line in done.stdout.splitlines()) == 1
    report = report_of(run)
    assert report["source_step"] == NUM_STEPS
    for weights in ("teacher", "student"):
        out = tmp_path / weights
        assert main(["export", str(run), "--weights", weights, "--out", str(out)]) == 0
        saved = load_file(checkpoint.step_folder(run, NUM_STEPS) / "weights" / f"{weights}.safetensors")
        exported = load_file(out / "model.safetensors")
        assert all(torch.equal(saved[f"backbone.{name}"], value) for name, value in exported.items())
        assert len(exported) == sum(name.startswith("backbone.") for name in saved)
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == (
        run / "exported" / "model.safetensors"
    ).read_bytes()
