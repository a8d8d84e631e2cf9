"""Contrastive: tell an image's other view from all other images of the global batch."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import nn

from pretrain.losses import nt_xent
from pretrain.models.heads import projection_head
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite
from pretrain.tasks.view_pair import view_pair


class ContrastiveConfig(TaskConfig):
    views: tuple[str, str] | None = None  # names of the two views; the first two if not given
    temperature: Annotated[float, Field(gt=0)] = 0.2
    hidden_dim: Annotated[int, Field(gt=0)] = 2048  # of the projection head
    out_dim: Annotated[int, Field(gt=0)] = 128  # of the space in which embeddings are compared


class ContrastiveTask(nn.Module):
    """NT-Xent on the class token (Chen et al., 2020, arXiv:2002.05709).

    Metrics: `accuracy`, how often the positive is the nearest; `chance`, 1 / (2 B_g - 1); and
    `mutual_information`, the lower bound ln(2 B_g - 1) - loss in nats (van den Oord et al., 2018,
    arXiv:1807.03748), which cannot exceed its first term.
    """

    def __init__(self, config: ContrastiveConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.head = projection_head(site.embed_dim, config.hidden_dim, config.out_dim)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        class_tokens = view_pair(views.layout.class_token(views.tokens), views, self.config.views)  # (2B, D)
        loss, accuracy = nt_xent(self.head(class_tokens), self.config.temperature, peers)
        num_candidates = len(class_tokens) * peers.world_size - 1
        metrics = {
            "accuracy": accuracy,
            "chance": loss.new_full((), 1 / num_candidates),
            "mutual_information": math.log(num_candidates) - loss.detach(),
        }
        return TaskOutput(loss, metrics)
