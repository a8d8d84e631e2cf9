"""Fixed positional tables of sines and cosines, for grids of patches and for plain sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pretrain.errors import ConfigError

PositionOrder = Literal["mae", "moco"]
_BASE = 10_000.0  # the slowest sine turns once in about 2 pi * _BASE steps (arXiv:1706.03762, section 3.5)


def sincos_positions(dim: int, grid: tuple[int, int], order: PositionOrder) -> Tensor:
    """Sines, then cosines, of each patch's place along one side of the grid, then the same of the other side.

    Each of the four parts has dim / 4 frequencies. "mae" begins with the column (He et al., 2021,
    arXiv:2111.06377; I-JEPA too), "moco" with the row (Chen et al., 2021, arXiv:2104.02057).
    Returns float32 (N, D), row by row.
    """
    if dim % 4:
        legal = f"{dim // 4 * 4} or {dim // 4 * 4 + 4}" if dim > 4 else "4"
        raise ConfigError(
            f"embed_dim: {dim} does not divide into sines and cosines of row and column; use {legal}"
        )
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")  # (rows, columns) each
    first, second = (column, row) if order == "mae" else (row, column)
    quarter = dim // 4
    frequencies = _BASE ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # (D / 4,), 1 down to 1e-4
    parts = []
    for place in (first, second):
        angles = place.reshape(-1, 1) * frequencies  # (N, D / 4)
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()


def sinusoid_positions(dim: int, num_positions: int) -> Tensor:
    """Sines at even and cosines at odd channels of a plain sequence (Vaswani et al., 2017, arXiv:1706.03762).

    Returns float32 (num_positions, dim).
    """
    channel = torch.arange(dim)
    frequencies = _BASE ** -((channel - channel % 2).double() / dim)  # (dim,), the same for each pair
    angles = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1) * frequencies
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos()).float()
