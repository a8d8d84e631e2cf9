"""Linear probe on augmented images: other crops in every epoch, encoded anew, as the papers train it.

The sweep runs twice side by side on the same encoded batches: without the held-out tenth, to choose, and with
it, to report. So a sweep costs one encoding, and the choice sees neither the test set nor what it was
trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pretrain.evaluate.batches import Share, augmented_batches
from pretrain.evaluate.encoder import Encoder
from pretrain.evaluate.features import Features
from pretrain.evaluate.image_set import ImageSet
from pretrain.evaluate.linear import Reading, choose, described, held_out_split, index_of, report
from pretrain.evaluate.probe import LinearConfig, Probe, accuracies, moments
from pretrain.evaluate.recipes import FinetuneRecipe, recipe_with

CACHED = "none: cached features of the centre crop"


def crops_of(config: LinearConfig, batch_size: int) -> FinetuneRecipe:
    """Crops and flips only: padded by 4 px up to 64 px, above that 8 to 100 % of the area, resized."""
    return recipe_with("relvit", [f"num_epochs={config.num_epochs}", f"batch_size={batch_size}"])


def augmentation_of(encoder: Encoder, config: LinearConfig) -> str:
    """For the result."""
    recipe = crops_of(config, 1)
    if recipe.crops_padded(encoder.crop.size_px):
        return f"random crops of the image padded by {recipe.pad_px} px, flips"
    low, high = recipe.crop_scale
    return f"random crops of {100 * low:g} to {100 * high:g} % of the area, resized; flips"


def linear_probe_augmented(
    encoder: Encoder,
    images: ImageSet,
    train: Features,
    test: Features,
    config: LinearConfig,
    readings: Sequence[Reading],
    accelerator: Accelerator,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """As `linear_probe`. train, test: features of the centre crops, to choose and to test on; the means and
    variances of standardised inputs are those of `train` as well."""
    device = accelerator.device
    classes, targets = torch.unique(train.labels, return_inverse=True)
    targets = targets.to(device)
    kept, held_out = (rows.to(device) for rows in held_out_split(targets, config.held_out_ratio, config.seed))
    is_kept = torch.zeros(len(targets), dtype=torch.bool, device=device).index_fill(0, kept, True)
    batch_size = min(config.batch_size, len(images))
    features = train.features.to(device)
    everything = torch.arange(len(targets), device=device)

    def probe_of(reading: Reading, rows: Tensor) -> Probe:
        statistics = moments(reading.of(features), rows)
        return Probe(config, len(classes), *statistics, batch_size, reading.num_parts)

    choosing = [probe_of(reading, kept) for reading in readings]
    final = [probe_of(reading, everything) for reading in readings]
    num_steps = config.num_epochs * math.ceil(len(images) / batch_size)
    recipe = crops_of(config, batch_size)
    encoder = encoder.to(device)
    batches = augmented_batches(encoder, images, recipe, config.seed, accelerator, 0, batch_size, num_workers)
    for step, (share, pixels) in enumerate(batches):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            encoded = encoder.encode(pixels)
        encoded, rows = _gathered(encoded, share, accelerator)
        for place, reading in enumerate(readings):
            seen = reading.of(encoded)
            final[place].step(seen, targets[rows], step, num_steps)
            mask = is_kept[rows]
            if mask.any():
                choosing[place].step(seen[mask], targets[rows][mask], step, num_steps)
    test_features, test_targets = test.features.to(device), index_of(test.labels, classes).to(device)
    heads: list[dict[str, Any]] = []
    for probe, reading in zip(choosing, readings, strict=True):
        ratios = accuracies(probe, reading.of(features), targets, held_out)
        heads += described(probe, reading, ratios, reading.of(test_features), test_targets)
    chosen = choose(heads, config)
    found: list[float] = []
    for probe, reading in zip(final, readings, strict=True):
        found += accuracies(probe, reading.of(test_features), test_targets)
    keys = [(head["feature"], head["inputs"], head["lr_factor"]) for head in heads]
    top1_ratio = found[keys.index((chosen["feature"], chosen["inputs"], chosen["lr_factor"]))]
    return report(config, chosen, heads, top1_ratio, train, test, len(held_out))


def _gathered(encoded: Tensor, share: Share, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """The whole batch in every process, without its padding: float32 (B, D), rows int64 (B,)"""
    rows, weights = share.views.to(encoded.device), share.weights.to(encoded.device)
    if accelerator.num_processes > 1:
        encoded, rows, weights = accelerator.gather((encoded, rows, weights))
    return encoded[weights > 0], rows[weights > 0]
