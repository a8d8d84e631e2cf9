"""Clustering: predict from one view the cluster that the other view is assigned to."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import cross_entropy, fp32, sinkhorn
from pretrain.models.heads import projection_head
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite


class ClusteringConfig(TaskConfig):
    num_prototypes: Annotated[int, Field(ge=2)] = 3000  # 300 suits data sets as small as CIFAR
    temperature: Annotated[float, Field(gt=0)] = 0.1
    epsilon: Annotated[float, Field(ge=0.02)] = (
        0.05  # softness of the targets; exp(1 / epsilon) must fit float32
    )
    iterations: Annotated[int, Field(gt=0)] = 3  # of Sinkhorn
    hidden_dim: Annotated[int, Field(gt=0)] = 2048  # of the projection head
    out_dim: Annotated[int, Field(gt=0)] = 128  # of the space that holds the prototypes


@fp32
def cosines(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """(M, d), (K, d) -> (M, K)"""
    return F.normalize(embeddings, dim=1) @ F.normalize(prototypes, dim=1).T


@torch.no_grad()
def agreement(scores: Tensor, peers: Peers) -> tuple[Tensor, Tensor]:
    """How often the two views of one image have the same best prototype, and how often those of two different
    images have. scores: (2, B, K) -> (), ()

    Counted over the global batch, because prototypes that nobody on this rank uses would flatter the second
    number. Both are 1 when all images share one prototype.
    """
    best = scores.argmax(dim=2)  # (2, B)
    local_usage = F.one_hot(best, scores.shape[2]).sum(dim=1).float()  # (2, K)
    local_matches = (best[0] == best[1]).sum().float()
    counts = peers.sum(torch.cat([local_usage.flatten(), local_matches.reshape(1)]))
    usage, matches = counts[:-1].reshape(2, -1), counts[-1]
    num_images = scores.shape[1] * peers.world_size
    same_by_chance = (usage[0] * usage[1]).sum() - matches  # among ordered pairs of different images
    return matches / num_images, same_by_chance / max(1, num_images * (num_images - 1))


class Prototypes(nn.Module):
    """K directions. A module of its own: ZeRO-3 gathers parameters where a module takes and gives tensors."""

    def __init__(self, num_prototypes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_prototypes, dim))  # normalised when used

    def forward(self, rows: Tensor) -> Tensor:
        """(M, D) -> (M, K) cosines"""
        return cosines(rows, self.weight)


class ClusteringTask(nn.Module):
    """Swapped prediction with online balanced assignments: SwAV (Caron et al., 2020, arXiv:2006.09882).

    Reads its own token. Metrics: `agreement`, how often both views of an image have the same best prototype;
    `chance`, how often the views of two different images have.
    """

    def __init__(self, config: ClusteringConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.head = projection_head(site.embed_dim, config.hidden_dim, config.out_dim, num_layers=2)
        self.prototypes = Prototypes(config.num_prototypes, config.out_dim)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        config = self.config
        rows = views.layout.task_token(views.tokens, "clustering")  # (2B, D)
        cosine = self.prototypes(self.head(rows))  # (2B, K)
        scores = cosine.reshape(2, -1, config.num_prototypes)  # (2, B, K)
        targets = sinkhorn(scores, config.epsilon, config.iterations, peers)  # (2, B, K)
        loss = cross_entropy(scores.flatten(0, 1) / config.temperature, targets.flip(0).flatten(0, 1))
        agree, chance = agreement(scores, peers)
        return TaskOutput(loss, {"agreement": agree, "chance": chance})
