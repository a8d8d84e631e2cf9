"""The sizes of timm's plain Vision Transformers, so that they need not be built to be planned for.

A test builds every one of them and compares. What is not here (Swin, T2T-ViT, other arguments) is counted on
a real module instead, which takes torch and some seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VitSize:
    """Width, number of blocks and attention heads, and the hidden layer's width over the width."""

    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0

    @property
    def hidden(self) -> int:
        return int(self.dim * self.mlp_ratio)


SIZES = {
    "vit_tiny": VitSize(192, 12, 3),
    "vit_small": VitSize(384, 12, 6),
    "vit_base": VitSize(768, 12, 12),
    "vit_large": VitSize(1024, 24, 16),
    "vit_huge": VitSize(1280, 32, 16),
    "vit_giant": VitSize(1408, 40, 16, 48 / 11),
    "vit_gigantic": VitSize(1664, 48, 16, 64 / 13),
    "deit_tiny": VitSize(192, 12, 3),
    "deit_small": VitSize(384, 12, 6),
    "deit_base": VitSize(768, 12, 12),
}
# names that timm has; other suffixes (_clip, _siglip, _rope, ...) mean other layers
NAMES = (
    *("vit_tiny_patch16_224", "vit_tiny_patch16_384"),
    *(f"vit_small_patch{patch}_{px}" for patch, px in ((32, 224), (32, 384), (16, 224), (16, 384), (8, 224))),
    *(f"vit_base_patch{patch}_{px}" for patch, px in ((32, 224), (32, 384), (16, 224), (16, 384), (8, 224))),
    *(f"vit_large_patch{patch}_{px}" for patch, px in ((32, 224), (32, 384), (16, 224), (16, 384))),
    *("vit_large_patch14_224", "vit_huge_patch14_224", "vit_giant_patch14_224", "vit_gigantic_patch14_224"),
    *("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_base_patch16_384"),
)
_ARGS = {"embed_dim": "dim", "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio"}


def size_of(model: Mapping[str, Any]) -> VitSize | None:
    """The size of `model` settings, or None where a table cannot tell it."""
    name, args = model["name"], model["args"]
    if name not in NAMES or not args.keys() <= _ARGS.keys():
        return None
    if not all(isinstance(value, int | float) and value > 0 for value in args.values()):
        return None
    family = re.match(r"[a-z]+_[a-z]+", name)
    assert family is not None
    return VitSize(**{**vars(SIZES[family[0]]), **{_ARGS[key]: value for key, value in args.items()}})
