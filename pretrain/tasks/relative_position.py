"""Relative position: tell in which of eight directions one patch lies from another."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from pretrain.losses import accuracy, cross_entropy
from pretrain.models.heads import mlp
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite
from pretrain.tokens import take
from pretrain.views.corrupt import relative_position_label

NUM_DIRECTIONS = 8


class RelativePositionConfig(TaskConfig):
    # Pairs per patch of the grid. A lone pair can be placed from the gap it leaves in the positions of the
    # others, so the default gives four and more from 64 patches up. It is below 1/16 so that the defaults of
    # all tasks, each rounded, stay within half of the patches on any grid.
    pair_ratio: Annotated[float, Field(gt=0, le=0.5)] = 0.059
    mode: Literal["neighbor", "any"] = "neighbor"  # the two patches touch, or lie anywhere
    # What the patches of a pair get as positional embedding: their own, from which alone the label can be
    # read, or one learned vector for all.
    pos_embed: Literal["keep", "mask"] = "mask"
    hidden_dim: Annotated[int, Field(gt=0)] = 512  # of the head


def patch_request(config: RelativePositionConfig, num_patches: int) -> dict[str, int | bool | str]:
    """What the plan must draw for this task, as fields of PatchConfig."""
    return {"pairs": max(1, round(config.pair_ratio * num_patches)), "pair_mode": config.mode}


class RelativePositionTask(nn.Module):
    """Eight-way classification of pairs, each in both orders (task: Doersch et al., 2015, arXiv:1505.05192).

    Metrics: `accuracy`; `chance`, 1 / 8.
    """

    def __init__(self, config: RelativePositionConfig, site: TaskSite) -> None:
        super().__init__()
        self.head = mlp([2 * site.embed_dim, config.hidden_dim, NUM_DIRECTIONS])

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        pairs = views.plan.patches.pairs  # (M, R, 2)
        pairs = torch.cat([pairs, pairs.flip(2)], dim=1)  # (M, 2R, 2): (i, j) and (j, i)
        tokens = take(views.layout.patches(views.tokens), pairs.flatten(1))  # (M, 4R, D)
        joined = tokens.reshape(*pairs.shape[:2], -1)  # (M, 2R, 2D)
        logits = self.head(joined).flatten(0, 1)  # (M * 2R, 8)
        labels = relative_position_label(pairs[..., 0], pairs[..., 1], views.layout.grid[1]).flatten()
        loss = cross_entropy(logits, labels)
        metrics = {"accuracy": accuracy(logits, labels), "chance": loss.new_full((), 1 / NUM_DIRECTIONS)}
        return TaskOutput(loss, metrics)
