"""A small multi-task module and its inputs, the same on every rank, for the engine tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain import build
from pretrain.config import RunConfig, validate
from pretrain.engine.engine import StepOutput
from pretrain.peers import ALONE, Peers
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs, prepare

GLOBAL_BATCH = 8

CONFIG = """{
  "model": {"name": "vit_tiny_patch16_224", "img_px": 32, "patch_px": 4,
            "args": {"depth": 2, "embed_dim": 24, "num_heads": 2}},
  "data": {"shards": "unused", "lanes": 2},
  "views": {"one": {"size_px": 32, "turn": true, "gray_prob": 0.5},
            "two": {"size_px": 32, "turn": true, "gray_prob": 0.5}},
  "tasks": {"contrastive": {"hidden_dim": 32, "out_dim": 16}, "rotation": {},
            "clustering": {"hidden_dim": 32, "out_dim": 16, "num_prototypes": 5}, "colorization": {},
            "inpainting": {}, "relative_position": {"hidden_dim": 32}, "jigsaw": {}},
  "optim": {"clip_norm": 0.0},
  "schedule": {"steps": 10},
  "batch": {"global_size": 16, "accumulation_steps": 2}
}"""


def config() -> RunConfig:
    return validate(CONFIG, "test")


def module(peers: Peers = ALONE) -> MultiTask:
    return build.module(config(), peers, torch.device("cpu"))


def inputs(step: int, peers: Peers = ALONE) -> Iterator[Inputs]:
    """This rank's share of the two micro steps of a step."""
    own = slice(
        peers.rank * GLOBAL_BATCH // peers.world_size, (peers.rank + 1) * GLOBAL_BATCH // peers.world_size
    )
    for micro in range(2):
        generator = torch.Generator().manual_seed(10 * step + micro)
        crops = torch.randint(0, 256, (2, GLOBAL_BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
        ids = torch.arange(GLOBAL_BATCH) + GLOBAL_BATCH * (2 * step + micro)
        yield prepare(
            build.recipe(config()), 0, crops[:, own], torch.zeros(GLOBAL_BATCH).long()[own], ids[own]
        )


def tally() -> Tensor:
    return torch.ones(1, dtype=torch.float64)


def losses(output: StepOutput) -> dict[str, float]:
    return {
        name: value for name, value in output.values.items() if name == "total" or name.startswith("loss/")
    }
