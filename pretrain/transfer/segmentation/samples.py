"""Training samples and batches of a segmentation, and how their pixels reach the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.transfer.segmentation.augment import augmented
from pretrain.transfer.segmentation.recipe import SegmentationRecipe
from pretrain.transfer.segmentation.scenes import SceneSet
from pretrain.transfer.segmentation.scores import IGNORED


@dataclass(frozen=True)
class Samples:
    """Augmented crops, all of one size; what an image does not fill has no label."""

    scenes: SceneSet
    recipe: SegmentationRecipe

    def __len__(self) -> int:
        return len(self.scenes)

    def load(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """pixels: uint8 (3, S, S), classes: uint8 (S, S), size: int64 (2,), filled height and width"""
        recipe = self.recipe
        image, classes = augmented(
            self.scenes.image(index),
            self.scenes.classes_of(index),
            recipe.augment,
            recipe.crop_px,
            recipe.data.fit_px,
            rng,
        )
        height, width = classes.shape
        pixels = torch.zeros(3, recipe.crop_px, recipe.crop_px, dtype=torch.uint8)
        pixels[:, :height, :width] = torch.from_numpy(image).permute(2, 0, 1)
        padded = torch.full((recipe.crop_px, recipe.crop_px), IGNORED, dtype=torch.uint8)
        padded[:height, :width] = torch.from_numpy(classes)
        return {"pixels": pixels, "classes": padded, "size": torch.tensor([height, width])}

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def normalised(pixels: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, and zero, the mean colour, beyond the size (B, 2) of each image."""
    centre, scale = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    down = torch.arange(pixels.shape[2], device=pixels.device) < sizes[:, :1]  # (B, H)
    right = torch.arange(pixels.shape[3], device=pixels.device) < sizes[:, 1:]  # (B, W)
    filled = (down[:, :, None] & right[:, None, :])[:, None]
    return torch.where(filled, (pixels.float() / 255 - centre) / scale, 0.0)


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
