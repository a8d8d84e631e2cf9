"""Where a process stands, how ranks meet or miss each other, what Slurm is asked, ranks on one machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from pretrain import cluster
from pretrain.cluster import (
    Cluster,
    ClusterConfig,
    SlurmJob,
    connected,
    detect,
    difference,
    job_seconds_left,
    launch_local,
    master,
    meet,
    ranges,
    requeue,
    seconds_of,
    slurm_job,
    versions,
)
from pretrain.errors import TrainingError, UserError

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
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0",
    **ADDRESS,
}
# what the shell of a batch script has, seen with Slurm 22.05
BATCH = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
IN_A_SHELL = Cluster(launcher="single process, not started by srun")


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
        # the shell of a batch script is no rank 0 of 8: it would wait for seven others for ever
        (BATCH, IN_A_SHELL),
        (BATCH | {"SLURM_STEP_ID": "batch"}, IN_A_SHELL),
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, IN_A_SHELL),  # Slurm's number of the batch script
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, IN_A_SHELL),  # and of an interactive shell
        # submitted from within a step of another job, it inherits that step's variables
        (BATCH | {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "1"}, IN_A_SHELL),
        (BATCH | SRUN | {"SLURM_STEP_NUM_TASKS": "8"}, Cluster(5, 8, 1, 4, "srun")),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,4"}, Cluster(5, 8, 1, 4, "srun")),
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
        *((SRUN | {name: "two"}, name) for name in SRUN if name.startswith("SLURM_") and "STEP" not in name),
        *((TORCHRUN | {"RANK": rank}, "RANK") for rank in ("8", "-1")),
        *((TORCHRUN | {"LOCAL_RANK": rank}, "LOCAL_RANK") for rank in ("4", "-1")),
        *((TORCHRUN | {"LOCAL_WORLD_SIZE": size}, "LOCAL_WORLD_SIZE") for size in ("3", "0", "16", "-4")),
        (DEEPSPEED | {"LOCAL_SIZE": "3"}, "LOCAL_SIZE"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID"),
        (SRUN | {"SLURM_LOCALID": "4"}, "SLURM_LOCALID"),
        (SRUN | {"SLURM_NNODES": "3"}, "SLURM_NNODES"),
        (SRUN | {"SLURM_NNODES": "0"}, "SLURM_NNODES"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "2(x2),1"}, "SLURM_TASKS_PER_NODE"),
        (
            SRUN | {"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_TASKS_PER_NODE": "5,3"},
            "SLURM_STEP_TASKS_PER_NODE",
        ),
        (SRUN | {"SLURM_TASKS_PER_NODE": "4x2"}, "SLURM_TASKS_PER_NODE"),
        (
            SRUN | {"SLURM_NNODES": "3", "SLURM_NTASKS": "9", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1"},
            "SLURM_STEP",
        ),
        *((TORCHRUN | {"MASTER_PORT": port}, "MASTER_PORT") for port in ("0", "65536", "-1")),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
    ],
)
def test_a_variable_that_cannot_be_is_named(variables: dict[str, str], name: str) -> None:
    """Fault 41, variables that are missing or contradict each other."""
    with pytest.raises(UserError, match=rf"^{name}[A-Z_]*: ") as caught:
        detect(variables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-2]", "node1"),
        ("node[08,10-12],other3", "node08"),
        ("rack[2-4,7]n[01-16],login", "rack2n01"),
        ("a[3]b", "a3b"),
    ],
)
def test_under_srun_the_first_node_is_where_ranks_meet(nodes: str, first: str) -> None:
    """As `scontrol show hostnames` expands it; a list of the step wins over that of the job."""
    variables = without(without(SRUN, "MASTER_ADDR"), "MASTER_PORT") | {"SLURM_JOB_ID": "12"}
    assert master(variables | {"SLURM_JOB_NODELIST": nodes})[0] == first
    in_step = {"SLURM_JOB_NODELIST": "x[1-9]", "SLURM_STEP_NODELIST": nodes}
    assert master(variables | in_step)[0] == first
    assert detect(variables | in_step) == Cluster(5, 8, 1, 4, "srun")


def test_steps_and_jobs_that_share_a_node_get_ports_of_their_own() -> None:
    variables = without(SRUN, "MASTER_PORT")
    ports = [
        master(variables | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})[1]
        for job in range(5000, 5300)
        for step in range(3)
    ]
    assert len(set(ports)) == len(ports)
    assert all(15000 <= port < 30000 for port in ports)
    assert master(SRUN | {"SLURM_JOB_ID": "5000"}) == ("10.0.0.1", 29500)  # what is announced wins


# --- Slurm


def test_the_job_is_read_with_its_restarts() -> None:
    assert slurm_job({}) is None
    variables = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[1-2]"}
    assert slurm_job(variables) == SlurmJob("123", 0, "node[1-2]")
    assert slurm_job(variables | {"SLURM_RESTART_COUNT": "2"}) == SlurmJob("123", 2, "node[1-2]")
    assert SlurmJob("123").name == "slurm 123"
    with pytest.raises(UserError, match=r"^SLURM_RESTART_COUNT: 'x'"):
        slurm_job(variables | {"SLURM_RESTART_COUNT": "x"})


def test_a_task_of_an_array_is_not_the_whole_array() -> None:
    """The last task of array 120 has job id 120, and `scontrol requeue 120` would restart all of them."""
    array = {"SLURM_JOB_ID": "120", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"}
    job = slurm_job(array)
    assert job is not None
    assert job.name == "slurm 120_4"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04\n", 93784),
        ("2:03:04", 7384),
        ("3:04", 184),
        ("0:00", 0),
        ("4", 4),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("NOT_SET", None),
        ("", None),
        ("3:04\n3:05", None),
        ("1:2:3:4", None),
    ],
)
def test_what_is_left_of_a_job_is_read_as_slurm_writes_it(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a program with a shell body on the PATH; returns the file where its calls are noted."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cluster.slurm, "_REQUEUED", {})

    def put(name: str, body: str) -> Path:
        program, calls = tmp_path / "bin" / name, tmp_path / f"{name}.calls"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{body}\n')
        program.chmod(0o755)
        return calls

    return put


def test_a_job_is_requeued_once_however_often_it_is_asked(slurm: Callable[[str, str], Path]) -> None:
    """Fault 10: a second request would end the run that the first one started."""
    calls = slurm("scontrol", "exit 0")
    assert [requeue(SlurmJob("120_4")) for _ in range(3)] == [None, None, None]
    assert calls.read_text() == "requeue 120_4\n"
    assert requeue(SlurmJob("7; touch x")) is None  # one argument, and no shell
    assert calls.read_text() == "requeue 120_4\nrequeue 7; touch x\n"


def test_why_slurm_did_not_requeue_is_told(
    slurm: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = slurm("scontrol", "echo 'Requested operation\nnot supported' >&2; exit 1")
    told = "scontrol requeue 5: Requested operation not supported"
    assert [requeue(SlurmJob("5")) for _ in range(2)] == [told, told]
    assert calls.read_text() == "requeue 5\n"
    slurm("scontrol", "exit 3")
    assert requeue(SlurmJob("6")) == "scontrol requeue 6: exit code 3"
    monkeypatch.setattr(cluster.slurm, "SLURM_SECONDS", 0.2)
    slurm("scontrol", "exec /bin/sleep 20")
    assert requeue(SlurmJob("7")) == "scontrol requeue 7: no answer in 0 s"
    monkeypatch.setenv("PATH", "")
    assert requeue(SlurmJob("8")) == "scontrol: not found; in a container, mount Slurm's commands"


def test_slurm_is_asked_for_the_end_of_the_job(
    slurm: Callable[[str, str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    calls = slurm("squeue", "echo 1:30")
    assert job_seconds_left(SlurmJob("12_3")) == 90
    assert calls.read_text() == "-h -j 12_3 -o %L\n"
    slurm("squeue", "echo UNLIMITED")
    assert job_seconds_left(SlurmJob("12")) is None
    slurm("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    cluster.meeting.logger.addHandler(caplog.handler)  # the command line keeps it from the root logger
    assert job_seconds_left(SlurmJob("12")) is None
    cluster.meeting.logger.removeHandler(caplog.handler)
    assert "slurm 12: the end of the job is not known: squeue -h -j 12 -o %L: slurm_load_jobs" in caplog.text


# --- meeting: here ranks are threads


class Ranks:
    """Ranks that meet, each in a thread."""

    def __init__(self, world_size: int, host: str = "127.0.0.1", seconds: float = 30.0) -> None:
        self.world_size, self.host, self.seconds = world_size, host, seconds
        self.port = cluster.free_port()
        self.found: dict[int, Any] = {}  # the store or the error of each rank
        self.threads: list[threading.Thread] = []

    def start(self, *ranks: int, world_size: int | None = None) -> None:
        for rank in ranks:
            place = Cluster(rank, world_size or self.world_size, 0, 1)
            self.threads.append(threading.Thread(target=self._meet, args=(place,)))
            self.threads[-1].start()

    def _meet(self, place: Cluster) -> None:
        try:
            found: Any = meet(place, self.host, self.port, self.seconds, timedelta(seconds=10))
        except Exception as error:
            found = error
        self.found[place.rank] = found

    def join(self) -> dict[int, Any]:
        for thread in self.threads:
            thread.join(40)
            assert not thread.is_alive()
        return self.found


def test_ranks_meet_in_any_order_and_share_a_store() -> None:
    ranks = Ranks(4)
    ranks.start(2, 1)
    time.sleep(0.2)
    ranks.start(0, 3)
    stores = ranks.join()
    assert sorted(stores) == [0, 1, 2, 3]
    stores[3].set("said", "by rank 3")
    assert [stores[rank].get("said") for rank in range(4)] == [b"by rank 3"] * 4


def test_an_absent_rank_is_named_on_all_that_are_there() -> None:
    """Fault 41, one node absent: bounded, not the user's wrong input, and a restart may find it."""
    ranks = Ranks(5, seconds=1.0)
    started = time.monotonic()
    ranks.start(0, 1, 3)
    found = ranks.join()
    assert time.monotonic() - started < 5
    here = socket.gethostname()
    for error in found.values():
        assert type(error) is TrainingError
        assert str(error).startswith(f"absent after 1 s: rank 2, 4 of 5 (here: 0-1, 3 on {here}); check")
        assert f"MASTER_ADDR:MASTER_PORT 127.0.0.1:{ranks.port} " in str(error)


def test_while_a_rank_is_awaited_rank_0_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster.meeting, "STILL_WAITING_SECONDS", 0.1)
    cluster.meeting.logger.addHandler(caplog.handler)
    ranks = Ranks(2)
    ranks.start(0)
    time.sleep(0.3)
    ranks.start(1)
    ranks.join()
    cluster.meeting.logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records]
    assert told
    assert all(line.startswith("absent after 0 s: rank 1 of 2 (here: 0 on ") for line in told)


def test_without_rank_0_the_others_end_and_say_where_they_looked() -> None:
    """Fault 41, the first node absent."""
    ranks = Ranks(3, seconds=0.5)
    ranks.start(1, 2)
    for rank, error in ranks.join().items():
        assert type(error) is TrainingError
        assert str(error).startswith(
            f"rank {rank} on {socket.gethostname()} did not find rank 0 at MASTER_ADDR"
        )
        assert f"127.0.0.1:{ranks.port} in 0 s (Connection refused)" in str(error)


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"5\n", b"\xff\n"])
def test_a_taken_port_is_named_by_rank_0_and_the_others_end(answer: bytes | None) -> None:
    """Fault 41, port taken, by a program that answers nothing or something else."""
    ranks = Ranks(2, seconds=1.0)
    with socket.create_server(("127.0.0.1", ranks.port)) as other:
        if answer:
            other.settimeout(0.2)

            def serve() -> None:
                until = time.monotonic() + 2
                while time.monotonic() < until:
                    try:
                        connection, _ = other.accept()
                    except TimeoutError:
                        continue
                    connection.sendall(answer)
                    connection.close()

            ranks.threads.append(threading.Thread(target=serve))
            ranks.threads[-1].start()
        started = time.monotonic()
        ranks.start(0, 1)
        found = ranks.join()
    assert time.monotonic() - started < 6
    assert type(found[0]) is UserError
    assert str(found[0]) == (
        f"MASTER_PORT: {ranks.port} is taken on {socket.gethostname()}, the host of rank 0; choose another"
    )
    assert type(found[1]) is TrainingError
    assert "did not find rank 0" in str(found[1])


def test_an_unknown_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 41, MASTER_ADDR that does not resolve, on rank 0 and on another."""
    monkeypatch.setattr(cluster.meeting, "STILL_WAITING_SECONDS", 0.5)

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    ranks = Ranks(2, "nodeX", seconds=1.0)
    ranks.start(0, 1)
    for error in ranks.join().values():
        assert type(error) is UserError
        assert str(error).startswith(f"MASTER_ADDR: 'nodeX' is not known on {socket.gethostname()} (Name or")


def test_a_rank_0_that_is_not_at_its_address_says_so() -> None:
    ranks = Ranks(2, "192.0.2.1", seconds=0.3)  # an address of nobody (RFC 5737)
    ranks.start(0)
    assert f"which is no address of {socket.gethostname()}, where rank 0 is" in str(ranks.join()[0])


def test_two_processes_with_one_rank_end_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    welcomed = threading.Event()
    tell = cluster.meeting._tell

    def noted(connection: socket.socket, message: dict[str, Any]) -> None:
        tell(connection, message)
        if "welcome" in message:
            welcomed.set()

    monkeypatch.setattr(cluster.meeting, "_tell", noted)
    ranks = Ranks(4)
    ranks.start(0, 2)
    assert welcomed.wait(20)  # rank 2 is there before the two that quarrel
    hello = {"rank": 1, "world_size": 4, "host": "here", "process": 1, "run": cluster.meeting._run_token()}
    with say_hello(ranks.port, hello) as first, say_hello(ranks.port, hello | {"host": "there"}) as second:
        told = [everything_from(connection).splitlines()[-1] for connection in (first, second)]
    for error in (ranks.join()[0], ranks.join()[2]):
        assert type(error) is UserError
        assert str(error) == "RANK: 1 is claimed by two processes, on here and there; check the launcher"
    assert [json.loads(line) for line in told] == [{"stop": str(error), "wrong_input": True}] * 2


def everything_from(connection: socket.socket) -> bytes:
    try:
        with connection.makefile("rb") as answers:
            return answers.read()
    except ConnectionResetError:  # it was closed before all that was sent had been read
        return b""


def say_hello(port: int, hello: object) -> socket.socket:
    for _ in range(100):
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            time.sleep(0.05)
            continue
        connection.sendall((hello if isinstance(hello, str) else json.dumps(hello)).encode() + b"\n")
        return connection
    raise AssertionError("nobody listens")


def test_strangers_and_ranks_of_other_runs_are_turned_away_and_the_run_starts() -> None:
    ranks = Ranks(3)
    ranks.start(0)
    hello = {"rank": 1, "world_size": 3, "host": "there", "process": 1, "run": cluster.meeting._run_token()}
    for stranger in ("GET / HTTP/1.1", "5", json.dumps({"rank": "one"}), "x" * 5000):
        with say_hello(ranks.port, stranger) as connection:
            assert everything_from(connection) == b""
    with say_hello(ranks.port, hello | {"run": "9/0/0/"}) as connection:
        answer = json.loads(everything_from(connection))
        assert f"MASTER_PORT: {ranks.port}" in answer["stop"]
        assert "belongs to another run" in answer["stop"]
    with say_hello(ranks.port, hello) as connection:  # a rank that is there, and goes away again
        assert json.loads(connection.recv(100)) == {"welcome": True}
    time.sleep(0.1)
    assert ranks.found == {}
    ranks.start(2)
    time.sleep(0.3)
    assert ranks.found == {}  # the rank that went away is not counted
    ranks.start(1)
    stores = ranks.join()
    stores[0].set("x", "1")
    assert stores[1].get("x") == b"1"


WAITING = """
import signal, sys
from datetime import timedelta
from pretrain.cluster import Cluster
from pretrain.cluster.meeting import meet
from pretrain.errors import TrainingError
from pretrain.preempt import PreemptConfig, Preemption
preemption = Preemption(PreemptConfig())
preemption.install()
try:
    print("waits", flush=True)
    meet(Cluster(int(sys.argv[1]), 2, 0, 1), "127.0.0.1", int(sys.argv[2]), 60, timedelta(seconds=9))
except TrainingError as error:
    print(error, preemption.asked)
    signal.raise_signal(signal.SIGTERM)
    print(preemption.asked)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_others_ends_at_once_when_it_is_asked_to(rank: int) -> None:
    """Afterwards SIGTERM is again what it was before: noted, until the step has ended."""
    command = [sys.executable, "-c", WAITING, str(rank), str(cluster.free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        time.sleep(0.3)
        process.terminate()
        told, _ = process.communicate(timeout=20)
    assert "while it waited for the other ranks None\n" in told
    assert told.endswith("\nsignal TERM\n")


def test_a_rank_that_counts_other_ranks_is_told_both_numbers() -> None:
    ranks = Ranks(2, seconds=2.0)
    ranks.start(0)
    ranks.start(1, world_size=4)
    found = ranks.join()
    here = socket.gethostname()
    assert type(found[1]) is UserError
    assert str(found[1]).startswith(f"WORLD_SIZE: 2 on rank 0 ({here}), 4 on rank 1 ({here})")
    assert type(found[0]) is TrainingError


# --- connected


def test_a_single_rank_connects_again_and_again_and_leaves_the_variables_as_they_were() -> None:
    before = dict(os.environ)
    for _ in range(2):
        with connected(Cluster()):
            value = torch.tensor([3.0])
            dist.all_reduce(value)
            assert value.item() == 3.0
            assert os.environ["WORLD_SIZE"] == "1"
            cluster.agree({"torch": "any"})
        assert not dist.is_initialized()
        assert dict(os.environ) == before


def meet_twice(local_rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    place = Cluster(local_rank, 2, local_rank, 2, "test")
    with connected(place):
        cluster.agree(versions() | {"config": "abc"})
        for facts in ({"torch": f"2.{place.rank}"}, {"torch": "2.0"} if place.is_first else {}):
            with pytest.raises(UserError) as caught:
                cluster.agree({"config": "abc", **facts})
            assert str(caught.value).startswith("torch: differs between ranks: 2.0 on rank 0 on ")
    with connected(place, ClusterConfig(timeout_seconds=30)):
        value = torch.tensor([float(place.rank)])
        dist.all_reduce(value)
        assert value.item() == 1.0


@pytest.mark.distributed
def test_two_ranks_agree_or_end_together_and_can_meet_again_at_the_same_port() -> None:
    """Fault 42."""
    torch.multiprocessing.spawn(meet_twice, (cluster.free_port(),), nprocs=2)


def test_the_key_the_values_and_the_ranks_that_differ_are_named() -> None:
    """Fault 42, worked by hand."""
    hosts = ["node1", "node1", "node2", "node2"]
    same = {"torch": "2.14.1", "timm": "1.0"}
    assert difference(hosts, [same] * 4) is None
    facts = [same, same, same | {"torch": "2.13.0"}, same]
    assert difference(hosts, facts) == (
        "torch: differs between ranks: 2.14.1 on rank 0-1 on node1, 3 on node2; 2.13.0 on rank 2 on node2; "
        "give every rank the same software, configuration and data"
    )
    told = difference(hosts, [same, {"timm": "1.1"}, same, same])
    assert told is not None
    assert "nothing on rank 1 on node1 (so do timm);" in told


def test_versions_name_what_runs() -> None:
    found = versions()
    assert list(found) == ["python", "torch", "pretrain", "deepspeed", "timm"]
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])


def test_ranks_are_written_as_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges({0, 1, 2, 5, 7, 8}) == "0-2, 5, 7-8"


@pytest.mark.parametrize("wrong", [{"timeout_seconds": 0}, {"rendezvous_seconds": -1}, {"port": 1}])
def test_wrong_waits_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        ClusterConfig(**wrong)


# --- several ranks on this machine


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
    ("failure", "code", "told"),
    [
        ("sys.exit(2)", 2, ""),  # the rank itself has told what is wrong
        ("sys.exit(1)", 1, "pretrain: rank 1 exited with 1\n"),
        ("os._exit(9)", 9, "pretrain: rank 1 exited with 9\n"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "pretrain: rank 1 was killed by SIGKILL (out of memory? see dmesg)\n",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "pretrain: rank 1 was killed by SIGSEGV\n"),
    ],
)
def test_when_a_rank_fails_the_others_are_stopped_and_its_code_is_returned(
    failure: str, code: int, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fault 14: the others end in bounded time, the exit code is not 0, and the first failure is named."""
    ready = str(tmp_path / "pid")
    body = (
        f"rank == 0 and (open({ready!r}, 'w').write(str(os.getpid())), time.sleep(100)); "
        f"wait_for({ready!r}); {failure}"
    )
    started = time.monotonic()
    assert launch_local(rank_command(body), 2) == code
    assert time.monotonic() - started < 8
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert capfd.readouterr().err == told


def test_a_rank_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pretrain.cluster.local.STOP_SECONDS", 0.5)
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


def test_preempted_ranks_are_waited_for(tmp_path: Path) -> None:
    """Rank 1 leaves at once, rank 0 still has to finish the checkpoint."""
    saved = tmp_path / "saved"
    body = f"rank == 0 and (time.sleep(0.7), open({str(saved)!r}, 'w').close()); sys.exit(75)"
    assert launch_local(rank_command(body), 2) == 75
    assert saved.exists()


def test_preempted_ranks_are_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pretrain.cluster.local.LEAVE_SECONDS", 0.5)
    started = time.monotonic()
    assert launch_local(rank_command("rank == 0 and time.sleep(100); sys.exit(75)"), 2) == 75
    assert time.monotonic() - started < 8


def test_a_failure_counts_more_than_a_preemption(capfd: pytest.CaptureFixture[str]) -> None:
    """A rank that failed cannot have saved its part, so this is no clean stop."""
    assert launch_local(rank_command("rank == 0 and (time.sleep(0.5), sys.exit(1)); sys.exit(75)"), 2) == 1
    assert capfd.readouterr().err == "pretrain: rank 0 exited with 1\n"


LAUNCHER = """
import sys
from pretrain.cluster import launch_local
sys.exit(launch_local([sys.executable, "-c", sys.argv[1]], 2))
"""


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_the_launcher_reaches_every_rank_even_while_it_starts(name: str, tmp_path: Path) -> None:
    """Fault 10: USR1 would kill a rank that does not listen yet; it waits. TERM has nothing to save then."""
    body = f"""
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
Path({str(tmp_path)!r}, "started" + rank).touch()
time.sleep(1.0)
from pretrain.preempt import Preemption, PreemptConfig
preemption = Preemption(PreemptConfig())
preemption.install()
Path({str(tmp_path)!r}, "told" + rank).write_text(str(preemption.asked_for()))
sys.exit(75)
"""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, body])
    try:
        until = time.monotonic() + 60
        while not all((tmp_path / f"started{rank}").exists() for rank in range(2)):
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.Signals[f"SIG{name}"])
        code = process.wait(60)
    finally:
        process.kill()
    told = [path.read_text() for path in sorted(tmp_path.glob("told*"))]
    assert (code, told) == ((75, ["signal USR1"] * 2) if name == "USR1" else (143, []))


DYING_RANK = """
import os, torch, torch.distributed as dist
from pretrain.cluster import ClusterConfig, connected, detect
place = detect()
with connected(place, ClusterConfig(timeout_seconds=20)):
    dist.all_reduce(torch.ones(3))
    if place.rank == 1:
        os._exit(9)
    dist.all_reduce(torch.ones(3))
"""


@pytest.mark.distributed
def test_a_rank_that_dies_in_a_step_ends_the_others_and_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """Fault 14. The other rank may end by itself first or be stopped; either way, in bounded time."""
    started = time.monotonic()
    assert launch_local([sys.executable, "-c", DYING_RANK], 2) in (1, 9)
    assert time.monotonic() - started < 60
    assert "pretrain: rank 1 exited with 9" in capfd.readouterr().err
