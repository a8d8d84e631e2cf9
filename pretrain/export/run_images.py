"""A few images as a run saw them, to measure on what a change of its backbone does."""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from pretrain.data.batch import DataConfig
from pretrain.data.decode import BadImage, decode
from pretrain.data.location import parse_location
from pretrain.data.reader import read_split
from pretrain.data.sources import open_splits
from pretrain.errors import DataError, UserError
from pretrain.export.source import RunWeights

NUM_IMAGES = 16


def images_of_run(source: RunWeights, count: int = NUM_IMAGES) -> tuple[Tensor, str]:
    """Images (B, 3, H, W), cropped from the centre and normalised as the run's, and what they are.

    The first of the run's data where these lie on this machine unchanged; else seeded noise.
    """
    try:
        return _from_data(source, count)
    except (UserError, BadImage, ValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
    noise = torch.randn(count, 3, *source.image_size, generator=torch.Generator().manual_seed(0))
    return noise, f"{count} images of seeded noise ({reason})"


def _from_data(source: RunWeights, count: int) -> tuple[Tensor, str]:
    config = DataConfig.model_validate(source.config.get("data"))
    for place in config.all_sources:
        if not parse_location(place.shards).is_local:
            raise DataError("the run's data are not on this machine")
    split = open_splits(config)[0]
    if source.manifest_hashes and split.manifest.hash != source.manifest_hashes[0]:
        raise DataError(f"{split.manifest.folder} holds other data than those of the run")
    crops = []
    for sample in islice(read_split(split), count):
        if sample.is_intact:
            crops.append(_centre(torch.from_numpy(decode(sample.image)).permute(2, 0, 1), source.image_size))
    if not crops:
        raise DataError(f"{split.manifest.folder}: no image can be read")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (source.mean, source.std))
    images = (torch.stack(crops) - mean) / std
    return images, f"the first {len(images)} images of {split.manifest.folder} ({split.name})"


def _centre(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W) -> float32 (3, height, width) in [0, 1]: resized to cover the size, centre cut out"""
    scale = max(wanted / side for wanted, side in zip(size, pixels.shape[1:], strict=True))
    covering = [max(wanted, round(side * scale)) for wanted, side in zip(size, pixels.shape[1:], strict=True)]
    resized = pixels.float().unsqueeze(0)
    if covering != list(pixels.shape[1:]):
        resized = F.interpolate(resized, covering, mode="bicubic", antialias=True)
    top, left = ((side - wanted) // 2 for side, wanted in zip(covering, size, strict=True))
    cut = resized[0, :, top : top + size[0], left : left + size[1]]
    return cut.clamp(0, 255) / 255
