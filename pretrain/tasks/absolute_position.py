"""Absolute position: tell of each patch where in the view it lies."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.losses import accuracy, cross_entropy
from pretrain.peers import Peers
from pretrain.tasks import grid_relations
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskOutput, TaskSite
from pretrain.tasks.grid_relations import GridConfig, grid_tokens, labels_of, pooled_grid


class AbsolutePositionConfig(GridConfig):
    """Nothing beyond what all tasks on the grid have."""


def unsuited(config: AbsolutePositionConfig, surroundings: Surroundings) -> str | None:
    """As the other tasks on the grid, and places can be told on one size of grid only."""
    own_px = surroundings.model.img_px
    for name, view in surroundings.views.items():
        if view.size_px != own_px:
            return f"knows places in {own_px} px, but view '{name}' has {view.size_px} px; name another view"
    return grid_relations.unsuited(config, surroundings)


class AbsolutePositionTask(nn.Module):
    """Classification of the place of every patch (Camporese et al., 2022, arXiv:2206.00481).

    Metrics: `accuracy`; `chance`, 1 / N.
    """

    def __init__(self, config: AbsolutePositionConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        rows, columns = pooled_grid(site.layout.grid, config.pool)
        self.head = nn.Linear(site.embed_dim, rows * columns)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        tokens, _ = grid_tokens(views, self.config.pool)  # (M, N, D)
        logits = self.head(tokens).flatten(0, 1)  # (M * N, N)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        labels = labels_of(places, views.plan.patches.shuffled, len(tokens)).flatten()
        loss = cross_entropy(logits, labels)
        chance = loss.new_full((), 1 / len(places))
        return TaskOutput(loss, {"accuracy": accuracy(logits, labels), "chance": chance})
