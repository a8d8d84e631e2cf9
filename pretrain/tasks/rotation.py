"""Rotation: tell by which quarter turn a view was rotated."""

from __future__ import annotations

from torch import nn

from pretrain.losses import accuracy, cross_entropy
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite

NUM_TURNS = 4


class RotationConfig(TaskConfig):
    """Nothing beyond the weight; turn the views on with `turn` in their settings."""


class RotationTask(nn.Module):
    """Four-way classification of views from the task's own token (Gidaris et al., 2018, arXiv:1803.07728).

    Metrics: `accuracy`; `chance`, 1 / 4.
    """

    def __init__(self, config: RotationConfig, site: TaskSite) -> None:
        super().__init__()
        self.head = nn.Linear(site.embed_dim, NUM_TURNS)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        logits = self.head(views.layout.task_token(views.tokens, "rotation"))  # (M, 4)
        turns = views.plan.quarter_turns
        loss = cross_entropy(logits, turns)
        return TaskOutput(
            loss, {"accuracy": accuracy(logits, turns), "chance": loss.new_full((), 1 / NUM_TURNS)}
        )
