"""Linear probe on frozen, cached features: a sweep of learning rates trained as one batched probe.

Every learning rate is tried with and without standardised inputs (BatchNorm without its affine part, with the
statistics of the train set). The choice is made on a held-out tenth of the train set; then the chosen setting
is trained again on the whole train set and meets the test set.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import DataError
from pretrain.evaluate.features import Features

LR_FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
INPUTS = ("raw", "standardised")  # order of the groups of heads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearConfig:
    """How the heads are trained: SGD without weight decay, cosine to zero."""

    base_lr: float = 0.1  # per 256 samples of a batch; times the factors, 0.001 (DINO's) to 0.3
    lr_factors: tuple[float, ...] = LR_FACTORS
    num_epochs: int = 100
    batch_size: int = 1024
    momentum: float = 0.9
    held_out_ratio: float = 0.1  # of each class of the train set
    seed: int = 0


@dataclass(frozen=True)
class Heads:
    """The trained probe: for each of the G kinds of input, L heads side by side."""

    weight: Tensor  # (G, D, L * K) float32
    bias: Tensor  # (G, 1, L * K) float32
    mean: Tensor  # (D,) of the features trained on
    std: Tensor  # (D,)
    num_classes: int

    def inputs(self, features: Tensor) -> Tensor:
        """(B, D) -> (G, B, D): as they are, and standardised (a constant feature becomes 0)."""
        inputs = features.new_empty(len(INPUTS), *features.shape)
        inputs[0] = features
        torch.sub(features, self.mean, out=inputs[1])
        inputs[1] /= self.std + 1e-6
        return inputs

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, G * L, K)"""
        scores = torch.baddbmm(self.bias, self.inputs(features), self.weight)  # (G, B, L * K)
        return scores.view(*scores.shape[:2], -1, self.num_classes).permute(1, 0, 2, 3).flatten(1, 2)


def linear_probe(
    train: Features, test: Features, config: LinearConfig | None = None, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Top-1 accuracy of the chosen head on `test`, its 95 % interval, and every head's for the record."""
    config = config or LinearConfig()
    classes, targets = torch.unique(train.labels, return_inverse=True)
    features, targets = train.features.to(device), targets.to(device)
    kept, held_out = (rows.to(device) for rows in held_out_split(targets, config.held_out_ratio, config.seed))
    trial = train_heads(features[kept], targets[kept], len(classes), config)
    held_out_ratio = accuracies(trial, features[held_out], targets[held_out])
    chosen = max(range(len(held_out_ratio)), key=held_out_ratio.__getitem__)
    kind, lr_factor = (
        INPUTS[chosen // len(config.lr_factors)],
        config.lr_factors[chosen % len(config.lr_factors)],
    )
    settings = [{"lr_factor": lr, "inputs": inputs} for inputs in INPUTS for lr in config.lr_factors]
    final = train_heads(features, targets, len(classes), replace(config, lr_factors=(lr_factor,)))
    test_features, test_targets = test.features.to(device), _index_of(test.labels, classes).to(device)
    top1_ratio = accuracies(final, test_features, test_targets)[INPUTS.index(kind)]
    trial_test_ratio = accuracies(trial, test_features, test_targets)
    at_the_edge = lr_factor in (min(config.lr_factors), max(config.lr_factors))
    if at_the_edge:
        which = "largest" if lr_factor == max(config.lr_factors) else "smallest"
        logger.warning(
            "linear probe: the %s learning rate of the sweep was chosen (x%g, %s inputs); "
            "a wider sweep might do better",
            which,
            lr_factor,
            kind,
        )
    low, high = wilson_interval(top1_ratio, len(test.labels))
    return {
        "top1_ratio": top1_ratio,
        "top1_ratio_95": [low, high],
        "chosen": settings[chosen] | {"held_out_top1_ratio": held_out_ratio[chosen]},
        "chosen_at_edge_of_sweep": at_the_edge,
        "heads": [  # of the sweep, so trained without the held-out part; for the record
            setting | {"held_out_top1_ratio": chosen_by, "test_top1_ratio": tested}
            for setting, chosen_by, tested in zip(settings, held_out_ratio, trial_test_ratio, strict=True)
        ],
        "config": asdict(config),
        "num_train": len(train.labels),
        "num_held_out": len(held_out),
        "num_test": len(test.labels),
        "num_classes": len(classes),
        "chance_ratio": 1 / len(classes),
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


def train_heads(features: Tensor, targets: Tensor, num_classes: int, config: LinearConfig) -> Heads:
    """All heads at once, on the same batches. features: float32 (N, D); targets: int64 (N,) in 0..K-1.

    The gradient of softmax cross-entropy is written out: per head it is inputs^T (softmax - onehot) / B.
    """
    generator = torch.Generator().manual_seed(config.seed)
    num_samples, width = features.shape
    batch_size = min(config.batch_size, num_samples)
    std, mean = torch.std_mean(features, dim=0, correction=0)
    num_outputs = len(config.lr_factors) * num_classes
    one_head = 0.01 * torch.randn(width, num_classes, generator=generator)  # all heads start alike
    weight = one_head.repeat(len(INPUTS), 1, len(config.lr_factors)).to(features.device)
    rows = torch.arange(batch_size, device=features.device)
    heads = Heads(weight, weight.new_zeros(len(INPUTS), 1, num_outputs), mean, std, num_classes)
    velocity, bias_velocity = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    peak_lr = config.base_lr * batch_size / 256 * features.new_tensor(config.lr_factors)
    peak_lr = peak_lr.repeat_interleave(num_classes)  # (L * K,)
    steps_per_epoch = num_samples // batch_size
    num_steps = config.num_epochs * steps_per_epoch
    for step in range(num_steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(num_samples, generator=generator).to(features.device)
        first = step % steps_per_epoch * batch_size
        batch = order[first : first + batch_size]
        inputs = heads.inputs(features[batch])  # (G, B, D)
        logits = torch.baddbmm(heads.bias, inputs, heads.weight)  # (G, B, L * K)
        errors = logits.view(len(INPUTS), batch_size, -1, num_classes).softmax(dim=3)
        errors[:, rows, :, targets[batch]] -= 1
        errors = errors.flatten(2)
        gradient = torch.bmm(inputs.transpose(1, 2), errors)
        velocity.mul_(config.momentum).add_(gradient, alpha=1 / batch_size)
        bias_velocity.mul_(config.momentum).add_(errors.mean(dim=1, keepdim=True))
        lr = peak_lr * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
        heads.weight.sub_(lr * velocity)
        heads.bias.sub_(lr * bias_velocity)
    return heads


def accuracies(heads: Heads, features: Tensor, targets: Tensor, chunk: int = 8192) -> list[float]:
    """Share classified correctly by each of the G * L heads; 0 for a head that diverged."""
    num_correct = torch.zeros(heads.weight.shape[0] * heads.weight.shape[2] // heads.num_classes)
    for start in range(0, len(targets), chunk):
        logits = heads.logits(features[start : start + chunk])
        correct = logits.argmax(dim=2) == targets[start : start + chunk, None]
        num_correct += (correct & logits.isfinite().all(dim=2)).sum(dim=0).cpu()
    return [count / len(targets) for count in num_correct.tolist()]


def wilson_interval(ratio: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a binomial share (Wilson, 1927): stays in 0..1, also at 0 and 1."""
    centre = (ratio + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(ratio * (1 - ratio) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _index_of(labels: Tensor, classes: Tensor) -> Tensor:
    """Position of each label among the sorted `classes`; -1 for a label the train set lacks."""
    position = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
    return torch.where(classes[position] == labels, position, -1)
