"""The doctor leaves alone what is well: finished, under way, preempted, short, copied from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from answers import Answer
from fault_runs import fault
from fault_runs import start as start_ranks
from outcomes import records
from test_faults import Runs

from pretrain import cli

Ask = Callable[..., Answer]


def test_a_finished_run_is_healthy(whole: Path, ask: Ask) -> None:
    answer = ask(whole)
    assert answer.verdict == "healthy: finished, step 40 of 40"
    assert (answer.code, answer.findings, answer.whole["healthy"]) == (0, [], True)


def test_a_run_under_way_is_healthy_and_tells_how_far_it_is(runs: Runs, ask: Ask) -> None:
    started = runs.start("run", fault("pace", seconds=0.02), settings=["schedule.steps=100000"])
    run = runs.folder / "run"
    started.wait_for(lambda: (run / "attempts").is_dir() and any((run / "attempts").glob("*.beat")))
    early = ask(run)
    assert early.verdict.startswith("running, healthy: step ")
    assert "too early to tell" in early.verdict
    started.wait_for(lambda: len(records(run)) > 30)
    answer = ask(run)
    started.processes[0].kill()
    started.wait()
    assert answer.verdict.startswith("running, healthy: step ")
    assert " of 100000, " in answer.verdict
    assert " images/s, " in answer.verdict
    assert "too early" not in answer.verdict
    assert (answer.code, answer.findings) == (0, [])


def test_a_preempted_run_is_no_failure_and_its_command_to_go_on_works(runs: Runs, ask: Ask) -> None:
    runs.start("run", fault("send_signals", step=6, names=("TERM",))).ends(75)
    run = runs.folder / "run"
    answer = ask(run)
    assert answer.verdict.startswith("healthy: stopped on request, saved and resumable at step 7 of 12")
    assert (answer.code, answer.causes) == (0, {"preempted": "note"})
    [said] = answer.findings
    command = said["command"].split()
    assert command[:2] == ["pretrain", "train"]
    started = start_ranks(command[1:], runs.folder).ends(0)
    assert "resumed from" in started.output()
    again = ask(run)
    assert again.verdict.startswith("healthy: finished, step 12 of 12")
    assert again.causes == {"restarts": "note"}


def test_it_needs_no_torch_and_answers_at_once(whole: Path) -> None:
    code = f"import sys; from pretrain import cli; c = cli.main(['doctor', {str(whole)!r}]); "
    code += "sys.exit(99 if 'torch' in sys.modules else c)"
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "healthy: finished, step 40 of 40"
    assert time.monotonic() - begin < 10, "it takes less than one second on an idle machine"


def test_a_copy_on_another_machine_says_the_same_and_nothing_is_written(
    whole: Path, ask: Ask, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    path = copy / "attempts" / "0001.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "owner": {**record["owner"], "host": "elsewhere", "boot_id": "x"}}))
    before = sorted((str(file), file.stat().st_mtime_ns) for file in copy.rglob("*"))
    assert ask(copy).verdict == ask(whole).verdict
    assert sorted((str(file), file.stat().st_mtime_ns) for file in copy.rglob("*")) == before


@pytest.mark.parametrize("beat_age", [5, 7200])
def test_a_run_on_another_machine_lives_while_its_beat_is_fresh(
    beat_age: int, whole: Path, ask: Ask, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    path = copy / "attempts" / "0001.json"
    record = json.loads(path.read_text())
    elsewhere = {**record["owner"], "host": "node7", "boot_id": "x"}
    path.write_text(json.dumps({**record, "owner": elsewhere, "outcome": None, "step": None}))
    now = time.time()
    os.utime(copy / "attempts" / "0001.beat", (now - beat_age, now - beat_age))
    answer = ask(copy)
    if beat_age < 60:
        assert answer.verdict.startswith("running, healthy: step 40 of 40")
    else:
        assert answer.verdict == "not running: no sign of life (step 40 of 40)"
        assert "node7" in answer.of("no sign of life")
        assert "2.0 h" in answer.of("no sign of life")


@pytest.mark.parametrize(
    "missing", ["config.yaml", "train.log", "metrics.jsonl", "attempts", "checkpoints", "environment.json"]
)
def test_a_folder_without_one_of_its_parts_is_still_read(
    missing: str, whole: Path, ask: Ask, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    if (copy / missing).is_dir():
        shutil.rmtree(copy / missing)
    else:
        (copy / missing).unlink()
    answer = ask(copy)
    if missing == "checkpoints":
        assert answer.causes["checkpoints gone"] == "error"
    else:
        assert answer.code == 0
        assert "healthy" in answer.verdict


def test_garbage_in_any_file_is_told_and_stops_nothing(whole: Path, ask: Ask, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for name in ("config.yaml", "train.log", "metrics.jsonl", "attempts/0001.json", "rollbacks.json"):
        (copy / name).write_bytes(b"\x00\xff{[not: anything\n\nat all\n")
    (copy / "anomalies.jsonl").write_text('{"kind": "collapse"}\n[1, 2]\n{"kind": 3, "step": "x"}\n{"ki')
    (copy / "quarantine.jsonl").write_text('{"sample_id": null}\nnull\n')
    answer = ask(copy)
    assert "metrics.jsonl: 2 of 2 lines are no JSON" in answer.of("damaged records")
    assert "attempts/0001.json: is damaged" in answer.of("damaged records")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("absent", "is not there; give the folder of a run"),
        ("file", "is a file; give the folder of the run that it belongs to"),
        ("parent", "is no run folder: it holds 1 run, such as "),
        ("empty", "is no run folder: it has none of metrics.jsonl, train.log and attempts/"),
    ],
)
def test_what_is_no_run_folder_is_told_in_one_line(
    name: str, told: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    path = whole.parent if name == "parent" else tmp_path / name
    assert cli.main(["doctor", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pretrain: {path}: {told}")


def test_the_page_on_troubleshooting_names_findings_as_they_are_named() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "troubleshooting.md").read_text()
    table = page.partition("## By symptom")[2].partition("## Is my loss")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    source = "".join(path.read_text() for path in (root / "pretrain" / "doctor").glob("*.py"))
    assert len(named) > 25
    assert sorted(name for name in named if f'"{name}"' not in source) == []
