"""How long training stands still for a checkpoint, and how long one takes to write. `make bench-checkpoint`.

ViT-B/16 with a teacher under DeepSpeed ZeRO-1 on one rank: weights, teacher, and both moments of AdamW, fp32.
In every round the state is copied into new memory and into the memory of the round before, then handed to the
writer, and training goes on beside it until the checkpoint is safe on disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from result import tell
from step import inputs_for
from torch import Tensor

from pretrain import build, checkpoint, cluster
from pretrain.checkpoint_writer import CheckpointConfig, CheckpointWriter, Snapshot
from pretrain.config import RunConfig, load_config
from pretrain.engine.engine import Engine
from pretrain.engine.host_memory import HostMemory
from pretrain.models.teacher import Teacher
from pretrain.optim import Knobs
from pretrain.peers import ALONE

CONFIGS = Path(__file__).parents[1] / "configs"
KNOBS = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=0.0)
MODELS = {"vit-b": ("vit_base_patch16_224", 224, 16), "vit-ti": ("vit_tiny_patch16_224", 32, 16)}


def configuration(model: str) -> RunConfig:
    name, img_px, patch_px = MODELS[model]
    return load_config(
        CONFIGS / "demo.yaml",
        [
            f"model={{name: {name}, img_px: {img_px}, patch_px: {patch_px}}}",
            *(f"views.{view}.size_px={img_px}" for view in ("one", "two")),
            *(f"tasks.{task}=null" for task in ("colorization", "inpainting", "relative_position", "jigsaw")),
            "teacher={momentum: 0.996}",
            "tasks.moco_v3={}",
            "tasks.contrastive=null",
            "tasks.rotation=null",
            "balance.kind=fixed",
            "batch.global_size=2",
            "data.lanes=1",
            "engine.precision=fp32",
            "engine.deepspeed={zero_optimization: {stage: 1}}",
        ],
    )


def gather(engine: Engine, teacher: Teacher, host: HostMemory) -> dict[str, Mapping[str, Tensor]]:
    """What a checkpoint holds, as the training loop copies it."""
    return {
        checkpoint.STUDENT: engine.weights(host),
        checkpoint.OPTIMIZER: engine.optimizer_state(host).tensors,
        checkpoint.TEACHER: {
            name: host.copy(f"teacher.{name}", value) for name, value in teacher.state_dict().items()
        },
    }


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def measure(model: str, run_dir: Path, rounds: int) -> dict[str, Any]:
    config = configuration(model)
    seconds: dict[str, list[float]] = {
        name: []
        for name in (
            "copy, new memory",
            "copy, memory of before",
            "hand over",
            "write",
            "step, quiet",
            "step, beside the writer",
        )
    }
    host, reused_bytes, num_bytes = HostMemory(), 0, 0
    writer = CheckpointWriter(run_dir, CheckpointConfig(keep_last=1), config.to_yaml(), 1)
    with cluster.connected(cluster.Cluster()):
        module = build.module(config, ALONE, torch.device("cpu"))
        teacher = module.make_teacher()
        engine = build.engine(config, module, ALONE)
        inputs = module.consult(teacher, inputs_for(config))
        no_tally = torch.zeros(0, dtype=torch.float64)

        def step() -> None:
            engine.train_step(repeat(inputs), KNOBS, lambda: no_tally)

        step()
        gather(engine, teacher, host)  # the first copy is into new memory in any case
        for number in range(1, rounds + 1):
            seconds["step, quiet"].append(timed(step)[0])
            seconds["copy, new memory"].append(timed(gather, engine, teacher, HostMemory())[0])
            copying, tensors = timed(gather, engine, teacher, host)
            seconds["copy, memory of before"].append(copying)
            snapshot = Snapshot(number, tensors, {"step": number}, {})
            num_bytes = snapshot.num_bytes
            seconds["hand over"].append(timed(writer.submit, snapshot)[0])
            del snapshot, tensors
            while not (report := writer.poll()).written:
                if report.failures:
                    raise SystemExit(f"a checkpoint was not written: {report.failures[0].reason}")
                seconds["step, beside the writer"].append(timed(step)[0])
            seconds["write"].append(report.written[0].seconds)
            reused_bytes = max(reused_bytes, host.num_bytes)
        writer.close(60.0)
    return {
        "model": MODELS[model][0],
        "checkpoint_bytes": num_bytes,
        "memory_kept_for_copies_bytes": reused_bytes,
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "highest_seconds": {name: round(max(values), 4) for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=MODELS, default="vit-b")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; by default a temporary one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measured = measure(arguments.model, Path(folder), arguments.rounds)
    median = measured["median_seconds"]
    result = {
        **measured,
        "training stands still": round(median["copy, memory of before"] + median["hand over"], 4),
        "rounds": arguments.rounds,
    }
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
