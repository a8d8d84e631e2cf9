"""MoBY: MoCo's queues with BYOL's predictor."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from pretrain.losses import embedding_std, queue_cross_entropy, unit_length
from pretrain.models.heads import per_view, projection_head
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite
from pretrain.tasks.moco_v2 import KeyQueue, refuse_queue


class MobyConfig(TaskConfig):
    temperature: Annotated[float, Field(gt=0)] = 0.2
    hidden_dim: Annotated[int, Field(gt=0)] = 4096  # of projector and predictor
    out_dim: Annotated[int, Field(gt=0)] = 256  # of the space in which embeddings are compared
    queue_length: Annotated[int, Field(gt=0)] = 4096  # of each; a multiple of the images of a micro step


def unsuited(config: MobyConfig, surroundings: Surroundings) -> str | None:
    return refuse_queue(config.queue_length, surroundings.batch_size)


class MobyTask(nn.Module):
    """Self-supervised learning with Swin Transformers (Xie et al., 2021, arXiv:2105.04553, eq. 1): each view
    predicts the teacher's key of the other, among a queue of earlier keys of that other view; the losses of
    both directions add up.

    Metrics: `accuracy`, how often the own key is nearer than all of the queue; `chance`, 1 / (K + 1); and
    `embedding_std` of the keys, about 1 / sqrt(out_dim) when healthy and 0 in a collapse.
    """

    def __init__(self, config: MobyConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.projector = projection_head(site.embed_dim, config.hidden_dim, config.out_dim, num_layers=2)
        self.predictor = projection_head(config.out_dim, config.hidden_dim, config.out_dim, num_layers=2)
        self.first_queue = KeyQueue(config.queue_length, config.out_dim, seed=0)  # keys of the first view
        self.second_queue = KeyQueue(config.queue_length, config.out_dim, seed=1)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        assert views.teacher is not None
        projected = views.teacher.heads["moby"]
        keys = torch.stack([unit_length(projected[name]) for name in views.names])  # (2, B, d)
        embeddings = per_view(self.projector, views.features, 2)
        predictions = per_view(self.predictor, embeddings, 2).reshape(keys.shape)
        temperature, queues = self.config.temperature, (self.first_queue, self.second_queue)
        found = [
            # a copy of the queue, because the backward pass reads it after new keys have entered
            queue_cross_entropy(predictions[place], keys[other], queues[other].keys.clone(), temperature)
            for place, other in ((0, 1), (1, 0))
        ]
        if self.training:
            for queue, of_view in zip(queues, keys, strict=True):
                queue.enqueue(peers.gather(of_view))
        losses, accuracies = zip(*found, strict=True)
        metrics = {
            "accuracy": torch.stack(accuracies).mean(),
            "chance": accuracies[0].new_full((), 1 / (1 + self.config.queue_length)),
            "embedding_std": embedding_std(keys.flatten(0, 1), peers),
        }
        return TaskOutput(torch.stack(losses).sum(), metrics)


def teacher_views(config: MobyConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Both."""
    return names
