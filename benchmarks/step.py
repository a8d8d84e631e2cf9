"""Side-by-side step times on this machine: what the heads cost, what DeepSpeed costs. Run by `make bench`.

Variants take turns within every round, so that a drift of the machine's speed hits all of them; quote the
medians of the ratios within a round.
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

from pretrain import build, cluster
from pretrain.config import RunConfig, load_config
from pretrain.engine.engine import Engine
from pretrain.optim import Knobs
from pretrain.peers import ALONE
from pretrain.views.prepare import Inputs, prepare

CONFIGS = Path(__file__).parents[1] / "configs"


def configuration(*overrides: str) -> RunConfig:
    return load_config(
        CONFIGS / "demo.yaml", ["data.lanes=1", "batch.global_size=32", "optim.clip_norm=0", *overrides]
    )


def inputs_for(config: RunConfig) -> Inputs:
    size, side = config.batch.global_size, config.model.img_px
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (2, size, side, side, 3), dtype=torch.uint8, generator=generator)
    return prepare(build.recipe(config), 0, crops, torch.zeros(size, dtype=torch.int64), torch.arange(size))


def stepper(config: RunConfig) -> Callable[[], None]:
    engine: Engine = build.engine(config, build.module(config, ALONE, torch.device("cpu")), ALONE)
    inputs = inputs_for(config)
    knobs = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=0.0)
    no_tally = torch.zeros(0, dtype=torch.float64)
    return lambda: (engine.train_step(repeat(inputs), knobs, lambda: no_tally), None)[1]


def measure(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one step of each variant, per round; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, step in variants.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    others = ("rotation", "colorization", "inpainting", "relative_position", "jigsaw")
    contrastive_only = [f"tasks.{name}=null" for name in others]
    local = "engine.kind=local"
    with cluster.connected(cluster.Cluster()):
        variants = {
            "all six tasks, plain torch": stepper(configuration(local)),
            "contrastive only, plain torch": stepper(configuration(local, *contrastive_only)),
            "all six tasks, DeepSpeed ZeRO-1": stepper(configuration()),
        }
        seconds = measure(variants, arguments.rounds)
    plain = "all six tasks, plain torch"
    result = {
        "what": "one step of configs/demo.yaml's model at batch 32, inputs prepared before",
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "ratios": {
            "all six tasks / contrastive only": ratio(seconds, plain, "contrastive only, plain torch"),
            "DeepSpeed ZeRO-1 / plain torch": ratio(seconds, "all six tasks, DeepSpeed ZeRO-1", plain),
        },
        "rounds": arguments.rounds,
    }
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
