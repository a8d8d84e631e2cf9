"""MoCo v3: tell the teacher's key of the other view from those of all other images of the global batch."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from pretrain.losses import embedding_std, info_nce
from pretrain.models.heads import per_view, projection_head
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite


class MocoV3Config(TaskConfig):
    temperature: Annotated[float, Field(gt=0)] = 0.2
    hidden_dim: Annotated[int, Field(gt=0)] = 4096  # of projector and predictor
    out_dim: Annotated[int, Field(gt=0)] = 256  # of the space in which embeddings are compared
    num_layers: Annotated[int, Field(gt=0)] = 3  # of the projector; the predictor has two
    predictor: bool = True  # false: compare the projections themselves, as in the last version of SiT


class MocoV3Task(nn.Module):
    """Momentum contrast without a queue (Chen, Xie and He, 2021, arXiv:2104.02057, algorithm 1): InfoNCE
    times twice the temperature, summed over both directions.

    Metrics: `accuracy`, how often the own key is the nearest; `chance`, 1 / B_g; and `embedding_std` of the
    keys, about 1 / sqrt(out_dim) when healthy and 0 in a collapse.
    """

    def __init__(self, config: MocoV3Config, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        dims = (config.hidden_dim, config.out_dim)
        self.projector = projection_head(site.embed_dim, *dims, config.num_layers, bias=False, last_norm=True)
        self.predictor = None
        if config.predictor:
            self.predictor = projection_head(config.out_dim, *dims, num_layers=2, bias=False, last_norm=True)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        assert views.teacher is not None
        projected = views.teacher.heads["moco_v3"]
        keys = torch.stack([projected[name] for name in views.names])  # (2, B, d)
        queries = per_view(self.projector, views.features, 2)
        if self.predictor is not None:
            queries = per_view(self.predictor, queries, 2)
        temperature = self.config.temperature
        found = [
            info_nce(of_view, of_other, temperature, peers)
            for of_view, of_other in zip(queries.chunk(2), keys.flip(0), strict=True)
        ]
        losses, accuracies = zip(*found, strict=True)
        metrics = {
            "accuracy": torch.stack(accuracies).mean(),
            "chance": accuracies[0].new_full((), 1 / (keys.shape[1] * peers.world_size)),
            "embedding_std": embedding_std(keys.flatten(0, 1), peers),
        }
        return TaskOutput(2 * temperature * torch.stack(losses).sum(), metrics)


def teacher_views(config: MocoV3Config, names: tuple[str, ...]) -> tuple[str, ...]:
    """Both."""
    return names
