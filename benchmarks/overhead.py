"""What each task or decoder adds to a contrastive step on this machine. Run by `make bench-overhead`.

Two tables: the light tasks on a ViT at 32 px, and RePre's decoder on ViT-S/16 at 224 px beside MoCo v3.
Inputs, of real images, are prepared before; a step is the teacher's pass where there is one, forward,
backward, optimizer and the teacher's average. Variants take turns within every round, so that a drift of the
machine's speed hits all of them; the ratios are medians over rounds, of the CPU time of one thread, to which
other processes add little.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from result import tell
from step import shards_there_are
from steps.ours import CONFIGS, LOCAL, configuration, inputs_for, training_step
from steps.turns import ratio, take_turns

CLIPPED = [*LOCAL, "optim.clip=global"]
SMALL = [
    *CLIPPED,
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


def table(
    path: Path, common: list[str], variants: dict[str, list[str]], base: str, rounds: int, shards: Path
) -> dict[str, object]:
    steps = {}
    for name, more in variants.items():
        config = configuration(str(path), *common, *more)
        steps[name] = training_step(config, inputs_for(config, shards))
    seconds = take_turns(steps, rounds)
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
    parser.add_argument("--shards", type=Path, default=shards_there_are(), help="folder with an index")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = CONFIGS / "methods"
    only_contrast = [
        "tasks={contrastive: {}}", "views.one.turn=true", "views.two.turn=true", "balance.kind=fixed",
    ]  # fmt: skip
    result = {
        "light tasks, ViT-Ti/4 at 32 px, batch 16": table(
            methods / "sit_vits4_cifar10.yaml",
            [*SMALL, *only_contrast],
            LIGHT,
            BASE,
            arguments.rounds,
            arguments.shards,
        ),
        "RePre, ViT-S/16 at 224 px, batch 2": table(
            methods / "repre_moco_v3_vits16.yaml",
            [*CLIPPED, "batch.global_size=2"],
            REPRE,
            REPRE_BASE,
            arguments.rounds,
            arguments.shards,
        ),
        "paper": "RePre states about 4 % of extra work (arXiv:2201.06857)",
    }
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
