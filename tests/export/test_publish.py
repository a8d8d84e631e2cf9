"""An export is where it should be, whole and of the right weights; what others put there is not lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from run_folder import random_state, tiny_config, write_checkpoint

from pretrain.errors import UserError
from pretrain.export.export_report import read_report
from pretrain.export.exporting import Exported, State, Target, export_run
from pretrain.export.options import ExportOptions


def export(folder: Path, options: ExportOptions | None = None) -> Exported:
    (done,) = export_run(folder / "run", [Target("timm", folder / "out")], options)
    assert isinstance(done, Exported)
    return done


def run_of(folder: Path, *steps: int) -> None:
    for step in steps:
        state = random_state(tiny_config(), 0, seed=step)
        write_checkpoint(folder / "run", tiny_config(), step=step, networks={"student": state})


def step_of(folder: Path) -> int:
    record = read_report(folder)
    assert record is not None
    return int(record["source_step"])


def test_the_same_export_is_made_once(tmp_path: Path) -> None:
    run_of(tmp_path, 1000)
    states: list[State] = []
    modified = []
    for options in (None, None, ExportOptions(license="mit"), ExportOptions(license="mit"), None):
        states.append(export(tmp_path, options).state)
        modified.append((tmp_path / "out" / "model.safetensors").stat().st_mtime_ns)
    assert states == ["written", "up to date", "replaced", "up to date", "replaced"]
    assert modified[0] == modified[1] < modified[2] == modified[3] < modified[4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "out").iterdir())


def test_a_newer_checkpoint_replaces_the_export_of_an_older_one_and_nothing_of_it_is_left(
    tmp_path: Path,
) -> None:
    run_of(tmp_path, 1000)
    export(tmp_path)
    run_of(tmp_path, 2000)
    done = export(tmp_path)
    assert (done.state, done.kept, step_of(tmp_path / "out")) == ("replaced", None, 2000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("change", ["added", "edited", "removed"])
def test_an_older_export_that_someone_has_changed_is_kept_beside_the_new_one(
    change: str, tmp_path: Path
) -> None:
    run_of(tmp_path, 1000)
    export(tmp_path)
    if change == "added":
        (tmp_path / "out" / "eval").mkdir()
        (tmp_path / "out" / "eval" / "knn.json").write_text("{}")
    elif change == "edited":
        (tmp_path / "out" / "README.md").write_text("my own words")
    else:
        (tmp_path / "out" / "config.json").unlink()
    before = {path.name for path in (tmp_path / "out").rglob("*")}
    run_of(tmp_path, 2000)
    kept = export(tmp_path).kept
    assert kept == tmp_path / "out.step-00001000"
    assert {path.name for path in kept.rglob("*")} == before
    assert (step_of(kept), step_of(tmp_path / "out")) == (1000, 2000)
    (tmp_path / "out" / "mine").touch()
    run_of(tmp_path, 3000)
    shutil.copytree(kept, tmp_path / "out.step-00002000")
    assert export(tmp_path).kept == tmp_path / "out.step-00002000.2"


def test_a_damaged_export_is_made_again(tmp_path: Path) -> None:
    run_of(tmp_path, 1000)
    export(tmp_path)
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert export(tmp_path).state == "replaced"
    assert export(tmp_path).state == "up to date"


def test_an_export_of_an_older_version_counts_as_ours(tmp_path: Path) -> None:
    run_of(tmp_path, 1000)
    export(tmp_path)
    report = tmp_path / "out" / "export_report.json"
    record = json.loads(report.read_text())
    old = {name: value for name, value in record.items() if name not in ("options", "files", "results")}
    report.write_text(json.dumps(old))
    done = export(tmp_path)
    assert (done.state, done.kept) == ("replaced", None)


def test_a_disk_that_takes_no_more_leaves_the_older_export_as_it_was(tmp_path: Path) -> None:
    run_of(tmp_path, 1000)
    export(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run_of(tmp_path, 2000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out: cannot be written: .*File too large.*; make room"):
            export(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run_of(tmp_path, 1000)
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        export_run(tmp_path / "run", [Target("timm", tmp_path / "locked" / "out")])


def test_a_place_below_a_file_is_named(tmp_path: Path) -> None:
    run_of(tmp_path, 1000)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out: cannot be written"):
        export_run(tmp_path / "run", [Target("timm", tmp_path / "file" / "out")])


def test_what_a_killed_export_left_is_swept_an_hour_later(tmp_path: Path) -> None:
    run_of(tmp_path, 1000)
    nobody = next(number for number in range(4_000_000, 5_000_000) if not Path(f"/proc/{number}").exists())
    fresh, old = tmp_path / f".out.{nobody}.tmp", tmp_path / f".out.{nobody}.old"
    running = tmp_path / f".out.{os.getppid()}.tmp"
    for folder in (fresh, old, running):
        folder.mkdir()
    for folder in (old, running):
        os.utime(folder, (0, 0))
    export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == sorted(
        (fresh.name, running.name)
    )
