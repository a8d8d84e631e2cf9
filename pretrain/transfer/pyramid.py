"""Feature pyramids: from a ViT's single map (arXiv:2203.16527, section 3), and from a Swin's four stages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

SCALES = (4.0, 2.0, 1.0, 0.5)  # of the map, for patches of 14 px and more
SMALL_PATCH_SCALES = {8: (2.0, 1.0, 0.5, 0.25), 4: (1.0, 0.5, 0.25, 0.125)}  # strides of 4 to 32 px as well
COARSEST = "pool"  # torchvision's name for the map below the last


class SimpleFeaturePyramid(nn.Module):
    """Four maps from one by transposed convolutions and max-pooling, each with two convolutions and norms."""

    def __init__(self, dim: int, patch_px: int, channels: int) -> None:
        super().__init__()
        scales = SMALL_PATCH_SCALES.get(patch_px, SCALES)
        self.levels = nn.ModuleList(_level(dim, scale, channels) for scale in scales)
        strides = [patch_px / scale for scale in scales]
        self.strides = (*strides, 2 * strides[-1])
        self.num_channels = (channels,) * 5

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """(B, D, h, w) -> names "0" to "3" and "pool", from fine to coarse"""
        maps = {str(number): level(features) for number, level in enumerate(self.levels)}
        return maps | {COARSEST: F.max_pool2d(maps["3"], kernel_size=1, stride=2)}


def _level(dim: int, scale: float, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = dim
    for number in range(round(math.log2(scale)) if scale > 1 else 0):
        if number:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        width //= 2
    layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-round(math.log2(scale)) if scale < 1 else 0)]
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


class FeaturePyramid(nn.Module):
    """A new norm for each stage, then torchvision's FPN (arXiv:1612.03144) over all of them."""

    def __init__(self, dims: Sequence[int], strides: Sequence[int], channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(dim) for dim in dims)
        self.fpn = FeaturePyramidNetwork(list(dims), channels)
        self.strides = (*map(float, strides), 2.0 * strides[-1])
        self.num_channels = (channels,) * (len(dims) + 1)

    def forward(self, stages: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps (B, C, h, w) from fine to coarse -> names "0", "1" ... and "pool" """
        normed = {
            str(number): norm(stage)
            for number, (norm, stage) in enumerate(zip(self.norms, stages, strict=True))
        }
        maps: dict[str, Tensor] = self.fpn(normed)
        return maps | {COARSEST: F.max_pool2d(maps[str(len(stages) - 1)], kernel_size=1, stride=2)}
