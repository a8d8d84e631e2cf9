"""What the engine costs beside a bare torch loop, and what the ZeRO stages cost. Run by `make bench-engine`.

First, on one rank: ViT-S/16 at 224 px in fp32, 8 images of two views in a step. The bare loop is forward,
backward, clipping, AdamW and reading the loss; the engines run the same module. Then, on two ranks over gloo,
a small ViT under torch's DistributedDataParallel and at each ZeRO stage. Variants take turns within every
round, so that a drift of the machine's speed hits all of them; the ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from result import tell
from step import inputs_for, measure, ratio
from torch.nn.parallel import DistributedDataParallel

from pretrain import build, cluster
from pretrain.config import RunConfig, load_config
from pretrain.engine.engine import Engine
from pretrain.optim import Knobs
from pretrain.peers import ALONE, Peers
from pretrain.views.prepare import Inputs

CONFIGS = Path(__file__).parents[1] / "configs"
KNOBS = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=0.0)
OTHER_TASKS = ("rotation", "colorization", "inpainting", "relative_position", "jigsaw")
CONTRASTIVE = [*(f"tasks.{name}=null" for name in OTHER_TASKS), "data.lanes=1", "engine.precision=fp32"]
VIT_S = [
    "model={name: vit_small_patch16_224, img_px: 224, patch_px: 16}",
    *(f"views.{view}.size_px=224" for view in ("one", "two")),
    "batch.global_size=8",
]
SMALL = [
    "model={name: vit_tiny_patch16_224, img_px: 32, patch_px: 4, args: {depth: 8}}",
    *(f"views.{view}.size_px=32" for view in ("one", "two")),
    "batch.global_size=16",
]
BARE, DDP = "bare torch loop", "torch DistributedDataParallel"
STAGES = (0, 1, 2, 3)
NUM_RANKS = 2


def configuration(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "demo.yaml", [*CONTRASTIVE, *overrides])


def stage(number: int) -> str:
    return f"engine.deepspeed={{zero_optimization: {{stage: {number}}}}}"


def bare_step(config: RunConfig, inputs: Inputs, peers: Peers = ALONE) -> Callable[[], None]:
    """What one would write without this package's engines."""
    module: Any = build.module(config, peers, torch.device("cpu")).train()
    if peers.world_size > 1:
        module = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), KNOBS.lr, weight_decay=KNOBS.weight_decay)

    def step() -> None:
        output = module(inputs)
        output["total"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        output["total"].item()

    return step


def engine_step(config: RunConfig, inputs: Inputs, peers: Peers = ALONE) -> Callable[[], None]:
    engine: Engine = build.engine(config, build.module(config, peers, torch.device("cpu")), peers)
    no_tally = torch.zeros(0, dtype=torch.float64)

    def step() -> None:
        engine.train_step(repeat(inputs), KNOBS, lambda: no_tally)

    return step


def on_one_rank(rounds: int) -> dict[str, Any]:
    inputs = inputs_for(configuration(*VIT_S))
    with cluster.connected(cluster.Cluster()):
        variants = {
            BARE: bare_step(configuration(*VIT_S), inputs),
            "local engine": engine_step(configuration(*VIT_S, "engine.kind=local"), inputs),
            "DeepSpeed ZeRO-1": engine_step(configuration(*VIT_S, stage(1)), inputs),
        }
        seconds = measure(variants, rounds)
    return {"overrides": [*CONTRASTIVE, *VIT_S], **summary(seconds, BARE)}


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    return {
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        f"ratios to {base}": {name: ratio(seconds, name, base) for name in seconds if name != base},
    }


def measure_stages(rank: int, port: int, rounds: int, threads: int, results: Any) -> None:
    """One of the ranks; every variant of a round begins on all of them at the same time."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    place = cluster.Cluster(rank, NUM_RANKS, rank, NUM_RANKS, "benchmark")
    with cluster.connected(place):
        peers = cluster.peers(place)
        own = configuration(*SMALL, f"batch.global_size={16 // NUM_RANKS}")  # this rank's share
        inputs = inputs_for(own)
        variants = {DDP: bare_step(configuration(*SMALL), inputs, peers)}
        for number in STAGES:
            variants[f"ZeRO-{number}"] = engine_step(configuration(*SMALL, stage(number)), inputs, peers)

        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds + 1):
            for name, step in variants.items():
                dist.barrier()
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
        if place.is_first:
            results.put({name: values[1:] for name, values in seconds.items()})


def on_two_ranks(rounds: int) -> dict[str, Any]:
    results = mp.get_context("spawn").SimpleQueue()
    threads = max(1, (os.cpu_count() or 1) // NUM_RANKS)
    mp.spawn(measure_stages, (cluster.free_port(), rounds, threads, results), nprocs=NUM_RANKS)
    return {"overrides": [*CONTRASTIVE, *SMALL], **summary(results.get(), DDP)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="on one rank; five times as many on two")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "one rank, ViT-S/16 at 224 px, batch 8": on_one_rank(arguments.rounds),
        "two ranks over gloo, ViT-Ti/4 at 32 px, batch 16": on_two_ranks(5 * arguments.rounds),
        "rounds": arguments.rounds,
    }
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
