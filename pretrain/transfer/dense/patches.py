"""Patch tokens of frozen weights, and what share of each patch every class fills."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.decode import image_size
from pretrain.errors import UserError
from pretrain.evaluate.features import LOG_EVERY_SECONDS
from pretrain.evaluate.frozen import HALF_FROM_BYTES
from pretrain.transfer.hooks import TransferBackbone
from pretrain.transfer.segmentation.augment import resize_image
from pretrain.transfer.segmentation.scenes import MAX_PIXELS, SceneSet
from pretrain.transfer.segmentation.scores import IGNORED

LONGER_SIDE = 32  # patches, where no size is asked for; DINOv2's crops of 512 px are 32 patches of 16

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # (height, width)
Read = tuple[Tensor, Tensor]  # pixels, areas of the classes


@dataclass(frozen=True)
class Patches:
    """All patches of a split: image by image, row by row, as many of each image."""

    features: Tensor  # (N, D) float32 or float16, finite, on the host
    targets: Tensor  # (N, K) float32: share of each class in what is labelled of a patch; 0 where all is void
    num_images: int

    def rows_of(self, images: Tensor) -> Tensor:
        """The patches of some images that have a label: int64 (R,), in their order."""
        wanted = torch.zeros(self.num_images, dtype=torch.bool)
        wanted[images] = True
        of_images = wanted.repeat_interleave(len(self.targets) // self.num_images)
        return (of_images & self.targets.any(dim=1)).nonzero().squeeze(1)

    def labelled_images(self) -> Tensor:
        """Those with any label: int64 (M,)"""
        return self.targets.view(self.num_images, -1).any(dim=1).nonzero().squeeze(1)


def class_areas(classes: NDArray[np.uint8], grid: Size, num_classes: int) -> Tensor:
    """The area that each class fills of each patch: float64 (P, K), patches row by row.

    classes: (H, W) of 0..K-1 and IGNORED, which no class counts. A pixel that lies in several patches
    counts in each with its part. The unit is a pixel divided by P, in which every area is a whole number: the
    areas are exact.
    """
    down, right = (_overlaps(side, count) for side, count in zip(classes.shape, grid, strict=True))
    areas = torch.zeros(grid[0] * grid[1], num_classes, dtype=torch.float64)
    for number in np.unique(classes):
        if number != IGNORED:
            filled = torch.from_numpy(classes == number).double()
            areas[:, int(number)] = (down @ filled @ right.T).flatten()
    return areas


def shares(areas: Tensor) -> Tensor:
    """Share of each class in what has a label, 0 where nothing has: float64 (P, K) -> float32 (P, K)"""
    return (areas / areas.sum(dim=1, keepdim=True).clamp(min=1)).float()


def _overlaps(side: int, count: int) -> Tensor:
    """How much of each of `side` pixels lies in each of `count` equal parts, in 1/count of a pixel.

    float64 (count, side), whole numbers: 3 pixels in 2 parts give [[2, 1, 0], [0, 1, 2]].
    """
    parts, pixels = side * torch.arange(count + 1), count * torch.arange(side + 1)
    first = torch.maximum(parts[:-1, None], pixels[None, :-1])
    last = torch.minimum(parts[1:, None], pixels[None, 1:])
    return (last - first).clamp_(min=0).double()


def choose_size(train: SceneSet, stride_px: int) -> Size:
    """(height, width) in whole patches, of the shape that most train images have.

    The longer side has 32 patches, or as many as fit into the image where those are fewer.
    """
    sizes = Counter(image_size(scene.image.read_bytes(), MAX_PIXELS) for scene in train.split.scenes)
    ((size, _),) = sizes.most_common(1)
    longer = min(LONGER_SIDE * stride_px, max(stride_px, max(size) // stride_px * stride_px))
    height, width = (max(1, round(side * longer / max(size) / stride_px)) * stride_px for side in size)
    return height, width


def check_size(size_px: Size, stride_px: int) -> None:
    """Raises UserError for a size that is not whole patches."""
    if any(side <= 0 or side % stride_px for side in size_px):
        near = [max(1, round(side / stride_px)) * stride_px for side in size_px]
        raise UserError(
            f"--size-px {size_px[0]} {size_px[1]}: not whole patches of {stride_px} px; "
            f"use {near[0]} {near[1]}"
        )


def prepared(image: NDArray[np.uint8], size_px: Size) -> Tensor:
    """uint8 (H, W, 3) -> uint8 (3, *size_px)"""
    resized = resize_image(image, size_px) if image.shape[:2] != size_px else image
    return torch.from_numpy(np.ascontiguousarray(resized)).permute(2, 0, 1)


@torch.inference_mode()
def patch_tokens(network: TransferBackbone, pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W), on the network's device -> float32 (B, P, D), row by row, after the final norm"""
    mean, std = (pixels.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (network.mean, network.std))
    features = network((pixels.float() / 255 - mean) / std)
    assert isinstance(features, Tensor)
    return features.flatten(2).mT.float()


def take_patches(
    network: TransferBackbone, scenes: SceneSet, size_px: Size, batch_size: int, device: torch.device
) -> Patches:
    """Encode every image once. network: gives a map, in eval mode, on `device`."""
    num_classes = len(scenes.labels.classes)
    stride_px = int(network.strides[-1])
    grid = size_px[0] // stride_px, size_px[1] // stride_px
    per_image = grid[0] * grid[1]
    num_rows, width = len(scenes) * per_image, network.out_channels
    dtype = torch.float16 if 4 * num_rows * width > HALF_FROM_BYTES else torch.float32
    logger.info(
        "train: %d images of %d x %d px, %d patches each; the features take %.2f GiB",
        len(scenes),
        *size_px,
        per_image,
        num_rows * width * dtype.itemsize / 2**30,
    )
    features = torch.empty(num_rows, width, dtype=dtype)
    targets = torch.empty(num_rows, num_classes)

    def read(index: int) -> Read:
        areas = class_areas(scenes.classes_of(index), grid, num_classes)
        return prepared(scenes.image(index), size_px), areas

    first, noted = 0, time.monotonic()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for batch in _batches(pool, read, len(scenes), batch_size):
            images, of_classes = zip(*batch, strict=True)
            rows = slice(first, first + len(batch) * per_image)
            encoded = patch_tokens(network, torch.stack(images).to(device)).flatten(0, 1)
            if not encoded.isfinite().all():
                raise UserError(
                    "the network gives features that are NaN or Inf; its weights or its input are broken"
                )
            features[rows] = encoded.to("cpu", dtype)
            targets[rows] = shares(torch.cat(of_classes))
            first = rows.stop
            if time.monotonic() - noted > LOG_EVERY_SECONDS:
                noted = time.monotonic()
                logger.info("encoded %d of %d images", first // per_image, len(scenes))
    return Patches(features, targets, len(scenes))


def _batches(
    pool: ThreadPoolExecutor, read: Callable[[int], Read], count: int, batch_size: int
) -> Iterator[list[Read]]:
    """What `read` makes of 0..count-1, in order; the next batch is read meanwhile."""
    indices = iter(range(count))

    def begin() -> list[Future[Read]]:
        return [pool.submit(read, index) for index in itertools.islice(indices, batch_size)]

    current = begin()
    while current:
        following = begin()
        yield [one.result() for one in current]
        current = following
