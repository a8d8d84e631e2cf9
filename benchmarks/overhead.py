"""What each task or decoder adds to a contrastive step on this machine. Run by `make bench-overhead`.

Two tables: the light tasks on a ViT at 32 px, and RePre's decoder on ViT-S/16 at 224 px beside MoCo v3.
Inputs are prepared before; a step is the teacher's pass where there is one, forward, backward, optimizer and
the teacher's average. Variants take turns within every round, so that a drift of the machine's speed hits all
of them; the ratios are medians over rounds, of the CPU time of one thread, to which other processes add
little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import torch
from result import tell
from step import ratio

from pretrain import build
from pretrain.check import check
from pretrain.config import RunConfig, load_config
from pretrain.optim import Knobs
from pretrain.peers import ALONE
from pretrain.views.prepare import Moment, prepare, with_labels

CONFIGS = Path(__file__).parents[1] / "configs"
KNOBS = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=0.0)
LOCAL = ["engine.kind=local", "engine.precision=fp32", "optim.clip=global", "data.lanes=1"]
SMALL = [
    *LOCAL,
    "model={name: vit_tiny_patch16_224, img_px: 32, patch_px: 4, args: {depth: 12}}",
    "batch.global_size=16",
    *(f"views.{view}.local=null" for view in ("one", "two")),
]
BASE = "contrastive only"
LIGHT = {
    BASE: [],
    "+ rotation": ["tasks.rotation={}"],
    "+ clustering": ["tasks.clustering={num_prototypes: 300}"],
    "+ colorization": ["tasks.colorization={}"],
    "+ inpainting": ["tasks.inpainting={}"],
    "+ relative position": ["tasks.relative_position={}"],
    "+ jigsaw": ["tasks.jigsaw={}"],
    "+ all five of the core method": [
        f"tasks.{name}={{}}"
        for name in ("rotation", "colorization", "inpainting", "relative_position", "jigsaw")
    ],
    "+ reconstruction (SiT)": ["tasks.reconstruction={}"],
    "+ rotation, reconstruction (SiT)": ["tasks.rotation={}", "tasks.reconstruction={}"],
    "+ spatial relation (RelViT)": ["tasks.spatial_relation={}"],
    "+ all four relations (RelViT)": [
        f"tasks.{name}={{}}" for name in ("spatial_relation", "distance", "angle", "absolute_position")
    ],
    "+ DrLoc": ["tasks.drloc={}"],
    "+ RePre, full width": ["tasks.repre={}"],
    "+ RePre, half the width": ["tasks.repre={dec_dim: 96}"],
}
REPRE_BASE = "MoCo v3 only"
REPRE = {
    REPRE_BASE: ["tasks.repre=null"],
    "+ RePre, full width (384)": [],
    "+ RePre, dec_dim 192": ["tasks.repre.dec_dim=192"],
    "+ RePre, dec_dim 128": ["tasks.repre.dec_dim=128"],
    "+ RePre, one level": ["tasks.repre.num_levels=1"],
}


def measure(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one step of each variant, per round; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, step in variants.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
    return {name: values[1:] for name, values in seconds.items()}


def stepper(config: RunConfig) -> Callable[[], None]:
    check(config, world_size=1)
    size, generator = config.batch.global_size, torch.Generator().manual_seed(0)
    side, ids = config.model.img_px, torch.arange(config.batch.global_size)
    crops = torch.randint(0, 256, (2, size, side, side, 3), dtype=torch.uint8, generator=generator)
    model = build.module(config, ALONE, torch.device("cpu"), num_samples=size)
    engine = build.engine(config, model, ALONE)
    teacher = model.make_teacher() if config.teacher else None
    inputs = prepare(build.recipe(config), 0, crops, torch.zeros_like(ids), ids)
    inputs = with_labels(inputs, ids, Moment(0, 10, 1.0))
    no_tally = torch.zeros(0, dtype=torch.float64)

    def step() -> None:
        seen = model.consult(teacher, inputs) if teacher else inputs
        engine.train_step(repeat(seen), KNOBS, lambda: no_tally)
        model.finish_step()
        if teacher:
            named = ((f"{part}.{name}", value) for part in teacher.parts
                     for name, value in engine.student(model.get_submodule(part)))  # fmt: skip
            teacher.update(named, 0.99)

    return step


def table(
    path: Path, common: list[str], variants: dict[str, list[str]], base: str, rounds: int
) -> dict[str, object]:
    steppers = {name: stepper(load_config(path, [*common, *more])) for name, more in variants.items()}
    seconds = measure(steppers, rounds)
    rows = {}
    for name in variants:
        median = round(statistics.median(seconds[name]), 4)
        rows[name] = {"median_cpu_seconds": median, "over_base": ratio(seconds, name, base)}
    for name, row in rows.items():
        over = row["over_base"]
        assert isinstance(over, dict)
        print(f"{name:<36} {over['median']:.3f}  ({over['low']:.3f} to {over['high']:.3f})", flush=True)
    return {
        "base": base,
        "config": f"{path.parent.name}/{path.name}",
        "overrides": common,
        "rounds": rounds,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = CONFIGS / "methods"
    only_contrast = [
        "tasks={contrastive: {}}", "views.one.turn=true", "views.two.turn=true", "balance.kind=fixed",
    ]  # fmt: skip
    result = {
        "light tasks, ViT-Ti/4 at 32 px, batch 16": table(
            methods / "sit_vits4_cifar10.yaml", [*SMALL, *only_contrast], LIGHT, BASE, arguments.rounds
        ),
        "RePre, ViT-S/16 at 224 px, batch 2": table(
            methods / "repre_moco_v3_vits16.yaml",
            [*LOCAL, "batch.global_size=2"],
            REPRE,
            REPRE_BASE,
            arguments.rounds,
        ),
        "paper": "RePre states about 4 % of extra work (arXiv:2201.06857)",
    }
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
