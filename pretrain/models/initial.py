"""Initial weights of a backbone as the methods' authors draw them, and fixed positions.

Everything is drawn from torch's global generator: the caller seeds it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.positions import PositionOrder, sincos_positions

Initialization = Literal["timm", "mae", "moco"]
_TOKEN_STD = {"mae": 0.02, "moco": 1e-6}


def xavier_linears(module: nn.Module, split_qkv: bool = False) -> None:
    """Xavier-uniform weights and zero biases for every linear layer in a module.

    `split_qkv` draws query, key and value as the three layers they are; else one layer of three times the
    width, whose weights are smaller by sqrt(2).
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            parts = layer.weight.chunk(3) if split_qkv and name.endswith("qkv") else (layer.weight,)
            for part in parts:
                _xavier_uniform(part)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def trunc_normal_linears(module: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and zero biases for every linear layer."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def initialize(vit: VisionTransformer, kind: Initialization) -> None:
    """Draw a backbone's weights again, in place; positions stay as they are.

    "timm" leaves the model as timm made it. "mae" (He et al., 2021, arXiv:2111.06377) and "moco" (MoCo v3,
    Chen et al., 2021, arXiv:2104.02057) draw linear layers, and the patch embedding as the linear layer it
    is, Xavier-uniform with zero biases; moco draws query, key and value each on its own. Class token and
    registers are normal with a standard deviation of 0.02 (mae) or 1e-6 (moco).
    """
    if kind == "timm":
        return
    xavier_linears(vit, split_qkv=kind == "moco")
    projection = getattr(vit.patch_embed, "proj", None)
    if isinstance(projection, nn.Conv2d):
        _xavier_uniform(projection.weight.flatten(1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=_TOKEN_STD[kind])


@torch.no_grad()
def fix_positions(vit: VisionTransformer, order: PositionOrder) -> None:
    """Write a sine-cosine table into a backbone's positions and keep it from learning.

    Class token and registers, where timm gives them positions, have zeros.
    """
    if vit.pos_embed is None:
        raise ConfigError("model.pos_embed: this model has no positions to fix; build it with some")
    table = sincos_positions(vit.embed_dim, vit.patch_embed.grid_size, order)
    assert vit.pos_embed.shape[1] in (len(table), vit.num_prefix_tokens + len(table))
    vit.pos_embed.zero_()
    vit.pos_embed[0, -len(table) :] = table
    vit.pos_embed.requires_grad_(False)


@torch.no_grad()
def _xavier_uniform(weight: Tensor) -> None:
    """Uniform within sqrt(6 / (in + out)) (Glorot and Bengio, 2010), in place. weight: (out, in) or a view"""
    bound = math.sqrt(6 / sum(weight.shape))
    weight.uniform_(-bound, bound)
