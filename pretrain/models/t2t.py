"""T2T-ViT-14: a Vision Transformer whose tokens are gathered from the image in three overlapping steps.

Yuan et al., 2021, arXiv:2101.11986. Everything after the patch embedding is timm's own VisionTransformer.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.losses import fp32
from pretrain.models.positions import sinusoid_positions

PATCH_PX = 16  # the strides of the three steps, 4, 2 and 2, multiplied
_TOKEN_DIM = 64
_NUM_FEATURES = 32


def orthogonal_directions(num_directions: int, dim: int) -> Tensor:
    """Random vectors of length sqrt(dim), orthogonal in groups of `dim`: float32 (num_directions, dim)."""
    num_groups = math.ceil(num_directions / dim)
    groups = [nn.init.orthogonal_(torch.empty(dim, dim)) for _ in range(num_groups)]
    return torch.cat(groups)[:num_directions] * math.sqrt(dim)


@fp32
def random_feature_attention(queries: Tensor, keys: Tensor, values: Tensor, directions: Tensor) -> Tensor:
    """Attention with weights exp(q k), estimated at a cost linear in the number of tokens.

    Performer's positive random features (Choromanski et al., 2020, arXiv:2009.14794, lemma 1): for normal w
    the mean of exp(w q - |q|^2 / 2) exp(w k - |k|^2 / 2) is exp(q k).
    queries, keys: (M, N, D); values: (M, N, E); directions: (R, D). Returns (M, N, E).
    """
    log_queries = queries @ directions.mT - queries.square().sum(dim=2, keepdim=True) / 2  # (M, N, R)
    log_keys = keys @ directions.mT - keys.square().sum(dim=2, keepdim=True) / 2
    # a factor for each query and one for all keys of an image cancel below; these keep exp from vanishing
    feature_queries = (log_queries - log_queries.detach().amax(dim=2, keepdim=True)).exp()
    feature_keys = (log_keys - log_keys.detach().amax(dim=(1, 2), keepdim=True)).exp()
    weights = feature_queries @ feature_keys.sum(dim=1).unsqueeze(2)  # (M, N, 1), summed over keys
    estimate: Tensor = feature_queries @ (feature_keys.mT @ values) / (weights + 1e-8)
    return estimate


class TokenPerformer(nn.Module):
    """A one-head transformer layer that narrows tokens, linear in their number. (M, N, wide) -> (M, N, dim)

    The attention's skip connection carries the values, as its input has another width. The random directions
    are fixed and a buffer, so that an export carries them. No dropout; the authors' code drops a tenth.
    """

    directions: Tensor  # (R, dim)

    def __init__(self, wide_in: int, dim: int, num_features: int, **place: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(wide_in, **place)
        self.qkv = nn.Linear(wide_in, 3 * dim, **place)
        self.proj = nn.Linear(dim, dim, **place)
        self.norm2 = nn.LayerNorm(dim, **place)
        self.mlp = nn.Sequential(nn.Linear(dim, dim, **place), nn.GELU(), nn.Linear(dim, dim, **place))
        self.register_buffer("directions", orthogonal_directions(num_features, dim).to(**place))

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = self.qkv(self.norm1(tokens)).chunk(3, dim=2)
        attended = random_feature_attention(queries, keys, values, self.directions)
        narrow: Tensor = values + self.proj(attended.to(values.dtype))
        refined: Tensor = self.mlp(self.norm2(narrow))
        return narrow + refined


class TokensToToken(nn.Module):
    """Patch embedding by three soft splits: overlapping windows, flattened, with token layers between.

    Windows of 7 x 7 px every 4 px, then twice 3 x 3 tokens every 2 tokens. Takes the arguments that timm
    gives to its own patch embedding.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = PATCH_PX,
        in_chans: int = 3,
        embed_dim: int = 384,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size not in (PATCH_PX, (PATCH_PX, PATCH_PX)):
            raise ConfigError(
                f"model.patch_px: T2T-ViT has {PATCH_PX} px patches, not {patch_size}; use {PATCH_PX}"
            )
        if dynamic_img_pad:
            raise ConfigError("model.args.dynamic_img_pad: T2T-ViT pads no images; leave it out")
        self.patch_size = (PATCH_PX, PATCH_PX)
        self.strict_img_size = strict_img_size  # else whole patches are enough
        self._set_size((img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1]))
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = TokenPerformer(in_chans * 7 * 7, _TOKEN_DIM, _NUM_FEATURES, **place)
        self.second = TokenPerformer(_TOKEN_DIM * 3 * 3, _TOKEN_DIM, _NUM_FEATURES, **place)
        self.project = nn.Linear(_TOKEN_DIM * 3 * 3, embed_dim, bias=bias, **place)

    def _set_size(self, img_size: tuple[int, int]) -> None:
        if img_size[0] % PATCH_PX or img_size[1] % PATCH_PX:
            raise ConfigError(
                f"model.img_px: {img_size[0]} x {img_size[1]} px are not whole {PATCH_PX} px patches; "
                f"use multiples of {PATCH_PX}"
            )
        self.img_size = img_size
        self.grid_size = (img_size[0] // PATCH_PX, img_size[1] // PATCH_PX)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Called by timm's `VisionTransformer.set_input_size`, which fits the positions."""
        if patch_size not in (None, PATCH_PX, self.patch_size):
            raise ConfigError(f"T2T-ViT has {PATCH_PX} px patches, not {patch_size}; leave the size out")
        if img_size is not None:
            self._set_size((img_size[0], img_size[1]))

    def feat_ratio(self) -> int:
        """Pixels for each token, along a side; asked for by timm."""
        return PATCH_PX

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of an image; asked for by timm."""
        return img_size[0] // PATCH_PX, img_size[1] // PATCH_PX

    def forward(self, images: Tensor) -> Tensor:
        """(M, 3, H, W) -> (M, N, D), row by row"""
        height, width = images.shape[2:]
        if self.strict_img_size and (height, width) != self.img_size:
            raise ValueError(f"images of {height} x {width} px for a model of {self.img_size}")
        if height % PATCH_PX or width % PATCH_PX:
            raise ValueError(f"images of {height} x {width} px are not whole {PATCH_PX} px patches")
        tokens = self.first(F.unfold(images, 7, stride=4, padding=2).mT)  # (M, H / 4 * W / 4, 64)
        joined = tokens.mT.unflatten(2, (height // 4, width // 4))
        tokens = self.second(F.unfold(joined, 3, stride=2, padding=1).mT)  # (M, H / 8 * W / 8, 64)
        joined = tokens.mT.unflatten(2, (height // 8, width // 8))
        projected: Tensor = self.project(F.unfold(joined, 3, stride=2, padding=1).mT)
        return projected


def _assemble(**args: Any) -> VisionTransformer:
    vit = VisionTransformer(embed_layer=TokensToToken, **args)
    if vit.cls_token is not None:
        nn.init.trunc_normal_(vit.cls_token, std=0.02)
    if vit.pos_embed is not None:
        _fix_sinusoid(vit)
    return vit


@torch.no_grad()
def _fix_sinusoid(vit: VisionTransformer) -> None:
    """The class token stands at place 0, the patches at 1 to N; registers, new to this model, get zeros."""
    num_patches = vit.patch_embed.num_patches
    table = sinusoid_positions(vit.embed_dim, 1 + num_patches)
    vit.pos_embed.zero_()
    if vit.has_class_token and not vit.no_embed_class:
        vit.pos_embed[0, 0] = table[0]
    vit.pos_embed[0, -num_patches:] = table[1:]
    vit.pos_embed.requires_grad_(False)


def t2t_vit_14(pretrained: bool = False, **args: Any) -> VisionTransformer:
    """The entry point for timm: 14 blocks of width 384, 6 heads, MLP ratio 3, no bias in qkv."""
    shape = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "qkv_bias": False}
    vit: VisionTransformer = build_model_with_cfg(
        _assemble,
        "t2t_vit_14",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{"norm_layer": nn.LayerNorm, **shape, **args},
    )
    return vit


default_cfgs = generate_default_cfgs(  # found by timm under this name when the entry point is registered
    {
        "t2t_vit_14": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "classifier": "head",
        }
    }
)


def register_t2t() -> None:
    """Make `timm.create_model("t2t_vit_14")` known in this process; calling it again changes nothing."""
    if not timm.is_model(t2t_vit_14.__name__):
        register_model(t2t_vit_14)
