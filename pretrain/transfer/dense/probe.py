"""A linear layer on single patch tokens: a sweep of learning rates, chosen on held-out train images."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import DataError
from pretrain.evaluate.linear import is_at_edge
from pretrain.evaluate.probe import ROWS_AT_ONCE, LinearConfig, Probe, train_probe
from pretrain.transfer.dense.patches import Patches

PROBE = LinearConfig(
    optimizer="adamw",
    base_lr=1e-3,
    lr_factors=(0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    inputs=("standardised",),
    num_epochs=10,
    batch_size=1024,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """The head that was chosen, trained on all train images, and how it was found."""

    probe: Probe
    config: LinearConfig  # of the sweep
    lr_factor: float
    heads: list[dict[str, Any]]  # of the sweep: its rates and their losses on the held-out images
    num_held_out: int  # images

    def describe(self) -> dict[str, Any]:
        return {
            "chosen": {"lr": self.config.base_lr * self.lr_factor, "lr_factor": self.lr_factor},
            "chosen_at_edge_of_sweep": is_at_edge({"lr_factor": self.lr_factor}, self.config),
            "heads": self.heads,
            "num_held_out": self.num_held_out,
        }


def fit_probe(patches: Patches, config: LinearConfig, device: torch.device) -> Chosen:
    """Train all rates without the held-out images, choose the best, and train it on all images.

    The loss, also the one to choose by, is the cross-entropy with the share of each class in a patch; every
    patch with a label counts the same. mIoU as the choice would prefer rates that leave the loss noisy.
    """
    features, targets = patches.features.to(device), patches.targets.to(device)
    kept, held_out = held_out_images(patches.labelled_images(), config.held_out_ratio, config.seed)
    rows = patches.rows_of(kept).to(device)
    sweep = train_probe(config, features, targets, targets.shape[1], rows=rows)
    losses = held_out_losses(sweep, patches, held_out, device)
    heads = [
        {
            "lr": config.base_lr * factor,
            "lr_factor": factor,
            "held_out_loss": loss if math.isfinite(loss) else None,
        }
        for factor, loss in zip(config.lr_factors, losses, strict=True)
    ]
    factor = config.lr_factors[losses.index(min(losses))]
    if is_at_edge({"lr_factor": factor}, config):
        logger.warning(
            "dense: the learning rate %g at the edge of the sweep was chosen; try another number of --epochs",
            config.base_lr * factor,
        )
    alone = replace(config, lr_factors=(factor,))
    rows = patches.rows_of(torch.arange(patches.num_images)).to(device)
    final = train_probe(alone, features, targets, targets.shape[1], rows=rows)
    return Chosen(final, config, factor, heads, len(held_out))


def held_out_images(images: Tensor, ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """Images to train on and images to choose on, drawn from `seed`: at least one of each.

    images: int64 (M,) numbers, of which each is in one of the two.
    """
    if len(images) < 2:
        raise DataError(
            f"--data: {len(images)} train images with labels, of which one is held out to choose a learning "
            "rate on; give two or more"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = images[torch.randperm(len(images), generator=generator)]
    count = max(1, round(ratio * len(images)))
    return shuffled[count:].sort().values, shuffled[:count].sort().values


def held_out_losses(probe: Probe, patches: Patches, images: Tensor, device: torch.device) -> list[float]:
    """Cross-entropy of each head over the patches of some images; infinite for a head that diverged."""
    rows = patches.rows_of(images)
    total = torch.zeros(len(probe.config.lr_factors), dtype=torch.float64)
    for part in torch.split(rows, ROWS_AT_ONCE):
        logits = probe.logits(patches.features[part].to(device)).cpu()  # (B, L, K)
        total -= (logits.log_softmax(dim=2) * patches.targets[part][:, None]).sum(dim=(0, 2)).double()
    return [loss if math.isfinite(loss) else math.inf for loss in (total / len(rows)).tolist()]
