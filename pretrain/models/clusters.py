"""Clustering of the features of a whole data set: whitening, k-means, and how alike two clusterings are.

Runs where the features are, and gives the same labels for the same seed on the same kind of device. Random
numbers come from a generator of its own on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 24  # distances that are held at a time
_ROWS = 1 << 16  # features that are held in float64 at a time


@torch.no_grad()
def reduce_and_whiten(features: Tensor, dim: int = 256) -> Tensor:
    """The `dim` main directions of the features, each scaled to variance 1, as rows of unit length: what
    DeepCluster clusters (Caron et al., 2018, arXiv:1807.05520).

    (N, D) -> (N, min(dim, D)) float32. Directions without variance, less than 1e-9 of the first one's, come
    out as zeros.
    """
    mean = features.mean(dim=0, dtype=torch.float64)
    parts = [slice(start, start + _ROWS) for start in range(0, len(features), _ROWS)]
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for part in parts:
        centered = features[part] - mean
        covariance += centered.T @ centered / len(features)
    variance, direction = torch.linalg.eigh(covariance)  # ascending
    variance, direction = variance.flip(0)[:dim], direction.flip(1)[:, :dim]
    scale = torch.where(variance > 1e-9 * variance[0], variance.clamp(min=1e-300).rsqrt(), 0.0)
    whitening = direction * scale
    return torch.cat([F.normalize(((features[part] - mean) @ whitening).float(), dim=1) for part in parts])


@torch.no_grad()
def nearest_center(features: Tensor, centers: Tensor) -> Tensor:
    """The center with the least Euclidean distance: (N, d), (K, d) -> int64 (N,)"""
    half_square = centers.square().sum(dim=1) / 2
    chunk = max(1, _CHUNK // len(centers))
    return torch.cat(
        [(half_square - rows @ centers.T).argmin(dim=1) for rows in torch.split(features, chunk)]
    )


@torch.no_grad()
def kmeans(features: Tensor, num_clusters: int, iterations: int = 20, seed: int = 0) -> Tensor:
    """Lloyd's algorithm from random images as centers; no cluster stays empty. (N, d) -> int64 (N,)

    A cluster that loses all its members is given half of those of a big one.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(f"{len(features)} features cannot fill {num_clusters} clusters")
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(features), generator=generator)[:num_clusters]
    centers = features[first.to(features.device)]
    for _ in range(iterations):
        labels = split_for_empty(features, nearest_center(features, centers), num_clusters, generator)
        sums = torch.zeros_like(centers).index_add(0, labels, features)
        centers = sums / labels.bincount(minlength=num_clusters).unsqueeze(1)
    return split_for_empty(features, nearest_center(features, centers), num_clusters, generator)


@torch.no_grad()
def split_for_empty(
    features: Tensor, labels: Tensor, num_clusters: int, generator: torch.Generator
) -> Tensor:
    """Fill every empty cluster from another, drawn with a probability that grows with its size: the half of
    its members that lies further along a random direction moves. (N, d), int64 (N,) -> int64 (N,)"""
    sizes = labels.bincount(minlength=num_clusters).cpu()
    labels = labels.clone()
    for empty in (sizes == 0).nonzero().flatten().tolist():
        big = int(torch.multinomial((sizes - 1).clamp(min=0).double(), 1, generator=generator))
        members = (labels == big).nonzero().flatten()
        direction = torch.randn(features.shape[1], generator=generator).to(features)
        order = (features[members] @ direction).argsort(stable=True)
        moved = members[order[(len(members) + 1) // 2 :]]
        labels[moved] = empty
        sizes[empty] = len(moved)
        sizes[big] -= len(moved)
    return labels


def normalized_mutual_information(first: Tensor, second: Tensor) -> Tensor:
    """How alike two clusterings of the same items are, whatever the clusters are called: float64 () in 0..1

    int64 (N,) each. The mutual information over the root of the product of the entropies, as DeepCluster; 1
    for equal ones, and for two without information.
    """
    joint = first * (second.max() + 1) + second  # one number for each pair of clusters
    entropies = [_entropy(torch.unique(labels, return_counts=True)[1]) for labels in (first, second)]
    information = entropies[0] + entropies[1] - _entropy(torch.unique(joint, return_counts=True)[1])
    scale = (entropies[0] * entropies[1]).sqrt()
    if scale == 0:
        return torch.ones_like(scale) if entropies[0] == entropies[1] else torch.zeros_like(scale)
    return (information / scale).clamp(0, 1)


def _entropy(counts: Tensor) -> Tensor:
    """In nats, of something that was counted: (K,) of 1 or more -> float64 ()"""
    ratio = counts.double() / counts.sum()
    return -(ratio * ratio.log()).sum()


def size_metrics(sizes: Tensor) -> dict[str, Tensor]:
    """How evenly clusters are filled, from their sizes, int64 (K,); all () in 0..1, float32.

    `used`: the ratio of clusters with members. `largest`: the share of the largest. `evenness`: the number of
    equal clusters with the same entropy, over K. All are 0 where nothing has members.
    """
    total = sizes.sum()
    ratio = sizes.double() / total.clamp(min=1)
    entropy = -torch.xlogy(ratio, ratio).sum()
    return {
        "used": (sizes > 0).float().mean(),
        "largest": ratio.max().float(),
        "evenness": (entropy.exp() / len(sizes) * (total > 0)).float(),
    }
