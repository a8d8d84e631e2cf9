"""A sweep of real runs: killed in the middle, continued, with a variant that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_shards import index_folder, make_shards, samples, write_shard
from small_study import write_study

STUDY = """\
base: run.yaml
overrides: [log.every_steps=1, checkpoint.every_steps=4, schedule.steps=16]
seeds: [0, 1]
variants:
  both: [tasks.jigsaw=null]
  rotation: [tasks.contrastive=null, tasks.jigsaw=null]
  broken: [tasks.jigsaw=null, data.split=absent]
evaluate:
  - {name: knn, kind: knn, train: shards, test: "others:test", args: [--batch-size, 16]}
metrics: [rotation/accuracy, contrastive/accuracy]
"""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", "sweep", "study.yaml", "--output-dir", "out", *arguments],
        cwd=folder,
        env={**variables, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    told, _ = process.communicate(timeout=1500)
    return process.returncode, told


def is_running(process: psutil.Process) -> bool:
    """Not ended, and not one that has ended while nobody asked how."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_that_is_killed_goes_on_and_its_table_is_that_of_the_runs(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", [32, 32])
    (tmp_path / "others").mkdir()
    write_shard(tmp_path / "others" / "test-0.tar", samples(1000, 20))
    index_folder(tmp_path / "others")
    write_study(tmp_path, STUDY)
    first = tmp_path / "out" / "both" / "seed-0"

    process = start(tmp_path)
    deadline = time.monotonic() + 300
    while not list(first.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert children
    deadline = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))  # nobody goes on writing into the run
    assert not (first / "done.json").exists()

    code, told = finish(start(tmp_path))
    assert code == 1, told
    assert "failed: broken/seed-0, broken/seed-1" in told
    assert "resumed from" in (first / "sweep.log").read_text()
    failure = json.loads((tmp_path / "out" / "broken" / "seed-1" / "failed.json").read_text())
    assert (failure["stage"], failure["exit_code"]) == ("train", 2)
    assert "no split 'absent'" in failure["last_lines"][-1]

    rows = {}
    for line in (tmp_path / "out" / "table.md").read_text().splitlines():
        if line.startswith("| ") and "---" not in line:
            name, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
            rows[name] = cells
    assert rows["broken"][0] == "0 of 2 (failed)"
    for variant in ("both", "rotation"):
        runs = [tmp_path / "out" / variant / f"seed-{seed}" for seed in (0, 1)]
        top1 = [
            100 * json.loads((run / "read_outs" / "knn" / "eval" / "knn.json").read_text())["top1_ratio"]
            for run in runs
        ]
        last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
        assert [record["step"] for record in last] == [16, 16]
        accuracies = [record["rotation/accuracy"] for record in last]
        assert rows[variant][0:2] == ["2 of 2", "16"]
        assert rows[variant][3] == f"{statistics.fmean(top1):.2f} ± {statistics.stdev(top1):.2f}"
        assert rows[variant][4] == f"{sum(accuracies) / 2:.4g} ± {statistics.stdev(accuracies):.2g}"
        assert (rows[variant][5] != "–") == (variant == "both")  # noqa: RUF001
        for run in runs:
            found = json.loads((run / "done.json").read_text())
            assert found["config"]["seed"] == found["seed"]
            assert re.fullmatch(r"\d+ CPU cores \(\w+\)|\d+ x .+", found["hardware"])
            assert (run / "exported" / "config.json").exists()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/done.json")}
    assert len(before) == 4
    assert finish(start(tmp_path))[0] == 1  # tries the broken ones again, and leaves the others alone
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/done.json")} == before
