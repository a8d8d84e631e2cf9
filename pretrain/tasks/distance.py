"""Distance: tell how far apart the patches of each pair are."""

from __future__ import annotations

from torch import nn

from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskOutput, TaskSite
from pretrain.tasks.grid_relations import (
    PairConfig,
    PairHead,
    distances,
    grid_tokens,
    labels_on,
    regress_pairs,
)


class DistanceConfig(PairConfig):
    """Nothing beyond what all tasks on pairs have."""


class DistanceTask(nn.Module):
    """Regression of the distance of all pairs of patches (Camporese et al., 2022, arXiv:2206.00481).

    Metrics: `error_x100`, a hundred times the mean squared error; `chance`, that of the best constant.
    """

    def __init__(self, config: DistanceConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.head = PairHead(site.embed_dim, 1, config.bilinear_full)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        tokens, grid = grid_tokens(views, self.config.pool)
        table = labels_on(tokens.device, distances, grid)  # (N, N) in [-1, 1]
        return regress_pairs(self.head(tokens), table, views.plan.patches.shuffled)
