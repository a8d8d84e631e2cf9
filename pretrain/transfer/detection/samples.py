"""Images with their objects as a detector is trained on them, and as it is tested."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.transfer.detection.coco import CocoSet
from pretrain.transfer.detection.config import AugmentConfig, EvaluateConfig
from pretrain.transfer.detection.geometry import Placement, place_for_testing, place_for_training
from pretrain.transfer.detection.masks import decode, tight_boxes

SMALLEST_PX = 1.0  # side of a box that is still learnt after a crop
TRIES = 10  # to find a crop with an object in it


class Sample(NamedTuple):  # which a loader can pin
    """One image, ready but for its normalisation; and what is to be found in it."""

    image: Tensor  # uint8 (3, H, W)
    boxes: Tensor  # float32 (N, 4): x0, y0, x1, y1
    labels: Tensor  # int64 (N,), from 1 on
    masks: Tensor | None  # uint8 (N, H, W) of 0 and 1


class DetectionSamples:
    """The training images of a split. Crowds are not learnt, nor taken for background on purpose."""

    def __init__(self, found: CocoSet, config: AugmentConfig, masks: bool, skip_empty: bool) -> None:
        self.found, self.config, self.masks = found, config, masks
        image_of = np.repeat(np.arange(len(found)), np.diff(found.starts))  # (N,)
        num_objects = np.bincount(image_of[~found.crowds], minlength=len(found))
        self.kept = np.flatnonzero(num_objects) if skip_empty else np.arange(len(found))

    def __len__(self) -> int:
        return len(self.kept)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """One image, augmented; another draw if no object is left in it, unless it has none anyway."""
        place = int(self.kept[index])
        image = self.found.image(place)
        height, width = image.shape[:2]
        rows = self.found.rows(place)
        rows = rows[~self.found.crowds[rows]]
        for _ in range(TRIES):
            placement = place_for_training(rng, height, width, self.config)
            sample = self._placed(image, rows, placement)
            if len(sample.labels) or not len(rows):
                break
        return sample

    def _placed(self, image: NDArray[np.uint8], rows: NDArray[np.int64], placement: Placement) -> Sample:
        boxes = placement.boxes(self.found.boxes[rows])
        sides = boxes[:, 2:] - boxes[:, :2]
        visible = (sides >= SMALLEST_PX).all(axis=1)
        rows, boxes = rows[visible], boxes[visible]
        masks = None
        if self.masks:
            height, width = image.shape[:2]
            drawn = [
                placement.mask(decode(self.found.segmentation(row) or [], height, width)) for row in rows
            ]
            masks = np.stack([np.zeros((placement.height, placement.width), np.uint8), *drawn])[1:]
            there = masks.any(axis=(1, 2))
            rows, masks = rows[there], masks[there]
            boxes = tight_boxes(masks).astype(np.float64)
        return Sample(
            image=torch.from_numpy(placement.pixels(image)).permute(2, 0, 1),
            boxes=torch.from_numpy(boxes.astype(np.float32)),
            labels=torch.from_numpy(self.found.labels[rows]),
            masks=None if masks is None else torch.from_numpy(masks),
        )

    def collate(self, samples: list[Sample]) -> list[Sample]:
        return samples


def image_for_testing(found: CocoSet, place: int, config: EvaluateConfig) -> tuple[Tensor, Placement]:
    """uint8 (3, H, W), and how it was placed"""
    height, width = found.sizes[place].tolist()
    placement = place_for_testing(height, width, config)
    return torch.from_numpy(placement.pixels(found.image(place))).permute(2, 0, 1), placement
