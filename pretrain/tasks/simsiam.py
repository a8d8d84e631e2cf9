"""SimSiam: predict from one view the embedding of the other, which gets no gradient."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from pretrain.losses import embedding_std, mean_cosine, mean_cosine_of_strangers
from pretrain.models.heads import per_view, projection_head
from pretrain.optim import ParameterRule
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite


class SimSiamConfig(TaskConfig):
    out_dim: Annotated[int, Field(gt=0)] = 2048  # of the space in which embeddings are compared
    projector_dim: Annotated[int, Field(gt=0)] | None = None  # of hidden layers; None: the backbone's width
    predictor_dim: Annotated[int, Field(gt=0)] = 512  # of its hidden layer
    constant_predictor_lr: bool = True  # the predictor's learning rate does not follow the schedule


class SimSiamTask(nn.Module):
    """Simple siamese network (Chen and He, 2020, arXiv:2011.10566, eq. 4): 1 - cos, averaged over both
    directions; from 0 to 2, about 1 at random. The paper's loss is -cos; the 1 keeps a learned balance of
    losses from running away and changes no gradient.

    Metrics: `cosine` of predictions and targets; `chance`, the same between different images; and
    `embedding_std` of the targets, about 1 / sqrt(out_dim) when healthy. In a collapse the first two are 1
    and the last is 0.
    """

    def __init__(self, config: SimSiamConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        hidden_dim = config.projector_dim or site.embed_dim
        self.projector = projection_head(site.embed_dim, hidden_dim, config.out_dim, last_norm=True)
        self.predictor = projection_head(config.out_dim, config.predictor_dim, config.out_dim, num_layers=2)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        embeddings = per_view(self.projector, views.features, 2)  # (2B, d)
        targets = torch.stack(embeddings.detach().chunk(2)[::-1])  # (2, B, d): of the other view
        predictions = per_view(self.predictor, embeddings, 2).reshape(targets.shape)
        cosine = mean_cosine(predictions.flatten(0, 1), targets.flatten(0, 1))
        metrics = {
            "cosine": cosine.detach(),
            "chance": mean_cosine_of_strangers(predictions, targets, peers),
            "embedding_std": embedding_std(targets.flatten(0, 1), peers),
        }
        return TaskOutput(1 - cosine, metrics)

    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        return (ParameterRule("predictor.", constant_lr=True),) if self.config.constant_predictor_lr else ()
