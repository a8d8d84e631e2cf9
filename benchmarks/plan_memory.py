"""Memory of real training steps on a CPU beside what `pretrain plan` predicts. Run by `make bench-plan`.

Every case is a fresh process for each rank: blocks as wide as ViT-S's with the core tasks, fp32, views from
random pixels, the engine that a run has. Measured is resident memory. The allocator is told to give freed
tensors back at once, so the process grows by what is alive: at rest between two steps, and at its peak within
a step (the kernel's own high-water mark, reset before the step). What the process had before anything was
built, libraries warmed up by a smaller model of the same kind, is taken off.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from itertools import repeat
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
CONFIG = HERE / "configs" / "imagenet_vitb16_multitask.yaml"
MODEL = [
    *("views.one.size_px=64", "views.two.size_px=64", "engine.precision=fp32", "data.lanes=2"),
    "schedule={steps: 10}",
]
DEPTH, SMALL_DEPTH = 8, 1
MICRO_BATCH, NUM_STEPS = 16, 3
WORLDS = (1, 2)
STAGES = {False: (0, 1, 2, 3), True: (0, 1)}  # without and with recomputing
LIMIT_RATIO = 0.15


def overrides_of(stage: int, recompute: bool, world_size: int, depth: int = DEPTH) -> list[str]:
    args = f"{{depth: {depth}}}"
    return [
        *MODEL,
        f"model={{name: vit_small_patch16_224, img_px: 64, patch_px: 8, args: {args}}}",
        f"batch.global_size={MICRO_BATCH * world_size}",
        f"engine.recompute={str(recompute).lower()}",
        f"engine.deepspeed={{zero_optimization: {{stage: {stage}}}}}",
    ]


def predicted(stage: int, recompute: bool, world_size: int) -> dict[str, float]:
    """Bytes of one rank at rest and at its peak."""
    from pretrain.plan.backbone import encoder_of
    from pretrain.plan.flops import site_of
    from pretrain.plan.memory import activity_of, memory_of
    from pretrain.plan.parameters import parameters_of
    from pretrain.plan.settings import plan_settings

    settings = plan_settings(CONFIG, overrides_of(stage, recompute, world_size))
    encoder = encoder_of(settings)
    site = site_of(settings, encoder, world_size, 0)
    found = memory_of(
        settings,
        encoder,
        parameters_of(settings, encoder, site),
        activity_of(settings, encoder, site),
        stage=stage,
        world_size=world_size,
        micro_batch=MICRO_BATCH,
        recompute=recompute,
    )
    return {"rest": found.at_rest, "peak": found.peak}


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def inputs_for(config: Any) -> Any:
    """Finished views of random pixels."""
    import torch

    from pretrain import build
    from pretrain.views.prepare import prepare

    size, side = config.batch.global_size, config.model.img_px
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (2, size, side, side, 3), dtype=torch.uint8, generator=generator)
    return prepare(build.recipe(config), 0, crops, torch.zeros(size, dtype=torch.int64), torch.arange(size))


def measure(stage: int, recompute: bool, place: Any) -> dict[str, float]:
    """On one rank, connected to the others: bytes beyond what was there before."""
    import torch

    from pretrain import build, cluster
    from pretrain.config import load_config
    from pretrain.optim import Knobs

    knobs = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=0.0)
    nothing = torch.zeros(0, dtype=torch.float64)
    peers = cluster.peers(place)

    def steps(depth: int) -> tuple[Any, ...]:
        config = load_config(CONFIG, overrides_of(stage, recompute, place.world_size, depth))
        inputs = inputs_for(load_config(CONFIG, overrides_of(stage, recompute, 1, depth)))
        engine = build.engine(config, build.module(config, peers, torch.device("cpu")), peers)

        def step() -> None:
            engine.train_step(repeat(inputs), knobs, lambda: nothing)

        return step, engine

    step, engine = steps(SMALL_DEPTH)
    step()
    engine.engine.destroy()
    del step, engine
    gc.collect()
    before = resident("VmRSS")
    step, _ = steps(DEPTH)
    for _ in range(NUM_STEPS - 1):
        step()
    gc.collect()
    rest = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step()
    return {"rest": float(rest - before), "peak": float(resident("VmHWM") - before)}


def measure_as_rank(arguments: argparse.Namespace) -> None:
    import torch

    from pretrain import cluster

    torch.set_num_threads(1)
    place = cluster.detect()
    with cluster.connected(place):
        found = measure(arguments.stage, arguments.recompute, place)
    if place.is_first:
        print(json.dumps(found))


def measured(stage: int, recompute: bool, world_size: int) -> dict[str, float]:
    """Of rank 0, in fresh processes."""
    sys.path.insert(0, str(HERE))
    from pretrain.cluster.local import free_port

    port = str(free_port())
    command = [sys.executable, __file__, "--stage", str(stage)]
    ranks = []
    for rank in range(world_size):
        variables = {
            **os.environ,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            # memory of tensors comes from the kernel and goes back to it
            **{"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"},
        }
        more = ["--recompute"] if recompute else []
        ranks.append(
            subprocess.Popen([*command, *more], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    answers = [rank.communicate(timeout=280) for rank in ranks]
    for rank, (_, error) in zip(ranks, answers, strict=True):
        if rank.returncode:
            raise RuntimeError(error.decode()[-2000:])
    found: dict[str, float] = json.loads(answers[0][0].decode().splitlines()[-1])
    return found


def compared(stage: int, recompute: bool, world_size: int) -> dict[str, Any]:
    told, found = predicted(stage, recompute, world_size), measured(stage, recompute, world_size)
    return {
        "zero_stage": stage,
        "ranks": world_size,
        "recompute": recompute,
        **{f"predicted_{name}_mib": round(value / 2**20, 1) for name, value in told.items()},
        **{f"measured_{name}_mib": round(value / 2**20, 1) for name, value in found.items()},
        **{f"{name}_ratio": round(told[name] / found[name], 3) for name in told},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stage", type=int, help="as one of the ranks of a case")
    parser.add_argument("--recompute", action="store_true")
    arguments = parser.parse_args()
    if arguments.stage is not None:
        measure_as_rank(arguments)
        return
    from result import tell

    cases = []
    for world_size in WORLDS:
        for recompute, stages in STAGES.items():
            for stage in stages:
                cases.append(compared(stage, recompute, world_size))
                print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    worst = max(abs(case["peak_ratio"] - 1) for case in cases)
    setting = {"config": str(CONFIG.relative_to(HERE)), "overrides": MODEL, "depth": DEPTH}
    tell(
        {**setting, "micro_batch": MICRO_BATCH, "worst_peak_error_ratio": round(worst, 3), "cases": cases},
        arguments.out,
    )


if __name__ == "__main__":
    main()
