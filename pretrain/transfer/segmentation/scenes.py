"""Images and their labels as arrays, and all that can be wrong with them, told before the work begins."""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from pretrain.data.decode import BadImage, decode, image_size
from pretrain.data.image_header import png_without_metadata
from pretrain.errors import DataError
from pretrain.transfer.segmentation.folders import Labels, Scene, Split
from pretrain.transfer.segmentation.scores import IGNORED

MAX_PIXELS = 100_000_000
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "a palette", 4: "grey with transparency", 6: "RGBA"}

Values = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class SceneSet:
    """A split whose files were all looked at."""

    split: Split
    labels: Labels
    pixels: Tensor  # labelled pixels by class: int64 (K,)
    num_ignored: int
    sha256: str  # of names and mask values: what a result is about

    def __len__(self) -> int:
        return len(self.split.scenes)

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 (H, W, 3)"""
        return read_image(self.split.scenes[index].image)

    def classes_of(self, index: int) -> NDArray[np.uint8]:
        """uint8 (H, W) of 0..K-1 and IGNORED"""
        scene = self.split.scenes[index]
        values = read_mask(scene.mask)
        table = np.full(int(values.max(initial=0)) + 1, IGNORED, dtype=np.uint8)
        for value, number in self.labels.class_of.items():
            if value < len(table):
                table[value] = number
        return table[values]

    def describe(self) -> dict[str, Any]:
        return {
            "folder": str(self.split.folder),
            "split": self.split.name,
            "num_images": len(self),
            "sha256": self.sha256,
        }


def open_scenes(split: Split, labels: Labels, num_threads: int | None = None) -> SceneSet:
    """Look at every file of a split: sizes of images, kind, sizes and values of masks.

    Raises DataError with the first thing that is wrong, in one line.
    """
    counts: Counter[int] = Counter()
    digest = hashlib.sha256()
    unknown: dict[int, list[tuple[Path, int]]] = {}
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        for scene, values in zip(split.scenes, pool.map(_look_at, split.scenes), strict=True):
            counts.update(values)
            digest.update(f"{scene.name}:{sorted(values.items())}\n".encode())
            for value, count in values.items():
                if value not in labels.class_of:
                    unknown.setdefault(value, []).append((scene.mask, count))
    if unknown:
        raise DataError(_tell_unknown(unknown, labels))
    pixels = torch.zeros(len(labels.classes), dtype=torch.int64)
    for value, number in labels.class_of.items():
        if number != IGNORED:
            pixels[number] += counts[value]
    if not pixels.any():
        raise DataError(
            f"{split.folder}: the masks of split '{split.name}' label no pixel (public test sets keep their "
            "labels to themselves); choose another split"
        )
    num_ignored = counts.total() - int(pixels.sum())
    return SceneSet(split, labels, pixels, num_ignored, digest.hexdigest())


def read_image(path: Path) -> NDArray[np.uint8]:
    """uint8 (H, W, 3)"""
    try:
        return decode(path.read_bytes(), max_pixels=MAX_PIXELS)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except BadImage as error:
        raise DataError(f"{path}: cannot be decoded ({error}); replace or remove it") from None


def read_mask(path: Path) -> Values:
    """The values of a grey PNG of 8 or 16 bits: (H, W)."""
    try:
        data = path.read_bytes()
        _mask_size(data, path)
        # without metadata, so that no damage and no bomb in it matters
        with PngImageFile(io.BytesIO(png_without_metadata(data))) as image:
            is_wide = image.mode.startswith("I")
            values = np.asarray(image)
            return values.astype(np.uint16) if is_wide else values.astype(np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); replace or remove it") from None


def _mask_size(data: bytes, path: Path) -> tuple[int, int]:
    """(height, width); refuses what is not a grey PNG of 8 or 16 bits."""
    if not data.startswith(_PNG_SIGNATURE) or len(data) < 33:
        raise DataError(f"{path}: is not a PNG; masks are grey PNGs whose values are the classes")
    width, height = struct.unpack_from(">II", data, 16)
    depth, colour = data[24], data[25]
    if colour != 0 or depth < 8:
        kind = f"{_COLOUR_TYPES.get(colour, 'unknown')} of {depth} bits"
        raise DataError(
            f"{path}: the mask is {kind}; save it as grey PNG of 8 bits whose values are the classes "
            "(of a palette: its indices, not its colours)"
        )
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: {height} x {width} px are more than {MAX_PIXELS} pixels")
    return height, width


def _look_at(scene: Scene) -> dict[int, int]:
    """Pixels by value of a mask whose size is its image's."""
    values = read_mask(scene.mask)
    try:
        size = image_size(scene.image.read_bytes(), MAX_PIXELS)
    except OSError as error:
        raise DataError(f"{scene.image}: cannot be read ({error.strerror})") from None
    except BadImage as error:
        raise DataError(f"{scene.image}: cannot be decoded ({error}); replace or remove it") from None
    if size != values.shape:
        raise DataError(
            f"{scene.mask}: {values.shape[0]} x {values.shape[1]} px, but its image {scene.image.name} has "
            f"{size[0]} x {size[1]} px; a mask has its image's size"
        )
    counts = np.bincount(values.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _tell_unknown(unknown: dict[int, list[tuple[Path, int]]], labels: Labels) -> str:
    def parts() -> Iterator[str]:
        for value in sorted(unknown)[:5]:
            places = unknown[value]
            pixels = sum(count for _, count in places)
            yield f"{value} ({pixels} px in {len(places)} masks, first {places[0][0]})"
        if len(unknown) > 5:
            yield f"and {len(unknown) - 5} more"

    return f"masks hold values that are unknown to {labels.ids}: {', '.join(parts())}"
