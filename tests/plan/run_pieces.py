"""The trained module of a config and inputs for it, without shards: for the tests of what a plan predicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain import build
from pretrain.config import RunConfig
from pretrain.models.teacher import Teacher
from pretrain.peers import ALONE
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs, Moment, prepare, with_labels

NUM_SAMPLES = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pieces:
    module: MultiTask
    teacher: Teacher | None
    inputs: Inputs  # of one micro step


def pieces_of(config: RunConfig, micro_step: int = 0) -> Pieces:
    """With images of random pixels."""
    module = build.module(config, ALONE, CPU, NUM_SAMPLES).train()
    teacher = module.make_teacher() if config.teacher else None
    return Pieces(module, teacher, inputs_of(config, micro_step))


def inputs_of(config: RunConfig, micro_step: int = 0) -> Inputs:
    recipe, size = build.recipe(config), build.micro_step_batch(config)
    sides_px = [view.size_px for view in recipe.views.values()]
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randint(0, 256, (sides_px.count(px), size, px, px, 3), dtype=torch.uint8, generator=generator)
        for px in dict.fromkeys(sides_px)
    ]
    ids = torch.arange(size)
    inputs = prepare(recipe, 0, crops, torch.zeros_like(ids), ids, micro_step)
    return with_labels(inputs, torch.zeros_like(ids), Moment(step=1, epoch=0.5))
