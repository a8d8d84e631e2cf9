"""Small labelled street scenes of three colours, in the layouts that segmentation reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("sky", "road", "car")
COLOURS = np.array([(60, 120, 230), (90, 90, 90), (210, 40, 40)], dtype=np.uint8)
IGNORED = 255


def scene(seed: int, height: int = 32, width: int = 48) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Sky over a road, a box for a car, a black unlabelled frame: uint8 (H, W, 3), uint8 (H, W)."""
    rng = np.random.default_rng(seed)
    classes = np.zeros((height, width), dtype=np.uint8)
    horizon = int(rng.integers(height // 4, height // 2))
    classes[horizon:] = 1
    top, left = int(rng.integers(horizon, height - 8)), int(rng.integers(2, width - 14))
    classes[top : top + 6, left : left + 12] = 2
    noise = rng.integers(-15, 16, (height, width, 3))
    image = np.clip(COLOURS[classes].astype(np.int64) + noise, 0, 255).astype(np.uint8)
    classes[:1], image[:1] = IGNORED, 0
    return image, classes


def save_mask(path: Path, values: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_folder(folder: Path, num_train: int = 6, num_val: int = 3, **size: int) -> Path:
    """images/SPLIT, masks/SPLIT and classes.txt; images as PNG, so that nothing is lost."""
    for split, first, count in (("train", 0, num_train), ("val", 100, num_val)):
        for number in range(first, first + count):
            image, classes = scene(number, **size)
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "images" / split / f"{number:03d}.png")
            save_mask(folder / "masks" / split / f"{number:03d}.png", classes)
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return folder
