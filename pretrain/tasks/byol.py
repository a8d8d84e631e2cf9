"""BYOL: predict from one view the embedding that the averaged teacher gives the other."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from pretrain.losses import embedding_std, mean_cosine, mean_cosine_of_strangers
from pretrain.models.heads import per_view, projection_head
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite


class ByolConfig(TaskConfig):
    hidden_dim: Annotated[int, Field(gt=0)] = 4096  # of projector and predictor
    out_dim: Annotated[int, Field(gt=0)] = 256  # of the space in which embeddings are compared


class ByolTask(nn.Module):
    """Bootstrap your own latent (Grill et al., 2020, arXiv:2006.07733, eq. 2): squared distance between unit
    vectors, 2 - 2 cos, summed over both directions; from 0 to 8, about 4 at random.

    Metrics: `cosine` of predictions and targets; `chance`, the same between different images; and
    `embedding_std` of the targets, about 1 / sqrt(out_dim) when healthy. In a collapse the first two are 1
    and the last is 0.
    """

    def __init__(self, config: ByolConfig, site: TaskSite) -> None:
        super().__init__()
        dims = (config.hidden_dim, config.out_dim)
        # two layers each, the last without bias, as in the release
        self.projector = projection_head(site.embed_dim, *dims, num_layers=2, bias=False)
        self.predictor = projection_head(config.out_dim, *dims, num_layers=2, bias=False)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        assert views.teacher is not None
        first, second = views.names
        projected = views.teacher.heads["byol"]
        targets = torch.stack([projected[second], projected[first]])  # (2, B, d): of the other view
        embeddings = per_view(self.projector, views.features, 2)
        predictions = per_view(self.predictor, embeddings, 2).reshape(targets.shape)
        cosine = mean_cosine(predictions.flatten(0, 1), targets.flatten(0, 1))
        metrics = {
            "cosine": cosine.detach(),
            "chance": mean_cosine_of_strangers(predictions, targets, peers),
            "embedding_std": embedding_std(targets.flatten(0, 1), peers),
        }
        return TaskOutput(2 * (2 - 2 * cosine), metrics)


def teacher_views(config: ByolConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Both."""
    return names
