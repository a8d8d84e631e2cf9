"""`--dry-run`: everything is built and one step is taken, by one process that stands for rank 0 of many.

The micro batch, the lanes and the shapes are those of the real run; copies of this rank's rows stand for the
other ranks. Nothing is written into the run folder.
"""

from __future__ import annotations

import contextlib
import resource
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain import build, changes, cluster
from pretrain.checkpoint import OPTIMIZER
from pretrain.data.loader import open_batches
from pretrain.engine.deepspeed_engine import zero_stage
from pretrain.engine.engine import Engine
from pretrain.loop import Loop
from pretrain.models.teacher import Teacher
from pretrain.peers import ALONE, Peers
from pretrain.preflight import Inspected, Request, describe, inspect
from pretrain.tasks.multitask import MultiTask
from pretrain.views.plan import in_places

WARM_SECONDS = 10.0  # where the first step took less, a second one tells what a warm step takes


@dataclass(frozen=True)
class Rehearsal:
    """What a first step as rank 0 showed."""

    inspected: Inspected
    build_seconds: float  # model, engine and loader
    first_seconds: float  # of the first step, everything cold: the first batch, kernels, memory
    warm_seconds: float | None  # of the second, if there was time for one
    wait_seconds: float  # of the last of them, for data
    peak_bytes: int  # of the trainer: resident on the CPU, or allocated on the GPU
    loader_bytes: int  # of the loader process, resident; 0 if there is none
    checkpoint_bytes: int
    optimizer_bytes: int  # of the optimizer's state, which ZeRO divides over the ranks

    @property
    def step_seconds(self) -> float:
        return self.first_seconds if self.warm_seconds is None else self.warm_seconds

    @property
    def run_seconds(self) -> float:
        """A prediction for the whole run: all its steps as long as the last one seen."""
        return self.inspected.num_steps * self.step_seconds


def stand_in(world_size: int) -> Peers:
    """Peers of rank 0, each with the same rows as rank 0 itself."""

    def gather(local: Tensor) -> Tensor:
        return torch.cat([local] * world_size)

    def total(local: Tensor) -> Tensor:
        return local * world_size

    return Peers(0, world_size, gather, total)


def rehearse(request: Request, place: cluster.Cluster) -> Rehearsal:
    """Take the first step of the run as rank 0 of `place`, from fresh weights. UserError as a real start."""
    place = replace(place, rank=0, local_rank=0)
    inspected = inspect(request, place)
    alone = cluster.Cluster()
    needs_group = request.config.engine.kind == "deepspeed" or place.device.type == "cuda"
    with cluster.connected(alone) if needs_group else contextlib.nullcontext():
        return _rehearse(request, inspected, place)


def _rehearse(request: Request, inspected: Inspected, place: cluster.Cluster) -> Rehearsal:
    config, device = request.config, place.device
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = open_batches(
        config.data,
        inspected.splits,
        in_places(config.views),
        seed=config.seed,
        batch_size=build.micro_step_batch(config),
        rank=0,
        world_size=place.world_size,
        device=device,
    )
    try:
        module = build.module(config, stand_in(place.world_size), device, inspected.mixture.num_samples)
        teacher = module.make_teacher() if config.teacher else None
        engine = _engine(request, inspected, module, teacher)
        loop = Loop(request, inspected, place, engine, teacher, None, batches, None)
        build_seconds = time.perf_counter() - started
        compiled = build.compiles(config, device.type)  # then the first step says little about the others
        seconds: list[float] = []
        wait_seconds = 0.0
        for step in range(min(2, inspected.num_steps)):
            if seconds and seconds[0] > WARM_SECONDS and not compiled:
                break
            waited, begin = batches.wait_seconds, time.perf_counter()
            loop.train_step(step)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
            wait_seconds = batches.wait_seconds - waited
    finally:
        batches.close()
    files = changes.outline(config, inspected.mixture.num_samples)
    has_loader = not config.data.resident and config.data.decode_threads > 0
    return Rehearsal(
        inspected,
        build_seconds,
        seconds[0],
        seconds[1] if len(seconds) > 1 else None,
        wait_seconds,
        _peak_bytes(device),
        _resident_bytes(resource.RUSAGE_CHILDREN) if has_loader else 0,
        changes.num_bytes(files),
        changes.num_bytes({OPTIMIZER: files[OPTIMIZER]}),
    )


def _engine(request: Request, inspected: Inspected, module: MultiTask, teacher: Teacher | None) -> Engine:
    """The run's engine with a world of one, whose global batch is the share of rank 0."""
    per = inspected.sizes
    share = per.micro_batch * per.accumulation_steps
    batch = request.config.batch.model_copy(update={"global_size": share})
    return build.engine(request.config.model_copy(update={"batch": batch}), module, ALONE, teacher)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _resident_bytes(resource.RUSAGE_SELF)


def _resident_bytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * 1024  # Linux counts KiB


def describe_rehearsal(request: Request, found: Rehearsal, place: cluster.Cluster) -> str:
    """The layout, and below it what the step has shown."""
    where = "on the GPU" if place.device.type == "cuda" else "resident"
    seconds = f"first step {found.first_seconds:.2f} s"
    if found.warm_seconds is not None:
        seconds += f", next {found.warm_seconds:.2f} s"
    memory = f"peak memory of rank 0 {_mib(found.peak_bytes)} {where}"
    if found.loader_bytes:
        memory += f", of its loader {_mib(found.loader_bytes)}"
    config, world_size = request.config, found.inspected.sizes.world_size
    if config.engine.kind == "deepspeed" and zero_stage(config.engine) and world_size > 1:
        spared = found.optimizer_bytes * (world_size - 1) // world_size
        memory += f"; {_mib(spared)} less in the run, where ZeRO divides the optimizer's state"
    return "\n".join(
        [
            describe(request, found.inspected, place),
            f"built in {found.build_seconds:.1f} s; {seconds} ({found.wait_seconds:.2f} s of it for data)",
            memory,
            f"a checkpoint takes {_mib(found.checkpoint_bytes)}",
            f"{found.inspected.num_steps} steps take {_duration(found.run_seconds)} (prediction: one process "
            "alone, without communication and checkpoints)",
        ]
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{hours:.1f} hours"
        if hours >= 2
        else f"{minutes:.1f} minutes"
        if minutes >= 2
        else f"{seconds:.0f} s"
    )
