"""Two ranks over gloo on one machine: ZeRO beside DistributedDataParallel, and what the second rank costs.

One rank trains alone; then both train, each for itself, which shows what they take from each other by
sharing caches and memory; then together, which adds the communication. Each rank has one thread and its own
images, as many as the lone one.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from pretrain import cluster
from steps.core import CORE, bare_step, views
from steps.ours import CONTRASTIVE_ONLY, PLAIN, Setting, configuration, inputs_for, training_step
from steps.turns import WALL, Seconds, Step, row, table, take_turns

NUM_RANKS = 2
IMAGES_PER_RANK = 2
STAGES = (0, 1, 2)
LONE, BOTH, DDP = (
    "one rank, the other idle",
    "two ranks, each for itself",
    "two ranks, DistributedDataParallel",
)


def zero(stage: int) -> str:
    return f"two ranks, DeepSpeed ZeRO-{stage}"


def measure(rank: int, port: int, setting: Setting, results: Any) -> None:
    """One of the ranks; they begin every step at the same time."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    place = cluster.Cluster(rank, NUM_RANKS, rank, NUM_RANKS, "benchmark")
    with cluster.connected(place):
        seconds = take_turns(variants(setting, place), setting.rounds_or(7), WALL, lambda _: dist.barrier())
        if place.is_first:
            results.put(seconds)


def variants(setting: Setting, place: cluster.Cluster) -> dict[str, Step]:
    peers = cluster.peers(place)
    common = [*PLAIN, setting.model(224, 16), *views(setting, 224), *CONTRASTIVE_ONLY]
    own = configuration(CORE, *common, f"batch.global_size={IMAGES_PER_RANK}")
    both = partial(configuration, CORE, *common, f"batch.global_size={NUM_RANKS * IMAGES_PER_RANK}")
    inputs = inputs_for(own, setting.shards)
    alone = bare_step(own, inputs)
    steps: dict[str, Step] = {
        LONE: alone if place.is_first else lambda: None,
        BOTH: alone,
        DDP: bare_step(own, inputs, peers, DistributedDataParallel),
    }
    for stage in STAGES:
        config = both(f"engine.deepspeed={{zero_optimization: {{stage: {stage}}}}}")
        steps[zero(stage)] = training_step(config, inputs, peers)
    return steps


def ranks(setting: Setting) -> dict[str, Any]:
    results = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(measure, (cluster.free_port(), setting, results), nprocs=NUM_RANKS, join=False)
    while not context.join():
        pass
    seconds: Seconds = results.get()
    rows = [
        row(f"ZeRO-{stage} / DistributedDataParallel, two ranks", seconds, zero(stage), DDP)
        for stage in STAGES
    ]
    rows += [
        row("two ranks, each for itself / one alone", seconds, BOTH, LONE),
        row("two ranks together (ZeRO-1) / each for itself", seconds, zero(1), BOTH),
        row("weak scaling: two ranks together (ZeRO-1) / one alone", seconds, zero(1), LONE),
    ]
    return table(
        f"ViT-S/16 at 224 px, contrastive, {IMAGES_PER_RANK} images of two views a rank, fp32",
        WALL,
        seconds,
        rows,
    )
