"""Where this process stands among the ranks of a run, and how they talk to each other.

The only file that reads launcher variables and makes process groups.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from pretrain.peers import ALONE, Peers

T = TypeVar("T")
PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # of prctl(2)
TIMEOUT = timedelta(minutes=10)
STOP_SECONDS = 10.0  # between asking a rank to stop and killing it


@dataclass(frozen=True)
class Cluster:
    """This process's place in the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "single process"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # a launcher that shows each task one GPU leaves only index 0
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    try:
        return int(variables[name])
    except KeyError:
        if default is not None:
            return default
        raise UserError(
            f"{name}: not set, though other variables of a launcher are; start with one"
        ) from None
    except ValueError:
        raise UserError(f"{name}: '{variables[name]}' is not a number; check the launcher") from None


def detect(variables: Mapping[str, str] = os.environ) -> Cluster:
    """Read the layout that torchrun, the deepspeed launcher, srun or our own launcher announced."""
    if "RANK" in variables:
        launcher = variables.get("PRETRAIN_LAUNCHER") or (
            "torchrun" if "TORCHELASTIC_RUN_ID" in variables else "environment"
        )
        rank_name, world_name, local_name = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        world_size = _number(variables, "WORLD_SIZE")
        # the deepspeed launcher says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE
        size_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in variables else "LOCAL_SIZE"
        local_world_size = _number(variables, size_name, default=world_size)
    elif "SLURM_PROCID" in variables and _number(variables, "SLURM_NTASKS", default=1) > 1:
        launcher = "srun"
        rank_name, world_name, local_name = "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
        world_size, size_name = _number(variables, "SLURM_NTASKS"), "SLURM_NNODES"
        num_nodes = _number(variables, "SLURM_NNODES", default=1)
        local_world_size = world_size // num_nodes if num_nodes > 0 and world_size % num_nodes == 0 else 0
    elif _number(variables, "WORLD_SIZE", default=1) > 1:
        raise UserError("RANK: not set, though WORLD_SIZE is; start through a launcher, or unset WORLD_SIZE")
    else:
        return Cluster()
    rank, local_rank = _number(variables, rank_name), _number(variables, local_name)
    if not 0 <= rank < world_size:
        raise UserError(f"{rank_name}: {rank} is not below {world_name} {world_size}; check the launcher")
    if local_world_size < 1 or world_size % local_world_size:
        raise UserError(
            f"{size_name}: {variables.get(size_name)} does not share {world_name} {world_size} equally among "
            "nodes; start equally many ranks on each"
        )
    if not 0 <= local_rank < local_world_size:
        raise UserError(
            f"{local_name}: {local_rank} is not below the {local_world_size} ranks of a node; "
            "check the launcher"
        )
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in variables:
                raise UserError(f"{name}: not set; ranks need it to find each other")
        _number(variables, "MASTER_PORT")
    return Cluster(rank, world_size, local_rank, local_world_size, launcher)


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Be in the process group: NCCL on GPUs, gloo on CPUs. DeepSpeed needs one even for a single rank.

    The launcher variables that DeepSpeed looks for are set meanwhile, and put back at the end.
    """
    device = cluster.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    before = dict(os.environ)
    os.environ.update(
        RANK=str(cluster.rank), WORLD_SIZE=str(cluster.world_size), LOCAL_RANK=str(cluster.local_rank)
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=cluster.rank, world_size=cluster.world_size, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums every rank's gradient for the local rows (METHODS A3)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        world = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(world, local.contiguous())
        return torch.cat(world)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()  # what autograd hands in is not ours to change
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class _Sum(torch.autograd.Function):
    """All-reduce; every rank used the sum, so the backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def peers(cluster: Cluster) -> Peers:
    """The connected ranks, as losses and normalisation layers use them."""
    if cluster.world_size == 1:
        return ALONE
    return Peers(cluster.rank, cluster.world_size, _Gather.apply, _Sum.apply)


def from_first(value: T) -> T:
    """What rank 0 has, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_said(text: str | None) -> str | None:
    """What the first rank that has something to say says, on every rank."""
    if dist.get_world_size() == 1:
        return text
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return next((said for said in texts if said is not None), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_local(command: Sequence[str], num_processes: int) -> int:
    """Run `command` as ranks 0..num_processes-1 on this machine; returns the exit code of the first to fail.

    When a rank fails the others are stopped, so nobody waits in a collective for a rank that is gone.
    """
    port = str(free_port())
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    processes = []
    for rank in range(num_processes):
        variables = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PRETRAIN_LAUNCHER": "--nproc",
        }
        variables.setdefault("OMP_NUM_THREADS", str(threads))
        processes.append(subprocess.Popen(command, env=variables, preexec_fn=_end_with_parent))
    code = 0
    # what the launcher is told, every rank is told
    before = {number: signal.signal(number, _passing_on(processes)) for number in PASSED_ON}
    try:
        while any(process.poll() is None for process in processes):
            failed = [process.returncode for process in processes if process.poll() not in (None, 0)]
            if failed:
                code = failed[0]
                break
            time.sleep(0.1)
        else:
            code = next((process.returncode for process in processes if process.returncode), 0)
    except KeyboardInterrupt:
        code = EXIT_FAILED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        _stop(processes)
        # the rank that knows the cause wins over those that only lost their peer
        codes = [process.returncode for process in processes]
        code = next((known for known in (EXIT_USER_ERROR, EXIT_PREEMPTED) if known in codes), code)
        if code < 0:
            print(f"pretrain: a rank was killed by signal {-code}", file=sys.stderr)  # noqa: T201
            code = 128 - code
    return code


def _passing_on(processes: Sequence[subprocess.Popen[bytes]]) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return handler


def _end_with_parent() -> None:
    """Let Linux kill this process when the launcher dies, even if that was by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
