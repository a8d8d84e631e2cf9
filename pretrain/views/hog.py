"""Histograms of oriented gradients, the target of MaskFeat (Wei et al., 2021, arXiv:2112.09133)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses import fp32

NUM_BINS = 9  # of 20 degrees; an edge from dark to light is the same as one from light to dark
CELLS = 2  # a patch holds 2 x 2 cells
HOG_DIM = 3 * NUM_BINS * CELLS**2  # 108 values of a patch


@torch.no_grad()
@fp32
def hog(images: Tensor, patch_px: int) -> Tensor:
    """How strong the edges of each direction are in each quarter of a patch, by channel.

    images: (M, 3, H, W), normalised. Returns float32 (M, N, 108), a patch's values in the order (channel,
    bin, cell row, cell column). Sobel gradients with reflected borders; a pixel's magnitude goes to a single
    bin; the bins of a cell of one channel have unit length, or are all zero where there is no edge. As in the
    authors' code for images, there is neither a Gaussian window nor normalisation over blocks of cells.
    """
    num_images, channels, height, width = images.shape
    if patch_px % CELLS or height % patch_px or width % patch_px:
        raise ValueError(
            f"{height} x {width} px are not whole patches of {patch_px} px with {CELLS} x {CELLS} cells"
        )
    cell_px = patch_px // CELLS
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    # smooth along an edge, then subtract across it: of equal neighbours, the difference is exactly zero
    down = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    right = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    across_x = down[..., :-2] - down[..., 2:]
    across_y = right[:, :, :-2] - right[:, :, 2:]
    magnitude = (across_x.square() + across_y.square()).sqrt()
    # directions half a turn apart share a bin: take the one in [0, pi], so that rounding treats both alike
    turned = (across_x < 0) | ((across_x == 0) & (across_y < 0))
    sign = torch.where(turned, -1.0, 1.0)
    angle = torch.atan2(across_x.mul_(sign), across_y.mul_(sign))  # from the y axis
    bins = angle.div_(math.pi).mul_(NUM_BINS).floor_()
    bins.masked_fill_(bins == NUM_BINS, 0)  # an angle that rounds to pi
    of_bin = torch.empty_like(magnitude)  # one buffer for all: on a processor, new memory is what costs most
    cells = []
    for i in range(NUM_BINS):
        torch.eq(bins, i, out=of_bin)
        cells.append(_sum_cells(of_bin.mul_(magnitude), cell_px))
    histogram = F.normalize(torch.stack(cells, dim=2), dim=2)  # (M, 3, bins, cell rows, cell columns)
    rows, columns = height // patch_px, width // patch_px
    patches = histogram.view(num_images, channels * NUM_BINS, rows, CELLS, columns, CELLS)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(num_images, rows * columns, -1)


def _sum_cells(values: Tensor, cell_px: int) -> Tensor:
    """(M, C, H, W) -> (M, C, H / cell, W / cell)"""
    num_images, channels, height, width = values.shape
    cells = values.view(num_images, channels, height // cell_px, cell_px, width // cell_px, cell_px)
    return cells.sum(dim=(3, 5))
