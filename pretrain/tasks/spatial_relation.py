"""Spatial relation: tell where each patch lies as seen from each other one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.losses import accuracy, cross_entropy
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskOutput, TaskSite
from pretrain.tasks.grid_relations import (
    PairConfig,
    PairHead,
    grid_tokens,
    labels_of,
    labels_on,
    spatial_relations,
)

NUM_RELATIONS = 9


class SpatialRelationConfig(PairConfig):
    """Nothing beyond what all tasks on pairs have."""


class SpatialRelationTask(nn.Module):
    """Nine-way classification of all ordered pairs of patches (Camporese et al., 2022, arXiv:2206.00481).

    Made for backbones without positions, model.pos_embed: none; from positions the answer can be read.
    Metrics: `accuracy`; `chance`, that of the best constant answer; `uninformed`, the best of a model
    that can only find out whether the two patches are the same.
    """

    def __init__(self, config: SpatialRelationConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.head = PairHead(site.embed_dim, NUM_RELATIONS, config.bilinear_full)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        tokens, grid = grid_tokens(views, self.config.pool)
        table = labels_on(tokens.device, spatial_relations, grid)  # (N, N)
        labels = labels_of(table, views.plan.patches.shuffled, len(tokens))  # (M, N, N)
        logits = self.head(tokens)  # (M, 9, N, N)
        loss = cross_entropy(logits, labels)
        chance, uninformed = guesses(table)
        metrics = {"accuracy": accuracy(logits, labels), "chance": chance, "uninformed": uninformed}
        return TaskOutput(loss, metrics)


def guesses(table: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy of the best answer for all pairs, and of the best for pairs of the same patch and of two
    patches each. table: int64 (N, N) -> (), ()"""
    relations = torch.arange(NUM_RELATIONS, device=table.device)
    frequency = (table.unsqueeze(2) == relations).float().mean(dim=(0, 1))  # a bincount has a GPU waited for
    same = 1 / len(table)  # the relation 4, which no two patches have
    return frequency.max(), frequency.index_fill(0, table[0, :1], 0.0).max() + same
