"""MoCo v2: tell the teacher's key of the other view from a queue of earlier keys."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import embedding_std, queue_cross_entropy, unit_length
from pretrain.models.heads import mlp
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite


class MocoV2Config(TaskConfig):
    temperature: Annotated[float, Field(gt=0)] = 0.2
    out_dim: Annotated[int, Field(gt=0)] = 128  # of the space in which embeddings are compared
    queue_length: Annotated[int, Field(gt=0)] = 65536  # earlier keys; a multiple of the keys of a micro step
    symmetric: bool = False  # also from the second view to the first; the losses of both directions add up


def unsuited(config: MocoV2Config, surroundings: Surroundings) -> str | None:
    return refuse_queue(config.queue_length, surroundings.batch_size * (1 + config.symmetric))


def refuse_queue(length: int, num_keys: int) -> str | None:
    """Keys of a micro step take the place of as many old ones, so they must divide the queue."""
    if not num_keys or length % num_keys == 0:
        return None
    below = max(1, length // num_keys) * num_keys
    return (
        f"queue_length {length} is not a multiple of the {num_keys} keys of a micro step; "
        f"use {below} or {below + num_keys}, or change the batch"
    )


class KeyQueue(nn.Module):
    """The latest K keys of all ranks, the same on every rank.

    Starts with random directions from a generator of its own.
    """

    keys: Tensor  # (K, d) float32, unit length
    pointer: Tensor  # int64 (1,): where the next key goes, over the oldest

    def __init__(self, length: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        start = torch.randn(length, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("keys", F.normalize(start, dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put in keys of all ranks, (B_g, d), of unit length, in the place of the oldest."""
        length = len(self.keys)
        reason = refuse_queue(length, len(keys))
        if reason:
            raise ValueError(reason)
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % length
        self.keys.index_copy_(0, places, keys.to(self.keys.dtype))
        self.pointer.copy_((self.pointer + len(keys)) % length)


class MocoV2Task(nn.Module):
    """Momentum contrast with a queue (He et al., 2019, arXiv:1911.05722, and Chen et al., 2020,
    arXiv:2003.04297).

    Queries are of the first view, keys of the second; these enter the queue after the loss of a micro step.
    Metrics: `accuracy`, how often the own key is nearer than all of the queue; `chance`, 1 / (K + 1); and
    `embedding_std` of the keys, about 1 / sqrt(out_dim) when healthy and 0 in a collapse.
    """

    def __init__(self, config: MocoV2Config, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp([site.embed_dim, site.embed_dim, config.out_dim], activation=nn.ReLU)
        self.queue = KeyQueue(config.queue_length, config.out_dim)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        assert views.teacher is not None
        projected = views.teacher.heads["moco_v2"]
        first, second = views.names[0], list(projected)[-1]
        directions = [(first, second), (second, first)] if self.config.symmetric else [(first, second)]
        found, earlier = [], self.queue.keys.clone()  # the backward pass reads it after new keys have entered
        for of_query, of_key in directions:
            queries = self.projector(views.of_view(views.features, of_query))
            keys = projected[of_key]
            found.append(queue_cross_entropy(queries, keys, earlier, self.config.temperature))
        keys = torch.stack([unit_length(projected[of_key]) for _, of_key in directions])  # (1 or 2, B, d)
        if self.training:
            self.queue.enqueue(torch.cat([peers.gather(of_view) for of_view in keys]))
        losses, accuracies = zip(*found, strict=True)
        metrics = {
            "accuracy": torch.stack(accuracies).mean(),
            "chance": accuracies[0].new_full((), 1 / (1 + self.config.queue_length)),
            "embedding_std": embedding_std(keys.flatten(0, 1), peers),
        }
        return TaskOutput(torch.stack(losses).sum(), metrics)


def teacher_views(config: MocoV2Config, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that keys are of."""
    return names if config.symmetric else names[1:]


def student_views(config: MocoV2Config, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that queries are of."""
    return names if config.symmetric else names[:1]
