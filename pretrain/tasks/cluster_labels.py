"""Cluster labels: tell the cluster that an image was put into when all features were last clustered."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.losses import fp32, global_mean
from pretrain.models.clusters import normalized_mutual_information, size_metrics
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite

INITIAL_STD = 0.01  # of the classifier's weights


class ClusterLabelsConfig(TaskConfig):
    num_clusters: Annotated[int, Field(ge=2)] = 10_000  # about ten times the classes that one would name
    every_epochs: Annotated[int, Field(gt=0)] = 1  # how long an assignment is kept
    pca_dim: Annotated[int, Field(gt=0)] = 256  # of the features that are clustered
    iterations: Annotated[int, Field(gt=0)] = 20  # of k-means
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0  # of k-means and of the classifiers


def unsuited(config: ClusterLabelsConfig, surroundings: Surroundings) -> str | None:
    """Where the number of images is not known yet, it is asked again when the task is made."""
    num_samples = surroundings.num_samples
    return None if num_samples is None else _too_few(config, num_samples)


def _too_few(config: ClusterLabelsConfig, num_samples: int) -> str | None:
    if num_samples < config.num_clusters:
        known = f"{num_samples} images" if num_samples else "an unknown number of images"
        return f"cannot fill {config.num_clusters} clusters with {known}; lower num_clusters"
    return None


@fp32
def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over rows; logits (M, K), labels int64 (M,), -1 for none, weights (M,) -> ()"""
    return (F.cross_entropy(logits, labels, ignore_index=-1, reduction="none") * weights).sum()


class ClusterLabelsTask(nn.Module):
    """Alternating clustering and classification: DeepCluster (Caron et al., 2018, arXiv:1807.05520).

    The training loop clusters: where `due(epoch)` holds, it takes the features of all images, each from a
    plain centre crop, clusters them (`models.clusters`) and calls `assign` with the labels on all ranks.

    The paper draws images uniformly over clusters. Here images come in the order of the data, and an image of
    a cluster of n among K non-empty ones and N images weighs N / (K n). That is the same in expectation:
    sum_i 1/N * N / (K n_i) * loss_i = 1/K * sum over clusters of the mean loss in the cluster. The classifier
    is trained by the run's optimizer, which keeps its moments when the weights are drawn anew; after some ten
    steps nothing is left of the mean, after some thousand of the square.

    Images without a label are skipped; the head runs all the same, so its gradient exists (as zeros).
    Metrics: `accuracy`; `chance`, that of naming the largest cluster always; `used` and `evenness` of the
    clusters, which fall as features collapse; `stability`, the mutual information of the last two
    assignments, normalised to 0..1.
    """

    assignments: Tensor  # int64 (num_samples,): the cluster of each image, -1 before the first assignment
    sizes: Tensor  # int64 (K,): images of each cluster
    assigned_epoch: Tensor  # int64 (): when; -1 before the first
    stability: Tensor  # float32 ()

    def __init__(self, config: ClusterLabelsConfig, site: TaskSite) -> None:
        super().__init__()
        reason = _too_few(config, site.num_samples)
        if reason:
            raise ConfigError(f"tasks.cluster_labels: {reason}")
        self.config = config
        self.embed_dim = site.embed_dim
        self.head = nn.Linear(site.embed_dim, config.num_clusters)
        self.register_buffer("assignments", torch.full((site.num_samples,), -1))
        self.register_buffer("sizes", torch.zeros(config.num_clusters, dtype=torch.int64))
        self.register_buffer("assigned_epoch", torch.tensor(-1))
        self.register_buffer("stability", torch.zeros(()))
        for name, value in self.fresh_classifier(epoch=-1).items():
            self.get_parameter(name).data.copy_(value)

    def due(self, epoch: int) -> bool:
        """Whether to cluster at the start of this epoch."""
        last = int(self.assigned_epoch)
        return last < 0 or epoch - last >= self.config.every_epochs

    def fresh_classifier(self, epoch: int) -> dict[str, Tensor]:
        """Weights that know nothing, the same on every rank: parameter of this task -> value, on the CPU"""
        generator = torch.Generator().manual_seed((self.config.seed << 20) + epoch + 1)
        shape = self.config.num_clusters, self.embed_dim
        weight = torch.randn(shape, generator=generator) * INITIAL_STD
        return {"head.weight": weight, "head.bias": torch.zeros(self.config.num_clusters)}

    @torch.no_grad()
    def assign(self, labels: Tensor, epoch: int) -> dict[str, Tensor]:
        """Take over new clusters, int64 (num_samples,), equal on all ranks, and start a new classifier.

        -1 stands for an image without a cluster.

        Returns `fresh_classifier(epoch)`, which is written into the parameters where they are whole. An
        engine that steps copies of them, or has parts of them only, has to be given it.
        """
        assert labels.shape == self.assignments.shape
        assert int(labels.min()) >= -1
        assert int(labels.max()) < self.config.num_clusters
        labels = labels.to(self.assignments.device)
        if int(self.assigned_epoch) >= 0:
            both = (self.assignments >= 0) & (labels >= 0)
            self.stability.copy_(normalized_mutual_information(self.assignments[both], labels[both]))
        self.assignments.copy_(labels)
        self.sizes.copy_(labels[labels >= 0].bincount(minlength=len(self.sizes)))
        self.assigned_epoch.fill_(epoch)
        fresh = self.fresh_classifier(epoch)
        for name, value in fresh.items():
            parameter = self.get_parameter(name)
            if parameter.shape == value.shape:
                parameter.copy_(value)
        return fresh

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        assert views.sample_ids is not None
        labels = self.assignments[views.sample_ids].repeat(len(views.names))  # (M,)
        logits = self.head(views.features)  # (M, K)
        is_labelled = labels >= 0
        count = is_labelled.sum()
        size = self.sizes[labels.clamp(min=0)].clamp(min=1)
        weights = self.sizes.sum() / ((self.sizes > 0).sum().clamp(min=1) * size)
        loss = global_mean(weighted_cross_entropy(logits, labels, weights), count, peers)
        num_correct = (logits.detach().argmax(dim=1) == labels).sum().to(loss.dtype)
        sizes = size_metrics(self.sizes)
        metrics = {
            "accuracy": global_mean(num_correct, count, peers),
            "chance": sizes["largest"],
            "used": sizes["used"],
            "evenness": sizes["evenness"],
            "stability": self.stability.clone(),
        }
        return TaskOutput(loss, metrics)
