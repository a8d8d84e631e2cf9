"""This project's training step on a batch of real images, as the benchmarks take it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from pretrain import build
from pretrain.check import check
from pretrain.config import RunConfig, load_config
from pretrain.data.loader import Batch, DataConfig, open_batches
from pretrain.data.manifest import Manifest
from pretrain.optim import Knobs
from pretrain.peers import ALONE, Peers
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs, Moment, prepare, with_labels
from steps.turns import Step

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
KNOBS = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=5.0)
MOMENT = Moment(step=50, num_steps=1000, epoch=5.0)
PLAIN = ["engine.precision=fp32", "data.lanes=1"]
LOCAL = [*PLAIN, "engine.kind=local"]
OTHER_TASKS = ("rotation", "colorization", "inpainting", "relative_position", "jigsaw")
CONTRASTIVE_ONLY = [f"tasks.{name}=null" for name in OTHER_TASKS]


@dataclass(frozen=True)
class Setting:
    """What every table is told."""

    shards: Path  # a folder of shards with an index
    rounds: int | None = None  # in place of a table's own number
    toy: bool = False  # networks of no use, to try the program

    def rounds_or(self, number: int) -> int:
        return self.rounds or number

    def model(self, img_px: int, patch_px: int, name: str = "vit_small_patch16_224", args: str = "") -> str:
        """The override that asks for a network; of one narrow block where this is only to try."""
        if self.toy:
            img_px, patch_px, args = 32, 8, "depth: 1, embed_dim: 48, num_heads: 2"
        return f"model={{name: {name}, img_px: {img_px}, patch_px: {patch_px}, args: {{{args}}}}}"

    def view_px(self, size_px: int) -> int:
        return 32 if self.toy else size_px

    def batch(self, size: int) -> str:
        return f"batch.global_size={4 if self.toy else size}"


def configuration(path: str, *overrides: str) -> RunConfig:
    """A shipped configuration, changed, and checked as `pretrain train` checks it."""
    config = load_config(CONFIGS / path, list(overrides))
    check(config, world_size=1)
    return config


def real_batch(config: RunConfig, shards: Path) -> Batch:
    """The first batch that a run on these shards would see; its own memory."""
    split = Manifest.load(shards).split("train")
    data = DataConfig(shards=str(shards), lanes=1, decode_threads=0)
    views, size = list(config.views.values()), config.batch.global_size
    batches = open_batches(data, [split], views, seed=0, batch_size=size)
    try:
        batch = next(iter(batches))
        crops = tuple(of_size.clone() for of_size in batch.crops)
        return Batch(crops, batch.sample_ids.clone(), batch.epochs.clone(), batch.labels.clone())
    finally:
        batches.close()


def inputs_for(config: RunConfig, shards: Path) -> Inputs:
    """The same, finished for the network."""
    batch = real_batch(config, shards)
    inputs = prepare(build.recipe(config), 0, batch.crops, batch.epochs, batch.sample_ids)
    return with_labels(inputs, batch.labels, MOMENT)


def training_step(
    config: RunConfig, inputs: Inputs, peers: Peers = ALONE, module: MultiTask | None = None
) -> Step:
    """A step on inputs that are ready: teacher, forward, backward, optimizer, the teacher's average."""
    model = module or build.module(config, peers, torch.device("cpu"), len(inputs.sample_ids))
    teacher = model.make_teacher() if config.teacher else None
    engine = build.engine(config, model, peers, teacher)
    no_tally = torch.zeros(0, dtype=torch.float64)

    def student() -> Iterator[tuple[str, Tensor]]:
        assert teacher is not None
        for part in teacher.parts:
            for name, value in engine.student(model.get_submodule(part)):
                yield f"{part}.{name}", value

    def step() -> None:
        seen = model.consult(teacher, inputs) if teacher else inputs
        engine.train_step(repeat(seen), KNOBS, lambda: no_tally).read()
        if teacher:
            teacher.update(student(), 0.99)

    return step
