"""The colours of sRGB as bins of the ab plane of CIE Lab, and how a distribution over them tells a colour
(Zhang et al., 2016, arXiv:1603.08511)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pretrain.losses import fp32
from pretrain.views.pixels import rgb_to_lab_ab

BIN_SIDE = 10.0  # in units of a and b
NUM_NEIGHBORS = 5  # bins that a colour is shared among
NEIGHBOR_SIGMA = 5.0  # in units of a and b
UNIFORM_RATIO = 0.5  # of the uniform distribution, in what rare colours are weighted by
_CODE = 100  # more than the bins on either axis
TEMPERATURE = 0.38  # between the mean of the distribution, 1, and its mode, 0


@cache
def centers() -> Tensor:
    """Bins that hold a colour of 8 bits per channel, in order of a, then b: float32 (261, 2)

    Colours of one a and b lie on a line through the cube of all colours, which leaves it through its surface;
    so the surface has them all. (The authors' table has 313.)
    """
    level = torch.arange(256, dtype=torch.float64) / 255
    first, second = torch.meshgrid(level, level, indexing="ij")
    faces = [
        torch.stack([first, second, torch.full_like(first, value)]).roll(turn, dims=0)
        for value in (0.0, 1.0)
        for turn in range(3)
    ]
    plane = rgb_to_lab_ab(torch.stack(faces)).transpose(0, 1).flatten(1)  # (2, 6 * 256^2)
    across, down = (plane / BIN_SIDE).round().long()
    found: Tensor = torch.unique(across * _CODE + down + _CODE // 2)  # one number for each bin
    return torch.stack([found // _CODE, found % _CODE - _CODE // 2], dim=1) * BIN_SIDE


@cache
def centers_on(device: torch.device) -> Tensor:
    """The same where they are needed."""
    with torch.inference_mode(False):  # or the first to ask, in that mode, would spoil them for the others
        return centers().to(device)


@fp32
def soft_encode(colors: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Share each colour among the nearest bins by a Gaussian of its distance: (..., 2), (Q, 2) ->
    int64 (..., 5), the nearest first, and shares (..., 5) that sum to 1"""
    bins = bins.to(colors.dtype)
    squares = (colors.unsqueeze(-2) - bins).square().sum(dim=-1)  # (..., Q)
    squares, nearest = squares.topk(NUM_NEIGHBORS, largest=False)
    return nearest, (-squares / (2 * NEIGHBOR_SIGMA**2)).softmax(dim=-1)


@fp32
def soft_cross_entropy(logits: Tensor, nearest: Tensor, shares: Tensor) -> Tensor:
    """(..., Q) and what `soft_encode` gives -> (...)"""
    return -(logits.log_softmax(dim=-1).gather(-1, nearest) * shares).sum(dim=-1)


@fp32
def annealed_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """The colour that a distribution stands for, its mean after sharpening: (..., Q), (Q, 2) -> (..., 2)"""
    return (logits / TEMPERATURE).softmax(dim=-1) @ bins.to(logits.dtype)


def rebalancing(counts: Tensor, bins: Tensor) -> Tensor:
    """Weights of the bins, higher for rare colours, with a mean of 1 over colours as often as they were
    counted: int64 (Q,), (Q, 2) -> float32 (Q,). All are 1 before anything was counted.

    The paper's eq. 4, with counts smoothed over neighbouring bins.
    """
    total = counts.sum()
    frequency = torch.where(total > 0, counts / total.clamp(min=1), 1 / len(counts))
    nearest, shares = soft_encode(bins, bins)  # (Q, 5) each
    smooth = torch.zeros_like(frequency)
    smooth = smooth.index_add(0, nearest.flatten(), (shares * frequency.unsqueeze(1)).flatten())
    smooth = torch.where(total > 0, smooth, frequency)
    weights = 1 / ((1 - UNIFORM_RATIO) * smooth + UNIFORM_RATIO / len(counts))
    return weights / (frequency * weights).sum()
