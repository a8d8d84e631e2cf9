"""Where an image's pixels go: chosen first, as plain numbers, then done to pixels, masks and boxes alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretrain.transfer.detection.config import AugmentConfig, EvaluateConfig

FIRST_PX = (400, 500, 600)  # shorter side before the crop that may precede the multi-scale resizing
CROP_PX = (384, 600)  # least and largest side of that crop


@dataclass(frozen=True)
class Placement:
    """A part of an image, resized and perhaps mirrored."""

    left: float  # of the part, in px of the image
    top: float
    right: float
    bottom: float
    width: int  # of the part after resizing, in px
    height: int
    flip: bool = False  # left to right

    def pixels(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (H, W) or (H, W, 3) -> (height, width) or (height, width, 3), bilinear and antialiased"""
        # cut to whole pixels first, so that a small part of a large image is cheap
        left, top = math.floor(self.left), math.floor(self.top)
        part = image[top : math.ceil(self.bottom), left : math.ceil(self.right)]
        box = (self.left - left, self.top - top, self.right - left, self.bottom - top)
        if box != (0, 0, self.width, self.height):
            whole = Image.fromarray(np.ascontiguousarray(part))
            part = np.asarray(whole.resize((self.width, self.height), Image.Resampling.BILINEAR, box=box))
        return np.array(part[:, ::-1] if self.flip else part)  # a copy: Pillow lends read-only memory

    def mask(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (H, W) of 0 and 1 -> (height, width) of the same: 1 where at least half a pixel is inside"""
        return (self.pixels(mask * np.uint8(255)) >= 128).astype(np.uint8)

    def boxes(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 4) in the image -> (N, 4) in the part, cut off at its edges: some may be left without area"""
        corner, limit = np.array([self.left, self.top] * 2), np.array([self.width, self.height] * 2)
        moved: NDArray[np.float64] = ((boxes - corner) * np.array(self.scales * 2)).clip(0, limit)
        if self.flip:
            moved[:, [0, 2]] = self.width - moved[:, [2, 0]]
        return moved

    def boxes_back(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 4) in the part, not flipped -> (N, 4) in the image"""
        assert not self.flip
        moved: NDArray[np.float64] = boxes / np.array(self.scales * 2) + np.array([self.left, self.top] * 2)
        return moved

    @property
    def scales(self) -> tuple[float, float]:
        """Along x and y"""
        return self.width / (self.right - self.left), self.height / (self.bottom - self.top)


def place_for_training(rng: np.random.Generator, height: int, width: int, config: AugmentConfig) -> Placement:
    """Draw what becomes of a (height, width) px image."""
    flip = bool(rng.random() < config.flip_ratio)
    if config.kind == "multi_scale":
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
        if rng.random() < config.crop_ratio:
            left, top, right, bottom = _first_crop(rng, height, width)
        shortest_px = int(rng.choice(config.shortest_px))
        size = _fitted(bottom - top, right - left, shortest_px, config.longest_px)
        return Placement(left, top, right, bottom, size[1], size[0], flip)
    factor = float(rng.uniform(*config.scale))
    if config.kind == "jitter":
        factor *= config.size_px / max(height, width)
    return _cut_to_square(rng, height, width, factor, config.size_px, flip)


def place_for_testing(height: int, width: int, config: EvaluateConfig) -> Placement:
    """The whole image at the size that a detector is tested at."""
    shortest_px = config.shortest_px or min(height, width)
    size = _fitted(height, width, shortest_px, config.longest_px)
    return Placement(0.0, 0.0, float(width), float(height), size[1], size[0])


def _fitted(height: float, width: float, shortest_px: int, longest_px: int | None) -> tuple[int, int]:
    """Height and width with the shorter side at `shortest_px`, or the longer one at `longest_px` if less."""
    scale = shortest_px / min(height, width)
    if longest_px is not None:
        scale = min(scale, longest_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _first_crop(rng: np.random.Generator, height: int, width: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a crop whose sides are drawn at a scale that is drawn, too."""
    scale = int(rng.choice(FIRST_PX)) / min(height, width)
    sides = []
    for side in (width, height):
        scaled = side * scale
        low, high = min(scaled, CROP_PX[0]), min(scaled, CROP_PX[1])
        length = rng.uniform(low, high) / scale
        start = rng.uniform(0, side - length)
        sides.append((start, min(float(side), start + length)))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def _cut_to_square(
    rng: np.random.Generator, height: int, width: int, factor: float, size_px: int, flip: bool
) -> Placement:
    """Resize by `factor` and take a random part of at most `size_px` a side."""
    ends = []
    for side in (width, height):
        scaled = max(1, round(side * factor))
        kept = min(size_px, scaled)
        start = int(rng.integers(0, scaled - kept + 1))
        ends.append((start * side / scaled, (start + kept) * side / scaled, kept))
    (left, right, new_width), (top, bottom, new_height) = ends
    return Placement(left, top, right, bottom, new_width, new_height, flip)
