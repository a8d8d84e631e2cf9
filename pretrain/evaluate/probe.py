"""Many linear heads on the same features, trained side by side as one batched product.

A head is one learning rate on one kind of input: the features as they are, or standardised (a BatchNorm
without its affine part). Where a method reads several tokens, every token has heads of its own, whose losses
add up and whose logits are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

InputName = Literal["raw", "standardised"]
OptimizerName = Literal["sgd", "lars", "adamw"]

LR_FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
INPUTS: tuple[InputName, ...] = ("raw", "standardised")
NORM_EPS = 1e-6  # of the standardised inputs, added to the variance
TRUST_COEFFICIENT = 1e-3  # of LARS
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
ROWS_AT_ONCE = 8192
FEW_CLASSES = 15  # from 16 on torch computes a softmax with vectors


@dataclass(frozen=True)
class LinearConfig:
    """How linear heads are trained; the rate follows a cosine after a linear warm-up, step by step."""

    optimizer: OptimizerName = "sgd"
    base_lr: float = 0.1  # per 256 samples of a batch; times each of the factors
    lr_factors: tuple[float, ...] = LR_FACTORS
    inputs: tuple[InputName, ...] = INPUTS
    num_epochs: int = 100
    batch_size: int = 1024
    warmup_epochs: float = 0.0
    final_lr: float = 0.0  # as such: not scaled
    momentum: float = 0.9  # of SGD and LARS
    weight_decay: float = 0.0  # decoupled; of AdamW only
    held_out_ratio: float = 0.1  # of each class of the train set, to choose a head on
    seed: int = 0

    def lr_factor(self, step: int, num_steps: int, peak_lr: Tensor) -> Tensor:
        """The rate of each head at a step. peak_lr: float32 (L,)"""
        warmup_steps = round(self.warmup_epochs / self.num_epochs * num_steps)
        if step < warmup_steps:
            return peak_lr * (step / warmup_steps)
        along = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return self.final_lr + (peak_lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * along))


class Probe:
    """The heads of G kinds of input, P parts of the features and L learning rates, with their optimizer.

    The gradient of softmax cross-entropy is written out: per head it is inputs^T (softmax - target) / B,
    with a target that is one-hot or the share of each class.
    """

    def __init__(
        self,
        config: LinearConfig,
        num_classes: int,
        mean: Tensor,
        variance: Tensor,
        batch_size: int,
        num_parts: int = 1,
    ) -> None:
        """mean, variance: (D,) of the features to train on, of all parts. batch_size: sets the rates."""
        self.config, self.num_classes, self.num_parts = config, num_classes, num_parts
        self.mean, self.scale = mean, (variance + NORM_EPS).rsqrt()
        generator = torch.Generator().manual_seed(config.seed)
        shape = (num_parts, len(mean) // num_parts, num_classes)
        one_rate = 0.01 * torch.randn(shape, generator=generator)  # all rates and inputs start alike
        # (G * P, D / P, L * K)
        self.weight = one_rate.repeat(len(config.inputs), 1, len(config.lr_factors)).to(mean.device)
        self.bias = self.weight.new_zeros(len(self.weight), 1, self.weight.shape[2])
        self.peak_lr = config.base_lr * batch_size / 256 * mean.new_tensor(config.lr_factors)  # (L,)
        self._classes = torch.arange(num_classes, device=mean.device)
        self._averages = [torch.zeros_like(values) for values in (self.weight, self.bias)]
        self._squares = [torch.zeros_like(values) for values in (self.weight, self.bias)]

    def inputs(self, features: Tensor) -> Tensor:
        """(B, D) of any precision -> float32 (G * P, B, D / P); a constant one becomes 0, standardised."""
        features = features.float()
        kinds = [
            features if kind == "raw" else (features - self.mean) * self.scale for kind in self.config.inputs
        ]
        parts = torch.stack(kinds).view(len(kinds), len(features), self.num_parts, -1)
        return parts.transpose(1, 2).flatten(0, 1)

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, G * L, K), averaged over the parts"""
        scores = torch.baddbmm(self.bias, self.inputs(features), self.weight)  # (G * P, B, L * K)
        scores = scores.view(-1, self.num_parts, *scores.shape[1:]).mean(dim=1)
        return scores.view(*scores.shape[:2], -1, self.num_classes).permute(1, 0, 2, 3).flatten(1, 2)

    def step(self, features: Tensor, targets: Tensor, step: int, num_steps: int) -> None:
        """One optimizer step of every head.

        features: (B, D); targets: int64 (B,) in 0..K-1, or float32 (B, K), the share of each class.
        """
        inputs = self.inputs(features)
        errors = torch.baddbmm(self.bias, inputs, self.weight)  # (G * P, B, L * K)
        errors = softmax(errors.view(*errors.shape[:2], -1, self.num_classes))
        if not targets.is_floating_point():
            targets = (targets[:, None] == self._classes).float()
        errors -= targets[:, None]
        errors = errors.flatten(2).div_(len(targets))
        gradients = torch.bmm(inputs.transpose(1, 2), errors), errors.sum(dim=1, keepdim=True)
        lr = self.config.lr_factor(step, num_steps, self.peak_lr)
        lr = lr[:, None].expand(-1, self.num_classes).flatten()  # (L * K,)
        for place, (values, gradient) in enumerate(zip((self.weight, self.bias), gradients, strict=True)):
            if self.config.optimizer == "adamw":
                self._adamw(values, gradient, place, lr, step)
            else:
                if self.config.optimizer == "lars" and values is self.weight:
                    gradient = self._adapted(gradient)
                velocity = self._averages[place].mul_(self.config.momentum).add_(gradient)
                values.sub_(lr * velocity)

    def _adapted(self, gradient: Tensor) -> Tensor:
        """LARS (arXiv:1708.03888, eq. 6): each head's gradient as long as a share of its weights."""
        shape = (*gradient.shape[:2], -1, self.num_classes)
        of_heads = [values.view(shape) for values in (self.weight, gradient)]
        weight_norm, norm = (values.norm(dim=(1, 3), keepdim=True) for values in of_heads)
        trust = torch.where(norm > 0, TRUST_COEFFICIENT * weight_norm / norm, 1.0)
        return (of_heads[1] * trust).flatten(2)

    def _adamw(self, values: Tensor, gradient: Tensor, place: int, lr: Tensor, step: int) -> None:
        first, second = ADAM_BETAS
        average = self._averages[place].lerp_(gradient, 1 - first)
        square = self._squares[place].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        if values is self.weight:
            values.mul_(1 - lr * self.config.weight_decay)
        scale = (square / (1 - second ** (step + 1))).sqrt_().add_(ADAM_EPS)
        values.sub_(lr / (1 - first ** (step + 1)) * average / scale)


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension. On a CPU, torch's own takes five times as long where that one is short."""
    if logits.is_cuda or logits.shape[-1] > FEW_CLASSES:
        return logits.softmax(dim=-1)
    powers = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return powers.div_(powers.sum(dim=-1, keepdim=True))


def train_probe(
    config: LinearConfig,
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    num_parts: int = 1,
    rows: Tensor | None = None,
) -> Probe:
    """All heads at once, on the same batches of cached features.

    features: (N, D) of any precision; targets: int64 (N,) in 0..K-1 or float32 (N, K), as in `Probe.step`;
    rows: those to learn from, None all.
    """
    rows = torch.arange(len(targets), device=features.device) if rows is None else rows
    batch_size = min(config.batch_size, len(rows))
    probe = Probe(config, num_classes, *moments(features, rows), batch_size, num_parts)
    num_steps = config.num_epochs * math.ceil(len(rows) / batch_size)
    for step, places in enumerate(_batches(len(rows), batch_size, config)):
        batch = rows[places.to(rows.device)]
        probe.step(features[batch], targets[batch], step, num_steps)
    return probe


def _batches(num_rows: int, batch_size: int, config: LinearConfig) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(config.seed + 1)
    for _ in range(config.num_epochs):
        yield from torch.split(torch.randperm(num_rows, generator=generator), batch_size)


def moments(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each feature over some rows: float32 (D,) each, summed in float64."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in torch.split(rows, ROWS_AT_ONCE):
        total += features[part].double().sum(dim=0)
    mean, squares = total / len(rows), torch.zeros_like(total)
    for part in torch.split(rows, ROWS_AT_ONCE):
        squares += (features[part].double() - mean).square().sum(dim=0)
    return mean.float(), (squares / len(rows)).float()


def accuracies(probe: Probe, features: Tensor, targets: Tensor, rows: Tensor | None = None) -> list[float]:
    """Share classified correctly by each of the G * L heads; 0 for a head that diverged."""
    rows = torch.arange(len(targets), device=features.device) if rows is None else rows
    num_correct = torch.zeros(len(probe.config.inputs) * len(probe.config.lr_factors))
    for part in torch.split(rows, ROWS_AT_ONCE):
        logits = probe.logits(features[part])
        correct = logits.argmax(dim=2) == targets[part, None]
        num_correct += (correct & logits.isfinite().all(dim=2)).sum(dim=0).cpu()
    return [count / len(rows) for count in num_correct.tolist()]
