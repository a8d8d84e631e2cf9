"""Linear probe on frozen, cached features: a sweep of learning rates trained as one batched probe.

The choice among the heads is made on a held-out tenth of the train set; then the chosen setting is trained
again on the whole train set and meets the test set.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import DataError
from pretrain.evaluate.features import Features
from pretrain.evaluate.intervals import wilson_interval
from pretrain.evaluate.probe import ROWS_AT_ONCE, LinearConfig, Probe, accuracies, train_probe

FEW_HELD_OUT = 100  # images; with fewer, one more or less moves the accuracy by over a percent
NUM_FOLDS = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """What heads see of the stored features: some columns, cut into as many parts as there are heads."""

    feature: str
    columns: slice | None = None  # None: all
    num_parts: int = 1

    def of(self, features: Tensor) -> Tensor:
        return features if self.columns is None else features[:, self.columns]


WHOLE = (Reading("features"),)


@dataclass(frozen=True)
class Head:
    """The chosen head, trained on all that it may learn from."""

    probe: Probe
    reading: Reading
    classes: Tensor  # (K,) int64, labels in the order of the logits, on the host

    def predict(self, features: Tensor) -> Tensor:
        """(N, D) on the host -> labels int64 (N,) on the host; -1 for a head that diverged"""
        device, found = self.probe.weight.device, []
        for part in torch.split(self.reading.of(features), ROWS_AT_ONCE):
            logits = self.probe.logits(part.to(device))[:, 0]
            labels = self.classes[logits.argmax(dim=1).cpu()]
            found.append(torch.where(logits.isfinite().all(dim=1).cpu(), labels, -1))
        return torch.cat(found)


def linear_probe(
    train: Features,
    test: Features,
    config: LinearConfig | None = None,
    device: str | torch.device = "cpu",
    readings: Sequence[Reading] = WHOLE,
) -> dict[str, Any]:
    """Top-1 accuracy of the chosen head on `test`, its 95 % interval, and every head's for the record.

    readings: of several the one with the best head is taken, by the held-out part as well.
    """
    return train_head(train, test, config, device, readings)[1]


def train_head(
    train: Features,
    test: Features,
    config: LinearConfig | None = None,
    device: str | torch.device = "cpu",
    readings: Sequence[Reading] = WHOLE,
    *,
    few_labels: bool = False,
) -> tuple[Head, dict[str, Any]]:
    """The chosen head, and what `linear_probe` says of it. few_labels: as in `splits_to_choose_on`."""
    config = config or LinearConfig()
    classes, targets = torch.unique(train.labels, return_inverse=True)
    targets, features = targets.to(device), train.features.to(device)
    splits = [
        (kept.to(device), held_out.to(device))
        for kept, held_out in splits_to_choose_on(targets, config, few_labels)
    ]
    num_held_out = sum(len(held_out) for _, held_out in splits)
    test_features, test_targets = test.features.to(device), index_of(test.labels, classes).to(device)
    heads: list[dict[str, Any]] = []
    for reading in readings:
        seen = reading.of(features)
        probes = [
            train_probe(config, seen, targets, len(classes), reading.num_parts, kept) for kept, _ in splits
        ]
        num_correct = torch.zeros(len(config.inputs) * len(config.lr_factors), dtype=torch.float64)
        for probe, (_, held_out) in zip(probes, splits, strict=True):
            ratios = accuracies(probe, seen, targets, held_out)
            num_correct += (torch.tensor(ratios, dtype=torch.float64) * len(held_out)).round()
        of_reading = (num_correct / num_held_out).tolist()
        # for the record those of one split are enough
        heads += described(probes[0], reading, of_reading, reading.of(test_features), test_targets)
    chosen = choose(heads, config)
    reading = next(one for one in readings if one.feature == chosen["feature"])
    alone = replace(config, lr_factors=(chosen["lr_factor"],), inputs=(chosen["inputs"],))
    final = train_probe(alone, reading.of(features), targets, len(classes), reading.num_parts)
    (top1_ratio,) = accuracies(final, reading.of(test_features), test_targets)
    result = report(config, chosen, heads, top1_ratio, train, test, num_held_out)
    return Head(final, reading, classes), {**result, "num_folds": len(splits)}


def described(
    probe: Probe, reading: Reading, held_out_ratios: Sequence[float], features: Tensor, targets: Tensor
) -> list[dict[str, Any]]:
    """A line for each head of a sweep. features, targets: of the test set, for the record only."""
    settings = [(kind, factor) for kind in probe.config.inputs for factor in probe.config.lr_factors]
    tested = accuracies(probe, features, targets)
    return [
        {
            "feature": reading.feature,
            "lr_factor": factor,
            "inputs": kind,
            "held_out_top1_ratio": held_out_ratio,
            "test_top1_ratio": test_ratio,
        }
        for (kind, factor), held_out_ratio, test_ratio in zip(settings, held_out_ratios, tested, strict=True)
    ]


def choose(heads: Sequence[dict[str, Any]], config: LinearConfig) -> dict[str, Any]:
    """The head that is best on the held-out part, the first of equals; it does not see the test set."""
    best = max(heads, key=lambda head: head["held_out_top1_ratio"])
    chosen = {key: value for key, value in best.items() if key != "test_top1_ratio"}
    if is_at_edge(chosen, config):
        which = "largest" if chosen["lr_factor"] == max(config.lr_factors) else "smallest"
        logger.warning(
            "linear probe: the %s learning rate of the sweep was chosen (x%g, %s inputs); try another "
            "--base-lr than %g",
            which,
            chosen["lr_factor"],
            chosen["inputs"],
            config.base_lr,
        )
    return chosen


def is_at_edge(chosen: dict[str, Any], config: LinearConfig) -> bool:
    edges = (min(config.lr_factors), max(config.lr_factors))
    return len(config.lr_factors) > 1 and chosen["lr_factor"] in edges


def report(
    config: LinearConfig,
    chosen: dict[str, Any],
    heads: Sequence[dict[str, Any]],
    top1_ratio: float,
    train: Features,
    test: Features,
    num_held_out: int,
) -> dict[str, Any]:
    low, high = wilson_interval(top1_ratio, len(test.labels))
    num_classes = len(torch.unique(train.labels))
    return {
        "top1_ratio": top1_ratio,
        "top1_ratio_95": [low, high],
        "chosen": chosen,
        "batch_norm": chosen["inputs"] == "standardised",
        "chosen_at_edge_of_sweep": is_at_edge(chosen, config),
        "heads": list(heads),  # of the sweep, so trained without the held-out part; for the record
        "config": asdict(config),
        "num_train": len(train.labels),
        "num_held_out": num_held_out,
        "num_test": len(test.labels),
        "num_classes": num_classes,
        "chance_ratio": 1 / num_classes,
    }


def held_out_split(targets: Tensor, ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to choose on: the same share of every class, drawn from `seed`.

    targets: int64 (N,). A class of one sample stays in the first part.
    """
    targets = targets.cpu()  # the draw is the same on every device
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(int(targets.max()) + 1):
        rows = (targets == label).nonzero().squeeze(1)
        count = min(len(rows) - 1, max(1, round(ratio * len(rows))))
        held_out[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    if not held_out.any():
        raise DataError(
            "--train: no class has two samples, so none can be held out to choose a learning rate on; "
            "give a set with more labelled images of a class"
        )
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def splits_to_choose_on(
    targets: Tensor, config: LinearConfig, few_labels: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Rows to train on and rows to choose on, once, or several times.

    few_labels: where the held-out part has less than 100 images, which cannot tell a score of heads apart,
    cross-validation in ten folds takes its place: every image is held out once, and the folds add up.
    """
    split = held_out_split(targets, config.held_out_ratio, config.seed)
    if not few_labels or len(split[1]) >= FEW_HELD_OUT:
        return [split]
    return folds(targets, NUM_FOLDS, config.seed)


def folds(targets: Tensor, num_folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Rows to train on and rows held out, for each fold; every class is spread over the folds.

    targets: int64 (N,). A class of one sample is never held out; folds that would hold out none are left out.
    """
    targets = targets.cpu()
    generator = torch.Generator().manual_seed(seed)
    fold_of = torch.full((len(targets),), -1)
    for label in range(int(targets.max()) + 1):
        rows = (targets == label).nonzero().squeeze(1)
        order = rows[torch.randperm(len(rows), generator=generator)]
        if len(rows) > 1:
            fold_of[order] = torch.arange(len(rows)) % num_folds
    return [
        ((fold_of != fold).nonzero().squeeze(1), (fold_of == fold).nonzero().squeeze(1))
        for fold in range(min(num_folds, int(fold_of.max()) + 1))
    ]


def index_of(labels: Tensor, classes: Tensor) -> Tensor:
    """Position of each label among the sorted `classes`; -1 for a label the train set lacks."""
    position = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
    return torch.where(classes[position] == labels, position, -1)
