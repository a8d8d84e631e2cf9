from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_shards import make_shards

pytestmark = pytest.mark.slow  # a benchmark, from end to end
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "data.py"
CHOSEN = ("bare decode, 1 core", "bare loop, 1 core", "ours uint8, 1 core", "cifar resident", "ffcv")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    make_shards(folder / "large", [40, 30], height=80, width=96)
    make_shards(folder / "small", [40, 30], height=32, width=32)
    choice = [part for name in CHOSEN for part in ("--only", name)]
    ran = run(
        *(
            "--shards",
            str(folder / "large"),
            "--cifar",
            str(folder / "small"),
            "--out",
            str(folder / "out.json"),
        ),
        *("--rounds", "1", "--seconds", "0.2", *choice),
    )
    assert ran.returncode == 0, ran.stderr
    written: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return written


def test_the_result_says_what_was_measured_where_and_with_what(result: dict[str, Any]) -> None:
    assert {"command", "date", "machine", "versions", "rows"} <= result.keys()
    assert (result["images"], result["rounds"]) == (70, 1)
    assert {"torch", "simplejpeg"} <= result["versions"].keys()
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["cpu"]


def test_rates_follow_from_the_recorded_turns(result: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in result["rows"] if "problem" not in row}
    assert len(rows) == 4
    for row in rows.values():
        (turn,) = row["turns"]
        assert turn["wall_seconds"] >= 0.2
        rate = turn["images"] / turn["wall_seconds"]
        assert row["images_per_second"]["median"] == pytest.approx(rate, rel=0.01)
        assert turn["cpu_seconds"] < 1.5 * turn["wall_seconds"] + 0.2, "more than the one core it is kept to"
    ours, bare = (rows[name]["turns"][0] for name in ("ours uint8, 1 core", "bare loop, 1 core"))
    expected = ours["images"] / ours["wall_seconds"] / (bare["images"] / bare["wall_seconds"])
    assert rows["ours uint8, 1 core"]["times_bare_by_wall"]["median"] == pytest.approx(expected, rel=0.01)


def test_the_loader_delivers_two_uint8_views_of_each_size(result: dict[str, Any]) -> None:
    batches = {row["name"]: row.get("batch") for row in result["rows"]}
    assert batches["ours uint8, 1 core"] == "uint8 (2, 64, 224, 224, 3)"
    assert batches["cifar resident, 1 core"] == "uint8 (2, 64, 32, 32, 3)"


def test_a_peer_that_is_absent_is_named_with_the_command_to_install_it(result: dict[str, Any]) -> None:
    ffcv = next(row for row in result["rows"] if row["name"] == "ffcv-uint8")
    if "problem" not in ffcv:
        pytest.skip("ffcv is installed here")
    assert ffcv["problem"] == "not installed (pip install ffcv)"


def test_shards_without_an_index_end_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    ran = run("--shards", str(tmp_path))
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "--shards" in ran.stderr
    assert "pretrain shards index" in ran.stderr
