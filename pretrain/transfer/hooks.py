"""Pretrained weights as a plain `nn.Module` that gives feature maps at any input size, for any stack above.

from pretrain.transfer import backbone

model = torchvision.models.detection.MaskRCNN(backbone("exported"), num_classes=2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.errors import UserError, nearest
from pretrain.evaluate.classifier import set_drop_path
from pretrain.evaluate.encoder import Encoder, open_encoder
from pretrain.export.source import WeightsName
from pretrain.models.backbone import Level, accept_any_size, encode, levels_of
from pretrain.tokens import TokenLayout
from pretrain.transfer.pyramid import FeaturePyramid, SimpleFeaturePyramid

Out = Literal["map", "maps", "pyramid"]
OUTS: tuple[Out, ...] = ("map", "maps", "pyramid")

SWIN_UNIT_PX = 8  # times the patch: what three mergings by two make of it


def backbone(
    weights: str | Path,
    out: Out = "pyramid",
    *,
    network: WeightsName | None = None,
    levels: Sequence[int] | None = None,
    channels: int = 256,
    window_px: int | None = None,
    global_blocks: Sequence[int] | None = None,
    drop_path_ratio: float = 0.0,
    seed: int = 0,
) -> TransferBackbone:
    """A trainable backbone with the weights of an export, a run, a checkpoint or a timm model.

    It takes images (B, 3, H, W) float32 of any size, normalised by its `mean` and `std`.

    out: "map", the patch tokens after the trained final norm, (B, D, h, w); "maps", a list of maps, one for
    each of `levels`, as the blocks of a ViT or the stages of a Swin leave them, before any norm; "pyramid", a
    dict of maps with `channels` channels at strides from a quarter to twice the patch of a ViT or at those of
    a Swin's stages, and one more by max-pooling: what torchvision's detectors take.
    levels: zero-based blocks or stages of "maps"; None takes four evenly spaced blocks, or all stages.
    window_px: side of the windows that a ViT's blocks attend in, but for `global_blocks` (None: the last of
    every quarter); class and register tokens attend in every window and are averaged over them.
    network: teacher or student of a run. seed: of new weights, and of `untrained:NAME`.

    Raises UserError for what cannot be opened, or does not go with the architecture.
    """
    if out not in OUTS:
        raise UserError(f"out '{out}': {nearest(out, OUTS)}")
    encoder = open_encoder(weights, network=network, seed=seed)
    model = encoder.model
    if not isinstance(model, VisionTransformer | SwinTransformer):
        raise UserError(
            f"'{weights}': a {type(model).__name__}; feature maps are taken of a Vision Transformer or a "
            "Swin Transformer"
        )
    set_drop_path(model, drop_path_ratio)
    places = levels_of(model)
    chosen = _levels(model, levels)
    windows = _windows(model, window_px, global_blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pyramid = _pyramid(model, places, channels) if out == "pyramid" else None
    return TransferBackbone(encoder, out, chosen, windows, pyramid)


class TransferBackbone(nn.Module):
    """A timm network, `network`, with what makes maps of its tokens. See `backbone`.

    strides, num_channels: of each map that is given, in px and in channels, in their order.
    """

    def __init__(
        self,
        encoder: Encoder,
        out: Out,
        levels: tuple[int, ...],
        windows: Windows | None,
        pyramid: FeaturePyramid | SimpleFeaturePyramid | None,
    ) -> None:
        super().__init__()
        network = encoder.model
        assert isinstance(network, VisionTransformer | SwinTransformer)
        accept_any_size(network)
        places = levels_of(network)
        self.encoder, self.out, self.levels, self.windows = encoder, out, levels, windows
        self.mean, self.std = encoder.mean, encoder.std
        self.is_swin = isinstance(network, SwinTransformer)
        self.patch_px = int(network.patch_embed.patch_size[0])
        self.network = network.requires_grad_(True).train()
        for module in _unused(network, out, levels):  # else parallel training waits for their gradients
            module.requires_grad_(False)
        self.pyramid = pyramid
        if pyramid is not None:
            self.strides, self.num_channels = pyramid.strides, pyramid.num_channels
        else:
            given = [places[level] for level in (levels if out == "maps" else (len(places) - 1,))]
            self.strides = tuple(level.stride_px for level in given)
            self.num_channels = tuple(level.dim for level in given)
        self.out_channels = self.num_channels[-1]  # the name that torchvision's detectors look for
        self._size: tuple[int, int] | None = None  # that a Swin's windows were laid out for

    def forward(self, images: Tensor) -> Tensor | list[Tensor] | dict[str, Tensor]:
        """Normalised (B, 3, H, W) -> maps (B, C, ceil(H / stride), ceil(W / stride)), as `out` says."""
        height, width = images.shape[-2:]
        unit = self.patch_px * (SWIN_UNIT_PX if self.is_swin else self.windows.side if self.windows else 1)
        images = F.pad(images, (0, -width % unit, 0, -height % unit))  # with the mean colour
        final, tapped = self._swin_maps(images) if self.is_swin else self._vit_maps(images)
        if self.pyramid is not None:
            maps: dict[str, Tensor] = self.pyramid(tapped if self.is_swin else final)
            return {
                name: _cut(features, (height, width), stride)
                for (name, features), stride in zip(maps.items(), self.strides, strict=True)
            }
        given = tapped if self.out == "maps" else [final]
        cut = [
            _cut(features, (height, width), stride)
            for features, stride in zip(given, self.strides, strict=True)
        ]
        return cut if self.out == "maps" else cut[0]

    def _vit_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The final map after the norm, and those of the levels before it."""
        vit = self.network
        assert isinstance(vit, VisionTransformer)
        rows, columns = (side // self.patch_px for side in images.shape[-2:])
        own = self.encoder.layout
        assert own is not None
        layout = TokenLayout((rows, columns), own.registers, own.has_class_token)
        blocks = self.windows.of(vit.blocks, layout) if self.windows else None
        taps = self.levels if self.out == "maps" else ()
        tokens = encode(vit, images, layout, taps=taps, blocks=blocks)
        return _map_of(layout, tokens.final), [tokens.taps[level] for level in taps]

    def _swin_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        swin = self.network
        assert isinstance(swin, SwinTransformer)
        rows, columns = (side // self.patch_px for side in images.shape[-2:])
        if self._size != (rows, columns):
            _lay_windows(swin, rows, columns)
            self._size = (rows, columns)
        layout = TokenLayout((rows // SWIN_UNIT_PX, columns // SWIN_UNIT_PX), (), False)
        tokens = encode(swin, images, layout, taps=self.levels)
        return _map_of(layout, tokens.final), [tokens.taps[level] for level in self.levels]


class Windows:
    """Which blocks of a ViT attend in windows, and how large those are."""

    def __init__(self, side: int, global_blocks: tuple[int, ...]) -> None:
        self.side, self.global_blocks = side, global_blocks  # in patches; zero-based

    def of(self, blocks: Sequence[nn.Module], layout: TokenLayout) -> list[Callable[[Tensor], Tensor]]:
        return [
            block if number in self.global_blocks else partial(_in_windows, block, layout, self.side)
            for number, block in enumerate(blocks)
        ]


def _in_windows(block: nn.Module, layout: TokenLayout, side: int, tokens: Tensor) -> Tensor:
    """Run a block on all windows of (side, side) patches, each with the prefix tokens. (B, N, D), as given"""
    prefix, patches = layout.prefix(tokens), layout.patches(tokens)
    images, dim = len(tokens), tokens.shape[-1]
    rows, columns = (length // side for length in layout.grid)
    patches = patches.reshape(images, rows, side, columns, side, dim).transpose(2, 3)
    patches = patches.reshape(-1, side * side, dim)  # (B * windows, side * side, D)
    every = prefix.repeat_interleave(rows * columns, dim=0)
    done = block(torch.cat([every, patches], dim=1))
    prefix = done[:, : layout.num_prefix].unflatten(0, (images, rows * columns)).mean(dim=1)
    patches = done[:, layout.num_prefix :].reshape(images, rows, columns, side, side, dim).transpose(2, 3)
    return torch.cat([prefix, patches.reshape(images, layout.num_patches, dim)], dim=1)


def _lay_windows(swin: SwinTransformer, rows: int, columns: int) -> None:
    """Tell every block its grid; the windows keep the size that their relative positions were learned for.

    Windows are shifted where the grid has more than one, as in training; a grid that is smaller than a window
    is padded to it, instead of timm's cutting of the learned table.
    """
    for number, stage in enumerate(swin.layers):
        grid = (rows // 2**number, columns // 2**number)
        for block in stage.blocks:
            is_small = any(side < window for side, window in zip(grid, block.window_size, strict=True))
            block.set_input_size(grid, block.window_size, always_partition=is_small)


def _map_of(layout: TokenLayout, tokens: Tensor) -> Tensor:
    """The patches, (B, N, D) -> (B, D, h, w)"""
    patches = layout.patches(tokens).mT
    return patches.reshape(*patches.shape[:2], *layout.grid)


def _unused(
    network: VisionTransformer | SwinTransformer, out: Out, levels: tuple[int, ...]
) -> list[nn.Module]:
    """What the maps do not depend on."""
    is_swin = isinstance(network, SwinTransformer)
    reads_levels = out == "maps" or (is_swin and out == "pyramid")
    after_norm = [network.head if is_swin else network.fc_norm]
    if not reads_levels:
        return after_norm
    places: nn.Sequential = network.layers if is_swin else network.blocks
    return [*after_norm, network.norm, *places[levels[-1] + 1 :]]


def _cut(features: Tensor, size_px: tuple[int, int], stride: float) -> Tensor:
    height, width = (math.ceil(side / stride) for side in size_px)
    return features[..., :height, :width]


def _quarters(count: int) -> tuple[int, ...]:
    """The last of every quarter, zero-based: 12 -> (2, 5, 8, 11), 6 -> (0, 2, 3, 5)"""
    return tuple(sorted({max(0, count * k // 4 - 1) for k in (1, 2, 3, 4)}))


def _levels(model: VisionTransformer | SwinTransformer, asked: Sequence[int] | None) -> tuple[int, ...]:
    num_levels = len(levels_of(model))
    if asked is None:
        return _quarters(num_levels)
    if not asked or any(not 0 <= level < num_levels for level in asked):
        raise UserError(f"levels {list(asked)}: this model has levels 0 to {num_levels - 1}")
    if list(asked) != sorted(set(asked)):
        raise UserError(f"levels {list(asked)}: name each once, from shallow to deep")
    return tuple(asked)


def _windows(
    model: VisionTransformer | SwinTransformer, window_px: int | None, global_blocks: Sequence[int] | None
) -> Windows | None:
    if window_px is None:
        if global_blocks is not None:
            raise UserError("global_blocks: goes with window_px; without it all blocks are global")
        return None
    if not isinstance(model, VisionTransformer):
        raise UserError(f"window_px {window_px}: a Swin attends in windows of its own; leave it out")
    patch_px, num_blocks = int(model.patch_embed.patch_size[0]), len(model.blocks)
    if window_px <= 0 or window_px % patch_px:
        raise UserError(f"window_px {window_px}: not whole patches of {patch_px} px; use a multiple of it")
    chosen = _quarters(num_blocks) if global_blocks is None else tuple(global_blocks)
    if any(not 0 <= block < num_blocks for block in chosen):
        raise UserError(f"global_blocks {list(chosen)}: this model has blocks 0 to {num_blocks - 1}")
    return Windows(window_px // patch_px, chosen)


def _pyramid(
    model: VisionTransformer | SwinTransformer, places: tuple[Level, ...], channels: int
) -> FeaturePyramid | SimpleFeaturePyramid:
    if isinstance(model, SwinTransformer):
        return FeaturePyramid(
            tuple(level.dim for level in places), tuple(level.stride_px for level in places), channels
        )
    return SimpleFeaturePyramid(places[-1].dim, places[-1].stride_px, channels)
