"""The backbone: an unmodified timm Vision Transformer or Swin Transformer, and the one function that turns
images into tokens.

The only file that knows how timm arranges positional embeddings, prefix tokens and stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Annotated, Any, Literal, TypeAlias

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from timm.layers import resample_abs_pos_embed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.errors import ConfigError, nearest
from pretrain.models.initial import fix_positions, initialize
from pretrain.models.t2t import register_t2t
from pretrain.tokens import TokenLayout, take

Backbone: TypeAlias = VisionTransformer | SwinTransformer
FAMILIES = ("vit_*", "deit*", "swin_*", "t2t_vit_14")  # patterns of architecture names, for messages


class BackboneConfig(BaseModel):
    """Which timm model, and with what arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "vit_small_patch16_224"  # an architecture of timm's ViT or Swin family, or t2t_vit_14
    img_px: Annotated[int, Field(gt=0)] = 224
    patch_px: Annotated[int, Field(gt=0)] = 16
    class_token: bool = True
    # learned, absent, or fixed sine and cosine tables in the arrangement of MAE or of MoCo v3
    pos_embed: Literal["learn", "none", "sincos", "sincos_moco"] = "learn"
    init: Literal["timm", "mae", "moco"] = "timm"  # whose initial weights
    freeze_patch_embed: bool = False  # the patch projection keeps its initial weights, as in MoCo v3
    drop_path_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    args: dict[str, Any] = {}  # more arguments of timm's constructor, such as depth, embed_dim, num_heads

    @property
    def is_swin(self) -> bool:
        return self.name.startswith("swin_")

    @property
    def token_px(self) -> int:
        """Side of what one patch token stands for in the end; Swin merges patches three times by two."""
        return self.patch_px * 8 if self.is_swin else self.patch_px


@dataclass(frozen=True)
class Level:
    """A place where features can be tapped: a block of a ViT, a stage of a Swin."""

    dim: int
    stride_px: int


def model_args(config: BackboneConfig, num_registers: int) -> dict[str, Any]:
    """Arguments that make stock timm build this architecture; written into exports as `model_args`."""
    args: dict[str, Any] = {"img_size": config.img_px, "patch_size": config.patch_px, **config.args}
    if config.is_swin:
        return args
    if num_registers:
        args["reg_tokens"] = num_registers
    if not config.class_token:
        args |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if config.pos_embed == "none":
        args["pos_embed"] = "none"
    return args


def create_backbone(config: BackboneConfig, num_registers: int = 0) -> Backbone:
    """A headless timm model with fresh weights."""
    register_t2t()
    if not timm.is_model(config.name):
        raise ConfigError(
            f"model.name: timm has no architecture '{config.name}'; "
            + nearest(config.name, [name for family in FAMILIES for name in timm.list_models(family)])
        )
    unit = config.token_px
    if config.img_px % unit:
        below = config.img_px // unit * unit
        legal = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError(f"model.img_px: {config.img_px} px are not whole {unit} px patches; use {legal}")
    if config.is_swin:
        _check_swin(config, num_registers)
    try:
        model = timm.create_model(
            config.name,
            pretrained=False,
            num_classes=0,
            drop_path_rate=config.drop_path_ratio,
            **model_args(config, num_registers),
        )
    except TypeError as error:
        if not any(fnmatch(config.name, family) for family in FAMILIES):
            raise ConfigError(
                f"model.name: '{config.name}' is of no family that is supported ({', '.join(FAMILIES)}); "
                "`pretrain list backbones` names them"
            ) from None
        raise ConfigError(f"model.args: timm refuses them for '{config.name}': {error}") from error
    if not isinstance(model, VisionTransformer | SwinTransformer):
        raise ConfigError(
            f"model.name: '{config.name}' is a {type(model).__name__}; supported are VisionTransformer, "
            "SwinTransformer and t2t_vit_14"
        )
    if isinstance(model, VisionTransformer):
        initialize(model, config.init)
        if config.pos_embed.startswith("sincos"):
            fix_positions(model, "moco" if config.pos_embed == "sincos_moco" else "mae")
        if config.freeze_patch_embed:
            model.patch_embed.requires_grad_(False)
    return model


def _check_swin(config: BackboneConfig, num_registers: int) -> None:
    """A Swin has no class token, registers or absolute positions."""
    if num_registers:
        raise ConfigError(
            f"model.name: '{config.name}' has no place for the register tokens that the tasks ask for; "
            "choose a ViT, or leave out tasks that read a token of their own"
        )
    for name, value in (("pos_embed", "learn"), ("init", "timm"), ("freeze_patch_embed", False)):
        if getattr(config, name) != value:
            raise ConfigError(f"model.{name}: does not apply to a Swin; remove it")


def layout_of(config: BackboneConfig, registers: tuple[str, ...], size_px: int | None = None) -> TokenLayout:
    """The tokens of a view of `size_px`, by default of the model's own size."""
    side = (size_px or config.img_px) // config.token_px
    return TokenLayout((side, side), registers, config.class_token and not config.is_swin)


def levels_of(backbone: Backbone) -> tuple[Level, ...]:
    """Where `encode` can tap: after every block of a ViT, after every stage of a Swin (before merging)."""
    if isinstance(backbone, SwinTransformer):
        return tuple(Level(int(info["num_chs"]), int(info["reduction"])) for info in backbone.feature_info)
    patch_px = int(backbone.patch_embed.patch_size[0])
    return tuple(Level(int(backbone.embed_dim), patch_px) for _ in backbone.blocks)


def num_features(backbone: Backbone) -> int:
    """Width of the final tokens; a Swin's `embed_dim` is that of its first stage."""
    return int(backbone.num_features)


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
    # level -> (M, C, h, w): patches after the asked blocks or stages, before the final norm
    taps: Mapping[int, Tensor] = field(default_factory=dict)


def encode(
    backbone: Backbone,
    images: Tensor,
    layout: TokenLayout,
    fill: TokenFill | None = None,
    taps: Collection[int] = (),
    recompute: bool = False,
    kept: Tensor | None = None,
    blocks: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> Tokens:
    """Run timm's own modules in timm's own order, with the patch-level fills of the pretext tasks between.

    images: (M, 3, H, W), normalised; of another size than the model's, positions are interpolated (ViT).
    `taps` are zero-based indices into `levels_of`. `recompute` trades time for memory by recomputing each
    block in the backward pass. `kept`, int64 (M, K), are the patches that go on after positions were added;
    the others are dropped. `blocks` run in place of a ViT's own. Without fill, taps, kept and blocks the
    result equals `forward_features(images)`, for a Swin with its map flattened row by row.
    """
    if isinstance(backbone, SwinTransformer):
        assert fill is None or (fill.mask_token is None and fill.no_position is None)
        assert kept is None
        assert blocks is None
        return _encode_swin(backbone, images, taps, recompute)
    return _encode_vit(backbone, images, layout, fill, taps, recompute, kept, blocks or backbone.blocks)


def _encode_swin(swin: SwinTransformer, images: Tensor, taps: Collection[int], recompute: bool) -> Tokens:
    features = swin.patch_embed(images)  # (M, h, w, C)
    tapped = {}
    for number, stage in enumerate(swin.layers):
        if recompute and stage.training:
            features = checkpoint(stage, features, use_reentrant=False)
        else:
            features = stage(features)
        if number in taps:
            tapped[number] = features.permute(0, 3, 1, 2)
    return Tokens(swin.norm(features).flatten(1, 2), tapped)


def _encode_vit(
    vit: VisionTransformer,
    images: Tensor,
    layout: TokenLayout,
    fill: TokenFill | None,
    taps: Collection[int],
    recompute: bool,
    kept: Tensor | None,
    blocks: Iterable[Callable[[Tensor], Tensor]],
) -> Tokens:
    tokens = vit.patch_embed(images)  # (M, P, D)
    if fill is not None and fill.mask_token is not None:
        tokens = torch.where(fill.masked.unsqueeze(-1), fill.mask_token.to(tokens.dtype), tokens)
    prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    positions = positions_for(vit, layout)
    if positions is not None:
        at_patches = positions[:, -layout.num_patches :]  # (1, P, D)
        if fill is not None and fill.no_position is not None:
            at_patches = torch.where(fill.unplaced.unsqueeze(-1), fill.no_position, at_patches)
        tokens = tokens + at_patches
    if kept is not None:
        tokens = take(tokens, kept)  # (M, K, D)
    if prefix:
        before = torch.cat(prefix, dim=1)  # (1, N - P, D)
        if positions is not None and not vit.no_embed_class:
            before = before + positions[:, : layout.num_prefix]
        before = before.expand(len(tokens), -1, -1).to(tokens.dtype)
        tokens = torch.cat([before, tokens], dim=1)
    tokens = vit.norm_pre(vit.patch_drop(vit.pos_drop(tokens)))
    tapped = {}
    for number, block in enumerate(blocks):
        tokens = (
            checkpoint(block, tokens, use_reentrant=False) if recompute and vit.training else block(tokens)
        )
        if number in taps:
            patches = layout.patches(tokens).mT  # (M, D, P)
            tapped[number] = patches.reshape(*patches.shape[:2], *layout.grid)
    return Tokens(vit.norm(tokens), tapped)


def positions_for(vit: VisionTransformer, layout: TokenLayout) -> Tensor | None:
    """The positional embedding for a grid, interpolated where it is not the model's own.

    (1, N, D), with the prefix tokens if they have positions; None for a model without positions.
    """
    own: Tensor | None = vit.pos_embed
    if own is None or tuple(vit.patch_embed.grid_size) == layout.grid:
        return own
    num_prefix = 0 if vit.no_embed_class else layout.num_prefix
    resampled: Tensor = resample_abs_pos_embed(
        own,
        new_size=list(layout.grid),
        old_size=list(vit.patch_embed.grid_size),
        num_prefix_tokens=num_prefix,
        interpolation="bicubic",
        antialias=False,
    )
    return resampled


def accept_any_size(backbone: Backbone) -> None:
    """Let the patch embedding take images of other sizes than the model's own."""
    backbone.patch_embed.strict_img_size = False
