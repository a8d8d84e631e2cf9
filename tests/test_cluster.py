from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from pretrain.cluster import Cluster, detect, launch_local
from pretrain.errors import UserError

ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "x",
    **ADDRESS,
}
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **ADDRESS}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", **ADDRESS}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Cluster(0, 1, 0, 1, "single process")),
        (TORCHRUN, Cluster(5, 8, 1, 4, "torchrun")),
        (DEEPSPEED, Cluster(1, 4, 1, 4, "environment")),
        (DEEPSPEED | {"LOCAL_SIZE": "2"}, Cluster(1, 4, 1, 2, "environment")),
        (SRUN, Cluster(5, 8, 1, 4, "srun")),
        (SRUN | TORCHRUN, Cluster(5, 8, 1, 4, "torchrun")),  # torchrun inside an allocation
        (DEEPSPEED | {"PRETRAIN_LAUNCHER": "--nproc"}, Cluster(1, 4, 1, 4, "--nproc")),
        # an allocation of which this process is the only task, or no task
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Cluster()),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, Cluster()),
        # alone, a rank needs no address
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Cluster(0, 1, 0, 1, "environment")),
    ],
)
def test_the_layout_is_read_from_what_the_launcher_announced(
    variables: dict[str, str], expected: Cluster
) -> None:
    found = detect(variables)
    assert found == expected
    assert found.num_nodes * found.local_world_size == found.world_size
    assert found.is_first == (found.rank == 0)


def without(variables: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        *(
            (without(TORCHRUN, name), name)
            for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        ),
        *((without(SRUN, name), name) for name in ("SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")),
        (without(DEEPSPEED, "RANK"), "RANK"),  # each rank would train a run of its own
        *(
            (TORCHRUN | {name: "two"}, name)
            for name in TORCHRUN
            if name not in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR")
        ),
        *((SRUN | {name: "two"}, name) for name in SRUN if name.startswith("SLURM_")),
        *((TORCHRUN | {"RANK": rank}, "RANK") for rank in ("8", "-1")),
        *((TORCHRUN | {"LOCAL_RANK": rank}, "LOCAL_RANK") for rank in ("4", "-1")),
        *((TORCHRUN | {"LOCAL_WORLD_SIZE": size}, "LOCAL_WORLD_SIZE") for size in ("3", "0", "16", "-4")),
        (DEEPSPEED | {"LOCAL_SIZE": "3"}, "LOCAL_SIZE"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID"),
        (SRUN | {"SLURM_LOCALID": "4"}, "SLURM_LOCALID"),
        (SRUN | {"SLURM_NNODES": "3"}, "SLURM_NNODES"),
        (SRUN | {"SLURM_NNODES": "0"}, "SLURM_NNODES"),
    ],
)
def test_a_variable_that_cannot_be_is_named(variables: dict[str, str], name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: ") as caught:
        detect(variables)
    assert "\n" not in str(caught.value)


PRELUDE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.02)
    time.sleep(0.1)
"""


def rank_command(body: str) -> list[str]:
    return [sys.executable, "-S", "-c", PRELUDE + body]


def test_ranks_that_all_succeed_give_zero_and_each_knows_its_place(tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    body = (
        f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}) + ' ' "
        "+ str('OMP_NUM_THREADS' in os.environ))"
    )
    assert launch_local(rank_command(body), 3) == 0
    written = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [row[:5] for row in written] == [
        [str(rank), "3", str(rank), "3", "127.0.0.1"] for rank in range(3)
    ]
    assert len({row[5] for row in written}) == 1
    assert all(row[6] == "True" for row in written)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        ("sys.exit(2)", 2),
        ("sys.exit(1)", 1),
        ("sys.exit(75)", 75),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139),
    ],
)
def test_when_a_rank_fails_the_others_are_stopped_and_its_code_is_returned(
    failure: str, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ready = str(tmp_path / "pid")
    body = (
        f"rank == 0 and (open({ready!r}, 'w').write(str(os.getpid())), time.sleep(100)); "
        f"wait_for({ready!r}); {failure}"
    )
    started = time.monotonic()
    assert launch_local(rank_command(body), 2) == code
    assert time.monotonic() - started < 8
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert ("killed by signal" in capfd.readouterr().err) == (code > 128)


def test_a_rank_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pretrain.cluster.STOP_SECONDS", 0.5)
    ready = str(tmp_path / "pid")
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"rank == 0 and (open({ready!r}, 'w').write(str(os.getpid())), time.sleep(100)); "
        f"wait_for({ready!r}); sys.exit(1)"
    )
    started = time.monotonic()
    assert launch_local(rank_command(body), 2) == 1
    assert time.monotonic() - started < 8
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_the_rank_that_knows_the_cause_wins_over_one_that_only_lost_its_peer(tmp_path: Path) -> None:
    ready = str(tmp_path / "ready")
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(2)); "
        f"rank == 0 and (open({ready!r}, 'w').close(), time.sleep(100)); "
        f"wait_for({ready!r}); sys.exit(1)"
    )
    assert launch_local(rank_command(body), 2) == 2
