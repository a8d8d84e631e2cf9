"""Exemplar: every image is a class of its own; tell which image a view is of."""

from __future__ import annotations

from torch import nn

from pretrain.errors import ConfigError
from pretrain.losses import accuracy, cross_entropy
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite

MAX_CLASSES = 100_000  # above, the layer outweighs the backbone


class ExemplarConfig(TaskConfig):
    """Nothing beyond the weight and the views."""


def unsuited(config: ExemplarConfig, surroundings: Surroundings) -> str | None:
    """Where the number of images is not known yet, it is asked again when the task is made."""
    return None if surroundings.num_samples is None else _too_many(surroundings.num_samples)


def _too_many(num_samples: int) -> str | None:
    if not num_samples:
        return "has a class for every image, but how many there are is not known; use contrastive"
    if num_samples > MAX_CLASSES:
        return f"has a class for every image, at most {MAX_CLASSES}, not {num_samples}; use contrastive"
    return None


class ExemplarTask(nn.Module):
    """Softmax classification of the image (Dosovitskiy et al., 2014, arXiv:1406.6909).

    Metrics: `accuracy`; `chance`, 1 over the number of images.
    """

    def __init__(self, config: ExemplarConfig, site: TaskSite) -> None:
        super().__init__()
        reason = _too_many(site.num_samples)
        if reason:
            raise ConfigError(f"tasks.exemplar: {reason}")
        self.head = nn.Linear(site.embed_dim, site.num_samples)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        assert views.sample_ids is not None
        logits = self.head(views.features)  # (M, num_samples)
        labels = views.sample_ids.repeat(len(views.names))
        loss = cross_entropy(logits, labels)
        chance = loss.new_full((), 1 / logits.shape[1])
        return TaskOutput(loss, {"accuracy": accuracy(logits, labels), "chance": chance})
