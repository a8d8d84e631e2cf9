"""The script that brings the lists of targets to where Prometheus looks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "deploy" / "prometheus" / "gather_targets.sh"


def gather(runs: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(PROGRAM), str(runs), str(out), *more], capture_output=True, text=True, timeout=20
    )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    runs, out = tmp_path / "the runs", tmp_path / "out"
    runs.mkdir()
    out.mkdir()
    return runs, out


def sign_on(run: Path, port: int) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    path = run / "targets.json"
    path.write_text(json.dumps([{"targets": [f"127.0.0.1:{port}"], "labels": {"run": run.name}}]))
    path.chmod(0o600)
    return path


def gathered(out: Path) -> set[str]:
    """The runs in what Prometheus would read."""
    return {group["labels"]["run"] for path in out.glob("*.json") for group in json.loads(path.read_text())}


def test_runs_and_runs_in_folders_are_found_and_those_that_end_are_taken_away(
    folders: tuple[Path, Path],
) -> None:
    runs, out = folders
    first, second = sign_on(runs / "first", 1), sign_on(runs / "study" / "second", 2)
    sign_on(runs / "study" / "second" / "checkpoints" / "step-1", 3)  # is no run
    (runs / "ended").mkdir()
    assert gather(runs, out).returncode == 0
    assert gathered(out) == {"first", "second"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in out.glob("*.json"))  # Prometheus is another
    second.unlink()
    assert gather(runs, out).returncode == 0
    assert gathered(out) == {"first"}
    first.unlink()
    gather(runs, out)
    assert list(out.iterdir()) == []


def test_runs_of_one_name_do_not_take_each_other_s_place(folders: tuple[Path, Path]) -> None:
    runs, out = folders
    for study in ("a", "b"):
        sign_on(runs / study / "vitb", 1)
    gather(runs, out)
    assert len(list(out.glob("*.json"))) == 2


def test_a_list_that_has_not_changed_is_left_alone_and_one_that_has_is_replaced(
    folders: tuple[Path, Path],
) -> None:
    runs, out = folders
    path = sign_on(runs / "vitb", 1)
    gather(runs, out)
    (copy,) = out.glob("*.json")
    before = copy.stat().st_mtime_ns, copy.stat().st_ino
    gather(runs, out)
    assert (copy.stat().st_mtime_ns, copy.stat().st_ino) == before
    path.write_text(path.read_text().replace("127.0.0.1:1", "127.0.0.1:2"))
    gather(runs, out)
    assert "127.0.0.1:2" in copy.read_text()


def test_it_goes_on_looking_when_told_to(folders: tuple[Path, Path]) -> None:
    runs, out = folders
    looking = subprocess.Popen(["sh", str(PROGRAM), str(runs), str(out), "0.2"], start_new_session=True)
    try:
        sign_on(runs / "late", 1)
        deadline = time.monotonic() + 15
        while gathered(out) != {"late"} and time.monotonic() < deadline:
            time.sleep(0.1)
        assert gathered(out) == {"late"}
    finally:
        os.killpg(looking.pid, signal.SIGKILL)
        looking.wait()


def test_wrong_folders_are_told(folders: tuple[Path, Path]) -> None:
    runs, out = folders
    for ran in (gather(runs / "absent", out), gather(runs, out / "absent")):
        assert ran.returncode == 2
        assert "must be folders" in ran.stderr
    assert subprocess.run(["sh", str(PROGRAM)], capture_output=True, timeout=20).returncode == 2


def test_shellcheck_finds_nothing() -> None:
    try:
        ran = subprocess.run(["shellcheck", str(PROGRAM)], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("shellcheck is not on the PATH; Debian's package shellcheck has it")
    assert ran.returncode == 0, ran.stdout
