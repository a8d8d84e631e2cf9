"""Where this process stands among the ranks of a run, as its launcher says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pretrain.errors import UserError

# step numbers from here on are Slurm's own: the batch script, an interactive shell (slurm.h)
SLURM_SPECIAL_STEP = 0xFFFFFFF0


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


def number_in(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
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
        world_size = number_in(variables, "WORLD_SIZE")
        # the deepspeed launcher says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE
        size_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in variables else "LOCAL_SIZE"
        local_world_size = number_in(variables, size_name, default=world_size)
    elif _is_srun_task(variables):
        launcher = "srun"
        rank_name, world_name, local_name = "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
        world_size, size_name = number_in(variables, "SLURM_NTASKS"), "SLURM_NNODES"
        _check_equal_nodes(variables)
        num_nodes = number_in(variables, "SLURM_NNODES", default=1)
        local_world_size = world_size // num_nodes if num_nodes > 0 and world_size % num_nodes == 0 else 0
    elif number_in(variables, "WORLD_SIZE", default=1) > 1:
        raise UserError("RANK: not set, though WORLD_SIZE is; start through a launcher, or unset WORLD_SIZE")
    else:
        # the shell of a batch script looks like task 0 of many, and would wait for the others for ever
        in_shell = "SLURM_PROCID" in variables and number_in(variables, "SLURM_NTASKS", default=1) > 1
        return Cluster(launcher="single process, not started by srun" if in_shell else "single process")
    rank, local_rank = number_in(variables, rank_name), number_in(variables, local_name)
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
        master(variables)
    return Cluster(rank, world_size, local_rank, local_world_size, launcher)


def master(variables: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where rank 0 listens: as announced, else the first node of the Slurm step."""
    by_slurm = "RANK" not in variables and _is_srun_task(variables)
    host = variables.get("MASTER_ADDR") or (_first_node(variables) if by_slurm else None)
    if not host:
        nodes = ", and SLURM_STEP_NODELIST is not set either" if by_slurm else ""
        raise UserError(f"MASTER_ADDR: not set{nodes}; name the host of rank 0, where ranks find each other")
    if "MASTER_PORT" not in variables and by_slurm and "SLURM_JOB_ID" in variables:
        # of its own for each step, below the ports that systems hand out (32768 on)
        number = 7919 * number_in(variables, "SLURM_JOB_ID") + number_in(variables, "SLURM_STEP_ID")
        return host, 15000 + number % 15000
    if "MASTER_PORT" not in variables:
        raise UserError("MASTER_PORT: not set; ranks need it to find each other")
    port = number_in(variables, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT: {port} is not a port; choose one from 1024 to 65535")
    return host, port


def _is_srun_task(variables: Mapping[str, str]) -> bool:
    """Whether srun started this process, as one of several tasks.

    A batch script has a SLURM_PROCID but no SLURM_STEP_ID of srun. If it was submitted from within a step it
    has the variables of that one, too, whose number of tasks then is another.
    """
    num_tasks = number_in(variables, "SLURM_NTASKS", default=1)
    if "SLURM_PROCID" not in variables or num_tasks <= 1:
        return False
    step = variables.get("SLURM_STEP_ID", "")
    in_step = step.isdecimal() and int(step) < SLURM_SPECIAL_STEP
    return in_step and number_in(variables, "SLURM_STEP_NUM_TASKS", default=num_tasks) == num_tasks


def _check_equal_nodes(variables: Mapping[str, str]) -> None:
    """Refuse '2(x2),1': two nodes with two tasks and one with one."""
    name = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if n in variables), None)
    if name is None:
        return
    parts = variables[name].split(",")
    if not all(re.fullmatch(r"\d+(\(x\d+\))?", part) for part in parts):
        raise UserError(f"{name}: '{variables[name]}' is no list of tasks per node; check the launcher")
    if len({part.partition("(")[0] for part in parts}) > 1:
        raise UserError(
            f"{name}: {variables[name]} is not the same on every node; start equally many ranks on each "
            "(srun --ntasks-per-node)"
        )


def _first_node(variables: Mapping[str, str]) -> str | None:
    """'rack[2-4,7]n[01-16],login' -> 'rack2n01'. A container may lack `scontrol`, which tells it too."""
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    first = re.match(r"([^,\[]|\[[^\]]*\])+", nodes or "")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0]) if first else None
