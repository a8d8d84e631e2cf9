"""Decoders that reconstruct from what an encoder saw: pixels from its levels, or what hidden patches held."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNorm2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.initial import trunc_normal_linears, xavier_linears
from pretrain.models.positions import sincos_positions


def transformer_blocks(dim: int, depth: int, num_heads: int) -> nn.Sequential:
    """Pre-norm blocks as in ViT: MLP ratio 4, biases for query, key and value. (M, N, D) -> the same"""
    if dim % num_heads:
        raise ConfigError(
            f"decoder: a width of {dim} does not divide into {num_heads} attention heads; "
            f"make the width a multiple of {num_heads} or change the number of heads"
        )
    return nn.Sequential(*[Block(dim, num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(depth)])


# --- pixels from several levels


def tap_indices(num_blocks: int, num_levels: int) -> tuple[int, ...]:
    """Zero-based indices of the blocks whose outputs are decoded, evenly spaced, shallow to deep."""
    if not 1 <= num_levels <= num_blocks:
        raise ConfigError(
            f"levels: {num_levels} cannot be read from {num_blocks} blocks; use 1 to {num_blocks}"
        )
    return tuple(num_blocks // num_levels * k - 1 for k in range(1, num_levels + 1))


class TokenFusion(nn.Module):
    """Fuse two levels by a 1 x 1 convolution and transformer blocks over all places of the map."""

    def __init__(self, wide_in: int, dim: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(wide_in, dim, kernel_size=1)
        self.blocks = transformer_blocks(dim, num_layers, num_heads)
        trunc_normal_linears(self.blocks)

    def forward(self, joined: Tensor) -> Tensor:
        """(M, C_in, h, w) -> (M, C, h, w)"""
        reduced: Tensor = self.reduce(joined)
        tokens: Tensor = self.blocks(reduced.flatten(2).mT)  # (M, h * w, C)
        return tokens.mT.reshape(reduced.shape)


def _conv_fusion(wide_in: int, dim: int, num_layers: int) -> nn.Sequential:
    """Fuse two levels by 3 x 3 convolutions, each with a ReLU. (M, C_in, h, w) -> (M, C, h, w)"""
    layers: list[nn.Module] = []
    for width in [wide_in, *[dim] * (num_layers - 1)]:
        layers += [nn.Conv2d(width, dim, kernel_size=3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class FusionDecoder(nn.Module):
    """Pixels of a view from features of several depths, fused deep to shallow (RePre; Wang et al., 2022,
    arXiv:2201.06857).

    dims, strides_px: width of each level and the side of the square of pixels behind one place of its map,
    shallow to deep. All strides of a ViT are its patch size; those of a hierarchical backbone grow by whole
    factors. With one level only the last convolution remains.
    `num_layers` and `kind` say what fuses two levels: 3 x 3 convolutions, or transformer blocks with
    `num_heads` (None: one head for each 64 channels). `dec_dim` first projects every level to one smaller
    width. `tap_norm` "own" gives each level its own layer norm.
    """

    def __init__(
        self,
        dims: Sequence[int],
        strides_px: Sequence[int],
        num_layers: int = 2,
        kind: Literal["conv", "transformer"] = "conv",
        dec_dim: int | None = None,
        tap_norm: Literal["own", "none"] = "own",
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        assert num_layers >= 1
        assert len(dims) == len(strides_px) >= 1
        assert all(deep % shallow == 0 for shallow, deep in itertools.pairwise(strides_px))
        self.stride_px = strides_px[0]
        self.enlarge = [deep // shallow for shallow, deep in itertools.pairwise(strides_px)]
        widths = [dec_dim or dim for dim in dims]
        self.norms = nn.ModuleList([LayerNorm2d(dim) if tap_norm == "own" else nn.Identity() for dim in dims])
        self.laterals = nn.ModuleList(
            [nn.Conv2d(dim, dec_dim, kernel_size=1) if dec_dim else nn.Identity() for dim in dims]
        )
        self.fusions = nn.ModuleList(
            [
                _conv_fusion(deep + shallow, shallow, num_layers)
                if kind == "conv"
                else TokenFusion(deep + shallow, shallow, num_layers, num_heads or max(1, shallow // 64))
                for shallow, deep in itertools.pairwise(widths)
            ]
        )
        self.to_pixels = nn.Conv2d(widths[0], 3 * self.stride_px**2, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.to_pixels.weight, std=0.02)

    def forward(self, *maps: Tensor) -> Tensor:
        """One map for each level, shallow to deep, (M, C, h, w) -> (M, 3, H, W)"""
        levels = [
            lateral(norm(level)) for level, norm, lateral in zip(maps, self.norms, self.laterals, strict=True)
        ]
        fused = levels.pop()
        for fuse, factor in zip(reversed(self.fusions), reversed(self.enlarge), strict=True):
            if factor > 1:
                fused = F.interpolate(fused, scale_factor=factor, mode="bilinear", align_corners=False)
            fused = fuse(torch.cat([fused, levels.pop()], dim=1))
        return F.pixel_shuffle(self.to_pixels(fused), self.stride_px)


# --- what hidden patches held


class MaskedDecoder(nn.Module):
    """Something of every patch from the tokens of those that were shown (MAE; He et al., 2021,
    arXiv:2111.06377)."""

    positions: Tensor  # (N, dim), fixed

    def __init__(
        self,
        embed_dim: int,
        grid: tuple[int, int],
        out_dim: int,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, grid, "mae"), persistent=False)
        self.blocks = transformer_blocks(dim, depth, num_heads)
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)
        xavier_linears(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """tokens: (M, T + K, D), the prefix tokens and then the shown patches; kept: int64 (M, K), which
        patches these are. Returns (M, N, out), all patches row by row."""
        embedded = self.embed(tokens)  # (M, T + K, dim)
        prefix, shown = embedded[:, : self.num_prefix], embedded[:, self.num_prefix :]
        grid = self.mask_token.to(shown.dtype).expand(len(shown), len(self.positions), -1)
        grid = grid.scatter(1, kept.unsqueeze(2).expand_as(shown), shown)  # (M, N, dim)
        grid = grid + self.positions.to(self.mask_token.dtype)
        hidden = self.blocks(torch.cat([prefix.to(grid.dtype), grid], dim=1))
        decoded: Tensor = self.head(self.norm(hidden[:, self.num_prefix :]))
        return decoded


class Predictor(nn.Module):
    """Features of blocks of hidden patches from the tokens of the context (I-JEPA; Assran et al., 2023,
    arXiv:2301.08243).

    One network predicts every block, each on its own: blocks of one image do not see each other.
    """

    positions: Tensor  # (N, dim), fixed

    def __init__(
        self,
        embed_dim: int,
        grid: tuple[int, int],
        dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, grid, "mae"), persistent=False)
        self.blocks = transformer_blocks(dim, depth, num_heads)
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, embed_dim)
        trunc_normal_linears(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, kept: Tensor, targets: Tensor) -> Tensor:
        """context: (M, K, D), tokens of the patches `kept`, int64 (M, K), without prefix tokens;
        targets: int64 (M, T, n), the patches of T blocks. Returns (M, T, n, D): the blocks of one image lie
        together, and row i of a block belongs to its target i."""
        num_blocks, num_targets = targets.shape[1:]
        positions = self.positions.to(self.mask_token.dtype)
        seen = self.embed(context) + positions[kept]  # (M, K, dim)
        asked = self.mask_token + positions[targets]  # (M, T, n, dim)
        seen = seen.unsqueeze(1).expand(-1, num_blocks, -1, -1)  # (M, T, K, dim)
        hidden = self.blocks(torch.cat([seen, asked], dim=2).flatten(0, 1))  # (M * T, K + n, dim)
        predicted: Tensor = self.head(self.norm(hidden[:, -num_targets:]))
        return predicted.reshape(*targets.shape, -1)
