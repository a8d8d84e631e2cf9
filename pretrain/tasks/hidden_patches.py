"""What tasks about patches that the encoder did not see have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.losses import fp32, global_mean
from pretrain.peers import Peers
from pretrain.tasks.contract import Surroundings


@fp32
def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch to mean 0 and (unbiased) variance 1 over its values, as MAE's targets (He et al., 2021,
    arXiv:2111.06377). (M, K, 3 P^2) -> the same"""
    centered = patches - patches.mean(dim=2, keepdim=True)
    return centered * torch.rsqrt(patches.var(dim=2, keepdim=True) + 1e-6)


@fp32
def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise (prediction - target)^2, in float32; both of one shape, the result too."""
    return (prediction - target).square()


def hidden_mean(errors: Tensor, hidden: Tensor, peers: Peers) -> Tensor:
    """This rank's share of the mean over the hidden patches of all ranks, whose number may differ.

    errors: (M, N, d), of every patch; hidden: bool (M, N). What the others hold has no influence.
    """
    total = errors.masked_fill(~hidden.unsqueeze(2), 0.0).sum()
    return global_mean(total, hidden.sum() * errors.shape[2], peers)


def refuse_views(surroundings: Surroundings, how: str, kinds: tuple[str, ...] = ()) -> str | None:
    """Why patches of these views are not hidden as a task needs it, and the remedy; None if they are.

    kinds: the masks that will do; any if empty. Where patches are dropped, a decoder or predictor knows the
    places of the model's own grid only.
    """
    if surroundings.model.is_swin:
        return f"hides patches, and '{surroundings.model.name}' needs them all; use a ViT"
    example = f"mask: {{kind: {kinds[0]}, how: {how}}}" if kinds else f"mask.how: {how}"
    for name, view in surroundings.views.items():
        if how == "drop" and view.size_px != surroundings.model.img_px:
            return (
                f"is built for views of {surroundings.model.img_px} px, and view '{name}' is of "
                f"{view.size_px}; name another view"
            )
        if view.mask is None:
            return f"needs hidden patches, and view '{name}' shows them all; give it a mask ({example})"
        if view.mask.how != how or (kinds and view.mask.kind not in kinds):
            return (
                f"does not work with the mask of view '{name}' (kind: {view.mask.kind}, "
                f"how: {view.mask.how}); use {example}"
            )
    return None


def refuse_width(name: str, dim: int, heads_name: str, num_heads: int) -> str | None:
    """Why a decoder of transformer blocks with fixed positions cannot have this width, and the remedy."""
    unit = math.lcm(4, num_heads)  # positions are sines and cosines of rows and of columns
    below = dim // unit * unit
    if below == dim:
        return None
    legal = f"{below} or {below + unit}" if below else str(unit)
    return f"{name} {dim} is not a multiple of 4 and of {heads_name}, {num_heads}; use {legal}"
