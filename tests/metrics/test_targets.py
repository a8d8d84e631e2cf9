from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.metrics.targets import Target, remove_targets, target_files, write_targets


@pytest.mark.parametrize(
    ("address", "reached_at"),
    [
        ("127.0.0.1", "127.0.0.1:9480"),
        ("0.0.0.0", "node7:9480"),
        ("::", "node7:9480"),
        ("", "node7:9480"),
        ("10.1.2.3", "10.1.2.3:9480"),
        ("fd00::7", "[fd00::7]:9480"),
        ("node7.cluster", "node7.cluster:9480"),
    ],
)
def test_a_rank_is_reached_where_it_listens(address: str, reached_at: str) -> None:
    assert Target(0, "node7", address, 9480).reached_at == reached_at


def test_the_file_is_what_prometheus_discovers_targets_from(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    targets = [Target(rank, f"node{rank // 2}", "0.0.0.0", 9480 + rank % 2) for rank in range(4)]
    assert write_targets(path, "big", targets) == path.read_text()
    groups = json.loads(path.read_text())
    assert [group["targets"] for group in groups] == [
        ["node0:9480"],
        ["node0:9481"],
        ["node1:9480"],
        ["node1:9481"],
    ]
    assert groups[3]["labels"] == {"run": "big", "rank": "3", "node": "node1"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_start_takes_away_its_own_list_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    old = write_targets(path, "run", [Target(0, "a", "0.0.0.0", 9480)])
    new = write_targets(path, "run", [Target(0, "b", "0.0.0.0", 9480)])
    assert old is not None
    assert new is not None
    remove_targets(path, old)
    assert path.read_text() == new
    remove_targets(path, new)
    assert not path.exists()
    remove_targets(path, new)  # twice is fine


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert write_targets(tmp_path / "file" / "targets.json", "run", []) is None


def test_a_folder_for_many_runs_tells_runs_of_one_name_apart(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        own, shared = target_files(tmp_path / parent / "demo", tmp_path / "all" / "runs")
        assert own == tmp_path / parent / "demo" / "targets.json"
        assert write_targets(shared, "demo", [Target(0, "node", "0.0.0.0", 9480)])
    assert len(list((tmp_path / "all" / "runs").glob("demo-*.json"))) == 2
    assert target_files(tmp_path, None) == [tmp_path / "targets.json"]
