"""Starts `pretrain train` as srun would, a process for each rank, with faults put in.

The processes are forks of a server that has imported torch and DeepSpeed; from the command line on they do
what any start does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fork_server

from pretrain import cluster

Fault = tuple[str, dict[str, Any]]
ACCUMULATION_STEPS = 2
PR_SET_PDEATHSIG = 1  # of prctl(2)
LAUNCHER_VARIABLES = re.compile(r"(SLURM_.*|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_\w+)")


def fault(name: str, **settings: Any) -> Fault:
    return name, settings


def die_with_parent() -> None:
    """Let Linux kill this process when the one that started it dies, such as a test that took too long."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _rank(
    rank: int,
    variables: Mapping[str, str],
    arguments: list[str],
    faults_to_apply: list[Fault],
    output: str,
    metrics: str,
) -> None:
    """The whole life of a rank."""
    die_with_parent()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    for name in [name for name in os.environ if LAUNCHER_VARIABLES.fullmatch(name)]:
        del os.environ[name]
    os.environ.update(variables)
    sys.argv = ["pretrain", *arguments]

    import faults
    import torch
    from prometheus_client import generate_latest

    from pretrain import cli, train

    torch.set_num_threads(1)
    faults.apply(rank, ACCUMULATION_STEPS, faults_to_apply)
    open_exporter, exporters = train.open_exporter, []

    def kept(*arguments: Any, **settings: Any) -> Any:
        found = open_exporter(*arguments, **settings)
        exporters.append(found[0])
        return found

    train.open_exporter = kept
    try:
        code = cli.main(arguments)
        for act in faults.now.at_end:
            act()
    finally:
        if exporters:
            Path(metrics).write_bytes(generate_latest(exporters[0].registry))
        logging.shutdown()
    sys.exit(code)


class Started:
    """The ranks of one start of a run."""

    def __init__(self, processes: list[BaseProcess], outputs: list[Path], metrics: list[Path]) -> None:
        self.processes = processes
        self.outputs = outputs
        self.metrics_paths = metrics

    def wait(self, seconds: float = 60.0) -> list[int | None]:
        """The exit codes, in rank order; those that do not end are killed, and fail the test."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in stuck:
            self.processes[rank].kill()
        assert not stuck, f"ranks {stuck} do not end\n{self.all_output()}"
        return [process.exitcode for process in self.processes]

    def ends(self, *codes: int, seconds: float = 60.0) -> Started:
        """Assert these exit codes, one of each rank, or one for all."""
        found = self.wait(seconds)
        expected = list(codes) * (len(found) if len(codes) == 1 else 1)
        assert found == expected, self.all_output()
        return self

    def output(self, rank: int = 0) -> str:
        """Everything this start has printed."""
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def all_output(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.output(rank)}" for rank in range(len(self.outputs)))

    def wait_for(self, is_there: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_there():
            if time.monotonic() > deadline or all(process.exitcode is not None for process in self.processes):
                raise AssertionError(f"it never came\n{self.all_output()}")
            time.sleep(0.02)

    def metric(self, name: str, rank: int = 0) -> float:
        """A number that a rank published, as it was at the end, such as 'pretrain_steps_total'."""
        text = self.metrics_paths[rank].read_text()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, name
        return float(found[1])


_count = 0


def start(
    arguments: list[str],
    folder: Path,
    *faults: Fault,
    ranks: int = 1,
    variables: Mapping[str, str] | None = None,
    of_rank: Mapping[int, Sequence[str]] | None = None,
) -> Started:
    """folder: for what the ranks print. of_rank: arguments that single ranks get beside those of all."""
    global _count
    _count += 1
    server, port = fork_server.context(), str(cluster.free_port())
    processes: list[BaseProcess] = []
    outputs: list[Path] = []
    metrics: list[Path] = []
    for rank in range(ranks):
        layout = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        layout |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        outputs.append(folder / f"start-{_count}-rank-{rank}.out")
        metrics.append(folder / f"start-{_count}-rank-{rank}.prom")
        process = server.Process(
            target=_rank,
            args=(
                rank,
                {**(layout if ranks > 1 else {}), **(variables or {})},
                [*arguments, *(of_rank or {}).get(rank, ())],
                list(faults),
                str(outputs[-1]),
                str(metrics[-1]),
            ),
        )
        process.start()
        processes.append(process)
    return Started(processes, outputs, metrics)
