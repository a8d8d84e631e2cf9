"""Contrastive: tell an image's other view from all other images of the batch."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import nn

from pretrain.losses import nt_xent
from pretrain.models.heads import projection_head
from pretrain.peers import ALONE, Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite


class ContrastiveConfig(TaskConfig):
    """The loss is the mean over anchors; SimCLR's release adds the means over the anchors of either view,
    which `weight: 2` gives."""

    temperature: Annotated[float, Field(gt=0)] = 0.2
    hidden_dim: Annotated[int, Field(gt=0)] = 2048  # of the projection head
    out_dim: Annotated[int, Field(gt=0)] = 128  # of the space in which embeddings are compared
    num_layers: Annotated[int, Field(gt=0)] = 3  # of the head; 1 is a plain linear layer, as in SiT
    last_norm: bool = False  # batch norm (without scale and shift) after the last layer too, as in SimCLR
    gather: bool = True  # compare with the images of all ranks; false: with those of this rank, as in SiT


class ContrastiveTask(nn.Module):
    """NT-Xent on the image feature (Chen et al., 2020, arXiv:2002.05709).

    With B images compared on all ranks together (on this one, without `gather`), the metrics are `accuracy`,
    how often the positive is the nearest; `chance`, 1 / (2 B - 1); and `mutual_information`, the lower bound
    ln(2 B - 1) - loss in nats (van den Oord et al., 2018, arXiv:1807.03748), which cannot exceed its first
    term.
    """

    def __init__(self, config: ContrastiveConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.head = projection_head(
            site.embed_dim, config.hidden_dim, config.out_dim, config.num_layers, last_norm=config.last_norm
        )

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        compared = peers if self.config.gather else ALONE
        loss, accuracy = nt_xent(self.head(views.features), self.config.temperature, compared)
        num_candidates = len(views.tokens) * compared.world_size - 1
        metrics = {
            "accuracy": accuracy,
            "chance": loss.new_full((), 1 / num_candidates),
            "mutual_information": math.log(num_candidates) - loss.detach(),
        }
        return TaskOutput(loss, metrics)
