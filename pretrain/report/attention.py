"""What the tokens of a Vision Transformer's last block attend to, taken again from its own modules.

timm computes attention in one fused operation that gives no weights. Here queries and keys are made once more
by the block's `qkv` and norms, and the weights count only if they give the very output that the block gave.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.models.backbone import encode
from pretrain.tokens import TokenLayout

TOLERANCE = 1e-3  # of the largest output, between the block's own and the one from these weights


def attention_weights(attention: nn.Module, tokens: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) of every head, for timm's `Attention`: (B, N, D) -> float32 (B, H, N, N)"""
    queries, keys, _ = _split(attention, tokens)
    return (queries @ keys.mT * attention.scale).softmax(dim=-1)  # type: ignore[operator]


def attend(attention: nn.Module, tokens: Tensor, weights: Tensor) -> Tensor:
    """What the attention makes of its input by given weights: (B, N, D), (B, H, N, N) -> (B, N, D)"""
    _, _, values = _split(attention, tokens)
    mixed = (weights @ values).transpose(1, 2).flatten(2)  # (B, N, H * d)
    norm, gate = getattr(attention, "norm", None), getattr(attention, "gate", None)
    if norm is not None:
        mixed = norm(mixed)
    if gate is not None:
        mixed = mixed * gate(tokens).sigmoid()
    result: Tensor = attention.proj(mixed)  # type: ignore[operator]
    return result


def _split(attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: (B, H, N, d) each"""
    num_heads: int = attention.num_heads  # type: ignore[assignment]
    joined: Tensor = attention.qkv(tokens)  # type: ignore[operator]
    parts = joined.reshape(*joined.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    queries, keys, values = parts.float().unbind(0)
    return attention.q_norm(queries), attention.k_norm(keys), values  # type: ignore[operator]


@torch.no_grad()
def last_attention(backbone: nn.Module, images: Tensor, layout: TokenLayout) -> tuple[Tensor | None, str]:
    """The last block's weights for normalised images (B, 3, H, W): (B, H, N, N); None and the reason where a
    model's attention is of another kind."""
    if not isinstance(backbone, VisionTransformer):
        return None, (
            "this backbone attends within windows of its last map, and no token of it sees the whole image, "
            "so there is no map of what the image's feature is taken from"
        )
    attention = getattr(backbone.blocks[-1], "attn", None)
    parts = ("qkv", "q_norm", "k_norm", "scale", "num_heads", "proj")
    if not isinstance(attention, nn.Module) or not all(hasattr(attention, part) for part in parts):
        return None, "the last block of this model has no plain self-attention to look into"
    seen: list[tuple[Tensor, Tensor]] = []
    hook = attention.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    try:
        encode(backbone, images, layout)
    finally:
        hook.remove()
    (tokens, own) = seen[-1]
    weights = attention_weights(attention, tokens)
    again = attend(attention, tokens, weights)
    if not torch.allclose(again, own.float(), atol=TOLERANCE * float(own.abs().max()), rtol=TOLERANCE):
        return None, "the last block attends in a way of its own, which cannot be taken again from its parts"
    return weights, ""


def queries_of(weights: Tensor, layout: TokenLayout, asked: Collection[str]) -> dict[str, Tensor]:
    """What each prefix token that is asked for gives to the patches, by name; `class` is the class token's.
    Where there is none of these, what a patch gives on average, as `mean patch`.

    weights: (B, H, N, N) -> (B, H, P) each. They sum to what the prefix tokens as keys leave over.
    """
    names = [*(["class"] if layout.has_class_token else []), *layout.registers]
    to_patches = weights[..., layout.num_prefix :]  # (B, H, N, P)
    found = {name: to_patches[:, :, place] for place, name in enumerate(names) if name in asked}
    return found or {"mean patch": to_patches[:, :, layout.num_prefix :].mean(dim=2)}


def mass_mask(weights: Tensor, ratio: float = 0.6) -> Tensor:
    """The fewest patches that hold `ratio` of what all patches get: (..., P) -> bool (..., P)"""
    ordered, order = weights.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = before < ratio * ordered.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def evenness(weights: Tensor) -> float:
    """How evenly patches are attended to, from 0, one only, to 1, all alike: entropy over its maximum."""
    shares = weights / weights.sum(dim=-1, keepdim=True)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=-1)
    return float(entropy.mean()) / math.log(weights.shape[-1])
