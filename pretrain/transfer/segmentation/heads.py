"""Heads that turn feature maps into logits: SETR's three for a ViT, and UPerNet's for a Swin.

SETR: Zheng et al., 2021, arXiv:2012.15840; layers, bias and resizing as in its release. UPerNet: Xiao et al.,
2018, arXiv:1807.10221. A head takes the maps it is made for and the size (H, W) of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


def resized(maps: Tensor, size: Size, align_corners: bool = False) -> Tensor:
    """Bilinear: (B, C, h, w) -> (B, C, *size)"""
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def enlarged(maps: Tensor, factor: int, align_corners: bool = False) -> Tensor:
    return resized(maps, (maps.shape[2] * factor, maps.shape[3] * factor), align_corners)


def conv_norm_relu(wide_in: int, wide_out: int, kernel: int, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(wide_in, wide_out, kernel, padding=kernel // 2, bias=bias),
        nn.BatchNorm2d(wide_out),
        nn.ReLU(inplace=True),
    )


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of every place."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NaiveHead(nn.Module):
    """One hidden layer at the patches' grid; the decoder, and the auxiliary heads, of SETR-Naive."""

    def __init__(self, embed_dim: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = MapNorm(embed_dim)
        self.hidden = conv_norm_relu(embed_dim, channels, 1, bias=True)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, patches: Tensor, size: Size) -> Tensor:
        """(B, D, h, w) -> (B, K, *size)"""
        return resized(self.classify(self.hidden(self.norm(patches))), size)


class PupHead(nn.Module):
    """Progressive upsampling: four layers, twice as large after each of the first three, then to `size`."""

    def __init__(self, embed_dim: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = MapNorm(embed_dim)
        dims = (embed_dim, channels, channels, channels)
        self.layers = nn.ModuleList(conv_norm_relu(dim, channels, 3, bias=True) for dim in dims)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, patches: Tensor, size: Size) -> Tensor:
        """(B, D, h, w) -> (B, K, *size); with patches of 16 px the last step doubles too"""
        maps = self.norm(patches)
        for number, layer in enumerate(self.layers):
            maps = layer(enlarged(maps, 2) if number else maps)
        return resized(self.classify(maps), size)


class PupAuxiliary(nn.Module):
    """A layer at the patches' grid, four times as large, classes, then to `size`."""

    def __init__(self, embed_dim: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = MapNorm(embed_dim)
        self.hidden = conv_norm_relu(embed_dim, channels, 3, bias=True)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, patches: Tensor, size: Size) -> Tensor:
        """(B, D, h, w) -> (B, K, *size)"""
        return resized(self.classify(enlarged(self.hidden(self.norm(patches)), 4)), size)


class MlaNeck(nn.Module):
    """Multi-level aggregation: each level gets the sum of itself and all that are deeper.

    In SETR's release it belongs to the backbone, and so learns at its rate.
    """

    def __init__(self, embed_dim: int, channels: int, num_levels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapNorm(embed_dim) for _ in range(num_levels))
        self.reduce = nn.ModuleList(conv_norm_relu(embed_dim, channels, 1) for _ in range(num_levels))
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in range(num_levels))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Shallow to deep: (B, D, h, w) each -> (B, channels, h, w) each"""
        reduced = [
            reduce(norm(level)) for level, norm, reduce in zip(levels, self.norms, self.reduce, strict=True)
        ]
        for number in reversed(range(len(reduced) - 1)):
            reduced[number] = reduced[number + 1] + reduced[number]
        return [smooth(level) for smooth, level in zip(self.smooth, reduced, strict=True)]


class MlaHead(nn.Module):
    """Two layers on each level, all four times as large and side by side, then classes."""

    def __init__(self, channels: int, num_classes: int, num_levels: int) -> None:
        super().__init__()
        narrow = channels // 2
        self.layers = nn.ModuleList(
            nn.Sequential(conv_norm_relu(channels, narrow, 3), conv_norm_relu(narrow, narrow, 3))
            for _ in range(num_levels)
        )
        self.classify = nn.Conv2d(num_levels * narrow, num_classes, 3, padding=1)

    def forward(self, levels: Sequence[Tensor], size: Size) -> Tensor:
        """(B, channels, h, w) each -> (B, K, *size)"""
        grown = [
            enlarged(layer(level), 4, align_corners=True)
            for layer, level in zip(self.layers, levels, strict=True)
        ]
        return resized(self.classify(torch.cat(grown, dim=1)), size)


class MlaAuxiliary(nn.Module):
    """Classes of one level of the neck."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(channels, num_classes, 1, bias=False)

    def forward(self, level: Tensor, size: Size) -> Tensor:
        """(B, channels, h, w) -> (B, K, *size)"""
        return resized(self.classify(level), size)


class StageNorms(nn.Module):
    """A fresh LayerNorm on each stage of a Swin, before decoder and auxiliary head read it."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapNorm(dim, eps=1e-5) for dim in dims)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        return [norm(stage) for norm, stage in zip(self.norms, stages, strict=True)]


class UperHead(nn.Module):
    """Pyramid pooling on the last stage, a top-down pyramid over all, then classes at the finest stage."""

    def __init__(
        self,
        dims: Sequence[int],
        channels: int,
        num_classes: int,
        dropout_ratio: float,
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__()
        self.pool_sizes = tuple(pool_sizes)
        self.pooled = nn.ModuleList(conv_norm_relu(dims[-1], channels, 1) for _ in pool_sizes)
        self.join_pooled = conv_norm_relu(dims[-1] + len(pool_sizes) * channels, channels, 3)
        self.lateral = nn.ModuleList(conv_norm_relu(dim, channels, 1) for dim in dims[:-1])
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in dims[:-1])
        self.join_stages = conv_norm_relu(len(dims) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout_ratio)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        _initialize(self)

    def forward(self, stages: Sequence[Tensor], size: Size) -> Tensor:
        """Fine to coarse, (B, C_i, h_i, w_i) -> (B, K, *size)"""
        last = stages[-1]
        grid = (last.shape[2], last.shape[3])
        pooled = [
            resized(layer(F.adaptive_avg_pool2d(last, pool_size)), grid)
            for layer, pool_size in zip(self.pooled, self.pool_sizes, strict=True)
        ]
        maps = [layer(stage) for layer, stage in zip(self.lateral, stages[:-1], strict=True)]
        maps.append(self.join_pooled(torch.cat([last, *pooled], dim=1)))
        for number in reversed(range(len(maps) - 1)):
            finer = maps[number]
            maps[number] = finer + resized(maps[number + 1], (finer.shape[2], finer.shape[3]))
        smooth = [layer(one) for layer, one in zip(self.smooth, maps[:-1], strict=True)]
        finest = (maps[0].shape[2], maps[0].shape[3])
        joined = self.join_stages(torch.cat([resized(one, finest) for one in (*smooth, maps[-1])], dim=1))
        return resized(self.classify(self.dropout(joined)), size)


class FcnAuxiliary(nn.Module):
    """One layer on one stage of a Swin, then classes."""

    def __init__(self, dim: int, num_classes: int, dropout_ratio: float, channels: int = 256) -> None:
        super().__init__()
        self.hidden = conv_norm_relu(dim, channels, 3)
        self.dropout = nn.Dropout2d(dropout_ratio)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        _initialize(self)

    def forward(self, stage: Tensor, size: Size) -> Tensor:
        """(B, C, h, w) -> (B, K, *size)"""
        return resized(self.classify(self.dropout(self.hidden(stage))), size)


def _initialize(head: nn.Module) -> None:
    """He's initialisation of hidden layers, small weights for the last one."""
    for name, layer in head.named_modules():
        if isinstance(layer, nn.Conv2d):
            if name == "classify":
                nn.init.normal_(layer.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
