"""The backbone: an unmodified timm Vision Transformer, and the one function that turns images into tokens.

The only file that knows how timm arranges positional embeddings and prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.errors import ConfigError, nearest
from pretrain.tokens import TokenLayout


class BackboneConfig(BaseModel):
    """Which timm model, and with what arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "vit_small_patch16_224"  # a timm architecture of the VisionTransformer family
    img_px: Annotated[int, Field(gt=0)] = 224
    patch_px: Annotated[int, Field(gt=0)] = 16
    class_token: bool = True
    pos_embed: Literal["learn", "none"] = "learn"
    drop_path_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    args: dict[str, Any] = {}  # more arguments of timm's constructor, such as depth, embed_dim, num_heads


def model_args(config: BackboneConfig, num_registers: int) -> dict[str, Any]:
    """Arguments that make stock timm build this architecture; written into exports as `model_args`."""
    args: dict[str, Any] = {"img_size": config.img_px, "patch_size": config.patch_px, **config.args}
    if num_registers:
        args["reg_tokens"] = num_registers
    if not config.class_token:
        args |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if config.pos_embed == "none":
        args["pos_embed"] = "none"
    return args


def create_backbone(config: BackboneConfig, num_registers: int = 0) -> VisionTransformer:
    """A headless timm model with fresh weights."""
    if not timm.is_model(config.name):
        raise ConfigError(
            f"model.name: timm has no architecture '{config.name}'; "
            + nearest(config.name, timm.list_models("vit_*"))
        )
    if config.img_px % config.patch_px:
        below = config.img_px // config.patch_px * config.patch_px
        legal = f"{below} or {below + config.patch_px}" if below else str(config.patch_px)
        raise ConfigError(
            f"model.img_px: {config.img_px} px are not whole {config.patch_px} px patches; use {legal}"
        )
    try:
        model = timm.create_model(
            config.name,
            pretrained=False,
            num_classes=0,
            drop_path_rate=config.drop_path_ratio,
            **model_args(config, num_registers),
        )
    except TypeError as error:
        raise ConfigError(f"model.args: timm refuses them for '{config.name}': {error}") from error
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"model.name: '{config.name}' is a {type(model).__name__}, not a VisionTransformer")
    return model


def layout_of(config: BackboneConfig, registers: tuple[str, ...]) -> TokenLayout:
    side = config.img_px // config.patch_px
    return TokenLayout((side, side), registers, config.class_token)


@dataclass(frozen=True)
class TokenFill:
    """Learned vectors that stand in for what some patches would have shown or told."""

    masked: Tensor  # bool (M, P): patches whose embedding is replaced by `mask_token`
    mask_token: Tensor | None  # (1, 1, D)
    unplaced: Tensor  # bool (M, P): patches whose positional embedding is replaced by `no_position`
    no_position: Tensor | None  # (1, 1, D)


@dataclass(frozen=True)
class Tokens:
    """What one encoder call gives."""

    final: Tensor  # (M, N, D) after the final norm, in the order of TokenLayout
    taps: tuple[Tensor, ...] = ()  # (M, N, D) each: outputs of the asked blocks, before the final norm


def encode(
    vit: VisionTransformer,
    images: Tensor,
    layout: TokenLayout,
    fill: TokenFill | None = None,
    taps: Sequence[int] = (),
    recompute: bool = False,
) -> Tokens:
    """Run timm's own modules in timm's own order, with the patch-level fills of the pretext tasks between.

    images: (M, 3, H, W), normalised. `taps` are zero-based block indices. `recompute` trades time for memory
    by recomputing each block in the backward pass. Without a fill and taps the result equals
    `vit.forward_features(images)`.
    """
    tokens = vit.patch_embed(images)  # (M, P, D)
    if fill is not None and fill.mask_token is not None:
        tokens = torch.where(fill.masked.unsqueeze(-1), fill.mask_token.to(tokens.dtype), tokens)
    prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    if vit.pos_embed is not None:
        at_patches = vit.pos_embed[:, -layout.num_patches :]  # (1, P, D)
        if fill is not None and fill.no_position is not None:
            at_patches = torch.where(fill.unplaced.unsqueeze(-1), fill.no_position, at_patches)
        tokens = tokens + at_patches
    if prefix:
        before = torch.cat(prefix, dim=1)  # (1, N - P, D)
        if vit.pos_embed is not None and not vit.no_embed_class:
            before = before + vit.pos_embed[:, : layout.num_prefix]
        before = before.expand(len(tokens), -1, -1).to(tokens.dtype)
        tokens = torch.cat([before, tokens], dim=1)
    tokens = vit.norm_pre(vit.patch_drop(vit.pos_drop(tokens)))
    tapped = []
    for number, block in enumerate(vit.blocks):
        tokens = (
            checkpoint(block, tokens, use_reentrant=False) if recompute and block.training else block(tokens)
        )
        if number in taps:
            tapped.append(tokens)
    return Tokens(vit.norm(tokens), tuple(tapped))
