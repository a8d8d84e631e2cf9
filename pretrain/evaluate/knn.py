"""Weighted k-nearest-neighbour classification of frozen features, in memory that does not grow with the bank.

The protocol of DINO (arXiv:2104.14294) after Wu et al. (arXiv:1805.01978, section 3.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.evaluate.features import Features

KS = (10, 20, 100, 200)
REPORTED_K = 20
TEMPERATURE = 0.07
EXACT_BYTES = 2**30  # a bank that takes no more is kept in float32: all of CIFAR, up to 5,000 wide


def unit_half(features: Tensor) -> Tensor:
    """What a large bank keeps: (B, D) -> float16 (B, D) of unit length.

    A cosine of two such vectors is off by at most about 2^-10; `benchmarks/evaluate.py` measures what that
    does to an accuracy.
    """
    return F.normalize(features, dim=1).half()


def knn(
    train: Features,
    test: Features,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    chunk: int = 4096,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Classify each test feature by its k most similar train features; the share classified correctly.

    A neighbour votes for its class with weight exp(cosine / temperature). A k larger than the bank means all
    of it. `chunk` bounds both the queries and the bank rows on the device at a time; cosines are float32
    whatever the features are kept in.
    """
    return score(predict(train, test, ks, temperature, chunk, device), train, test, temperature)


def predict(
    train: Features,
    test: Features,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    chunk: int = 4096,
    device: str | torch.device = "cpu",
) -> dict[int, Tensor]:
    """The class that each k gives every test image: int64 (N,) each; as in `knn`."""
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be at least 1, not {list(ks)}")
    classes, bank_labels = torch.unique(train.labels, return_inverse=True)  # labels may be sparse
    num_neighbours = min(max(ks), len(train.labels))
    predicted = {k: torch.empty_like(test.labels) for k in ks}
    for start in range(0, len(test.labels), chunk):
        queries = _unit(test.features[start : start + chunk], device)
        similarity, rows = nearest_neighbours(queries, train.features, num_neighbours, chunk)
        neighbours = bank_labels[rows]  # (Q, k) index of class
        for k in ks:
            votes = torch.zeros(len(queries), len(classes))
            votes.scatter_add_(1, neighbours[:, :k], (similarity[:, :k] / temperature).exp())
            predicted[k][start : start + chunk] = classes[votes.argmax(dim=1)]
    return predicted


def score(
    predicted: Mapping[int, Tensor], train: Features, test: Features, temperature: float
) -> dict[str, Any]:
    """What `knn` says of the predictions of each k."""
    classes = torch.unique(train.labels)
    top1_ratio = {k: int((found == test.labels).sum()) / len(test.labels) for k, found in predicted.items()}
    best_k = max(top1_ratio, key=lambda k: top1_ratio[k])  # the smallest listed of equals
    reported_k = REPORTED_K if REPORTED_K in top1_ratio else best_k
    return {
        "top1_ratio": top1_ratio[reported_k],
        "reported_k": reported_k,
        "best_top1_ratio": top1_ratio[best_k],
        "best_k": best_k,
        "top1_ratio_by_k": {str(k): ratio for k, ratio in top1_ratio.items()},
        "temperature": temperature,
        "bank_precision": str(train.features.dtype).removeprefix("torch."),
        "num_bank": len(train.labels),
        "num_queries": len(test.labels),
        "num_classes": len(classes),
        "chance_ratio": 1 / len(classes),
    }


def nearest_neighbours(queries: Tensor, bank: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The k bank rows of largest cosine, most similar first, by a running top-k over chunks of the bank.

    queries: float32 (Q, D) of unit length, on the device; bank: (N, D) of any length and precision, on the
    host, 1 <= k <= N. Returns cosines float32 (Q, k) and rows int64 (Q, k), on the host.
    """
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), chunk):
        part = _unit(bank[start : start + chunk], queries.device)
        similarity, columns = (queries @ part.T).topk(min(k, len(part)), dim=1)
        best = torch.cat([best, similarity], dim=1)
        rows = torch.cat([rows, columns + start], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return best.cpu(), rows.cpu()


def _unit(features: Tensor, device: str | torch.device) -> Tensor:
    """float32, of unit length, on the device"""
    return F.normalize(features.to(device).float(), dim=1)
