"""What the metrics of a run cost: CPU time of one thread for each step, beside the step of a small model.

What happens in every step, what happens now and then (shared out over the steps between), and a scrape. Run
by `make bench-metrics`. Numbers are medians of rounds in which the parts take turns.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, generate_latest
from result import tell
from step import configuration, inputs_for, stepper

from pretrain import build, cluster
from pretrain.conflict import compare_gradients, shared_parameters
from pretrain.metrics.exporter import Exporter
from pretrain.metrics.meter import JsonLines, Meter, Work
from pretrain.metrics.rank_meter import RankMeter
from pretrain.metrics.server import Health
from pretrain.peers import ALONE
from pretrain.read_counts import ReadCounts
from pretrain.section_time import SectionTime
from pretrain.tasks.health import effective_rank, spread

CPU = torch.device("cpu")
SECTIONS = ("data", "transfer", "views", "teacher", "forward", "backward", "step", "teacher")
STEPS = 500  # of the bookkeeping, in a round
SCRAPE_EVERY_SECONDS = 15.0


def bookkeeping(folder: Path, exporter: Exporter) -> Callable[[], None]:
    """Of one step, on rank 0: sections, both meters, and every tenth a line in metrics.jsonl and the log."""
    meter = Meter(
        JsonLines(folder / "metrics.jsonl", 0),
        exporter,
        {f"task{number}": "accuracy" for number in range(6)},
        every_steps=10,
        num_steps=1 << 40,
        global_batch=256,
        images_per_epoch=1_281_167,
        work=Work(1e9, 1e15, "a table"),
    )
    rank_meter, sections = RankMeter(exporter, Health(60.0), CPU), SectionTime(CPU)
    values = {"total": 1.0, "grad_norm": 1.0, "lr": 1e-3, "weight_decay": 0.1, "feature_std": 0.5}
    values |= {"samples": 1.0, "bad_samples": 0.0, "storage_retries": 0.0, "backbone_calls": 1.0}
    for number in range(6):
        for name in ("loss/{}", "weight/{}", "{}/accuracy", "{}/chance"):
            values[name.format(f"task{number}")] = 1.0
    count = iter(range(1, 1 << 40))

    def step() -> None:
        number = next(count)
        for name in SECTIONS:
            sections.enter(name)
        spent = sections.finish()
        meter.record(number, values, skipped=False, seconds=0.1, wait_seconds=0.0, sections=spent)
        rank_meter.record(number, 0.1, 0.0, spent, ReadCounts(), (), {"backbone": number})

    return step


def timed(act: Callable[[], object], times: int = 1) -> float:
    """CPU seconds of this process for one call."""
    began = time.process_time()
    for _ in range(times):
        act()
    return (time.process_time() - began) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pretrain").addHandler(logging.NullHandler())
    config = configuration("engine.kind=local")
    exporter = Exporter(CollectorRegistry())
    with cluster.connected(cluster.Cluster()), tempfile.TemporaryDirectory() as folder:
        module, inputs = build.module(config, ALONE, CPU), inputs_for(config)
        shared = shared_parameters(module.backbone, "last_block")
        shape = 2 * config.batch.global_size, int(module.backbone.embed_dim)  # of two views
        features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        keep_books, step = bookkeeping(Path(folder), exporter), stepper(config)
        parts: dict[str, Callable[[], float]] = {
            "step": lambda: timed(step),
            "bookkeeping": lambda: timed(keep_books, STEPS),
            "spread": lambda: timed(lambda: spread(features, 2), 20),
            "effective_rank": lambda: timed(lambda: effective_rank(features[: len(features) // 2])),
            "gradients": lambda: timed(lambda: compare_gradients(module, inputs, shared, "fp32")),
            "scrape": lambda: timed(lambda: generate_latest(exporter.registry), 5),
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for turn in range(arguments.rounds + 1):
            for name, measure in parts.items():
                found = measure()
                if turn:  # the first warms up
                    seconds[name].append(found)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    health_every, gradients_every = config.log.health_every_steps, 500
    host_seconds = median["bookkeeping"] + median["scrape"] * median["step"] / SCRAPE_EVERY_SECONDS
    of_tensors = median["spread"] + median["effective_rank"] / health_every
    result = {
        "seconds": {name: {"median": median[name], "all": values} for name, values in seconds.items()},
        "for_each_step_seconds": {
            "bookkeeping and scrapes": host_seconds,
            "health of the features": of_tensors,
            "gradients of the tasks": median["gradients"] / gradients_every,
        },
        "share_of_this_step": (host_seconds + of_tensors) / median["step"]
        + median["gradients"] / gradients_every / median["step"],
        "shortest_step_with_0.5_percent_of_bookkeeping_seconds": host_seconds / 0.005,
        "features": list(shape),
        "note": "the step is that of configs/demo.yaml with 32 images, on one thread; gradients are those of "
        f"its six tasks, every {gradients_every} steps; a scrape every {SCRAPE_EVERY_SECONDS:g} s",
    }
    assert math.isfinite(median["step"])
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
