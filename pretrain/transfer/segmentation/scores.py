"""How good a segmentation is, from one confusion matrix over all pixels of a set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = 255  # in the labels that the network learns from and is tested on: left out


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns): int64 (K, K).

    predicted, labels: integers of one shape, predicted in 0..K-1, labels there or IGNORED.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} for labels {tuple(labels.shape)}")
    counted = labels != IGNORED
    pairs = labels[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(matrix: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """IoU and accuracy of every class, their means, and the share of right pixels; all in 0..1, not percent.

    A class without a labelled or predicted pixel has no IoU, one without a labelled pixel no accuracy; such
    are null and in no mean. matrix: int64 (K, K).
    """
    if matrix.shape != (len(classes), len(classes)):
        raise ValueError(f"{len(classes)} classes, but a matrix of {tuple(matrix.shape)}")
    rows = []
    for number, name in enumerate(classes):
        hits = int(matrix[number, number])
        labelled, predicted = int(matrix[number].sum()), int(matrix[:, number].sum())
        union = labelled + predicted - hits
        rows.append(
            {
                "name": name,
                "iou": hits / union if union else None,
                "accuracy": hits / labelled if labelled else None,
                "num_pixels": labelled,
            }
        )
    num_pixels = int(matrix.sum())
    return {
        "miou": _mean([row["iou"] for row in rows]),
        "macc": _mean([row["accuracy"] for row in rows]),
        "pixel_accuracy": int(matrix.diagonal().sum()) / num_pixels if num_pixels else None,
        "num_pixels": num_pixels,
        "classes": rows,
    }


def majority(train_pixels: Tensor, test_pixels: Tensor) -> Tensor:
    """The confusion matrix of always saying the most frequent class of the train set.

    train_pixels, test_pixels: labelled pixels by class, int64 (K,).
    """
    matrix = torch.zeros(len(test_pixels), len(test_pixels), dtype=torch.int64)
    matrix[:, int(train_pixels.argmax())] = test_pixels
    return matrix


def _mean(values: Sequence[Any]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None
