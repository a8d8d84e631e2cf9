"""How the patches of a grid lie to each other, as labels, and the head that reads pairs of patches: what the
tasks of RelViT share (Camporese et al., 2022, arXiv:2206.00481).

Labels are worked out in float64. A pair (i, j) is asked in both orders, and so is every patch with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses import absolute_error, fp32
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput
from pretrain.tokens import TokenLayout

Grid = tuple[int, int]  # patches as (rows, columns)
ANGLE_EPS = 1e-4  # keeps the quotient below 1, as the authors' code


class GridConfig(TaskConfig):
    # average the patch tokens to a grid of half the side first, 14 x 14 to 7 x 7, as for T2T-ViT
    pool: bool = False


class PairConfig(GridConfig):
    # scores from a whole matrix for each output, as the paper's formula, instead of queries and keys that
    # share the width among the outputs, as the authors' code
    bilinear_full: bool = False


# --- labels


def spatial_relations(grid: Grid) -> Tensor:
    """Where i lies as seen from j: int64 (N, N) in 0..8; 0 left-up, 1 up, 2 right-up, 3 left, 4 the same
    patch, 5 right, 6 left-down, 7 down, 8 right-down."""
    position = TokenLayout(grid).positions()
    down, right = (position.unsqueeze(1) - position).sign().unbind(2)  # (N, N) each
    return 3 * (down + 1) + right + 1


def distances(grid: Grid) -> Tensor:
    """Distance of i and j, from -1 (the same patch) to 1 (opposite corners): float64 (N, N)"""
    position = TokenLayout(grid).positions().double()
    apart = (position.unsqueeze(1) - position).square().sum(dim=2).sqrt()
    return 2 * apart / apart.max() - 1


def angles(grid: Grid) -> Tensor:
    """Angle between i and j as seen from a point outside of the grid, from -1 (the same patch) to 1 (the
    widest): float64 (N, N)

    The point lies half a grid above and to the left of the first patch: from that patch itself, all patches
    on one ray would be at one angle. It is not the direction from i to j.
    """
    shift = torch.tensor(grid, dtype=torch.float64) / 2
    ray = TokenLayout(grid).positions() + shift
    length = ray.norm(dim=1)
    angle = torch.acos(ray @ ray.T / (length.unsqueeze(1) * length + ANGLE_EPS))
    angle = angle.fill_diagonal_(0.0)
    return 2 * angle / angle.max() - 1


@cache
def labels_on(device: torch.device, relation: Callable[[Grid], Tensor], grid: Grid) -> Tensor:
    """The table of a relation where it is needed; what is not whole numbers in float32."""
    with torch.inference_mode(False):  # or the first to ask, in that mode, would spoil it for the others
        table = relation(grid)
        return (table.float() if table.is_floating_point() else table).to(device)


def labels_of(table: Tensor, source: Tensor | None, num_rows: int) -> Tensor:
    """The labels of M views: table (N, N) -> (M, N, N), or (N,) -> (M, N)

    source: int64 (M, N), the patch whose content each place shows; None where each shows its own.
    """
    if source is None:
        return table.expand(num_rows, *table.shape)
    if table.dim() == 1:
        return table[source]
    return table[source.unsqueeze(2), source.unsqueeze(1)]


# --- tokens


def pooled_grid(grid: Grid, pool: bool) -> Grid:
    """The grid that is left after pooling, if there is any."""
    return ((grid[0] + 1) // 2, (grid[1] + 1) // 2) if pool else grid


def grid_tokens(views: EncodedViews, pool: bool) -> tuple[Tensor, Grid]:
    """Patch tokens (M, N, D), row by row, and the grid they lie on.

    Pooled ones are means over 3 x 3 patches, two apart; beyond the border nothing is counted.
    """
    tokens, grid = views.layout.patches(views.tokens), views.layout.grid
    if not pool:
        return tokens, grid
    channels = tokens.mT.reshape(len(tokens), -1, *grid)  # (M, D, h, w)
    pooled = F.avg_pool2d(channels, 3, stride=2, padding=1, count_include_pad=False)
    return pooled.flatten(2).mT, pooled_grid(grid, pool)


def unsuited(config: GridConfig, surroundings: Surroundings) -> str | None:
    """Why tokens of all patches, each at its place, cannot be had; and the remedy."""
    views = surroundings.views
    for name, view in views.items():
        if view.mask is not None and view.mask.how == "drop":
            return f"reads all patches, but view '{name}' drops some (mask.how: drop); name another view"
        if config.pool and view.shuffle:
            return f"pools neighbouring patches, but view '{name}' shuffles them; set pool: false"
        if view.shape != next(iter(views.values())).shape:
            return f"reads views that are encoded together, but '{name}' is not; name views of one kind"
        side = view.size_px // surroundings.model.token_px
        if min(pooled_grid((side, side), config.pool)) < 2:
            return f"relates patches, but view '{name}' is left with one; use smaller patches or pool: false"
    return None


# --- pairs


@fp32
def pair_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products of queries and keys over the root of their width: (M, K, N, d) each -> (M, K, N, N)"""
    return queries @ keys.mT / math.sqrt(queries.shape[-1])


class PairHead(nn.Module):
    """K scores for every ordered pair of patches, from a bilinear form of their tokens each.

    The form has the rank D // K, as in the authors' code, or is a whole matrix (their paper). There are no
    values: the scores are the output.
    """

    def __init__(self, embed_dim: int, num_outputs: int, bilinear_full: bool) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        width = num_outputs * (embed_dim if bilinear_full else embed_dim // num_outputs)
        self.query = nn.Linear(embed_dim, width, bias=False)
        self.key = None if bilinear_full else nn.Linear(embed_dim, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, N, D) -> (M, K, N, N): at [:, k, i, j] score k of patch i to patch j"""
        queries = self._split(self.query(tokens))
        keys = tokens.unsqueeze(1) if self.key is None else self._split(self.key(tokens))
        return pair_scores(queries, keys)

    def _split(self, rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:2], self.num_outputs, -1).transpose(1, 2)  # (M, K, N, d)


def regress_pairs(scores: Tensor, table: Tensor, source: Tensor | None) -> TaskOutput:
    """Mean squared error of one score for each pair: (M, 1, N, N), labels (N, N) -> loss ()

    Metrics, a hundred times the error as the tables of the paper have it: `error_x100`, and `chance`, that of
    the best constant, which is the labels' variance.
    """
    target = labels_of(table, source, len(scores))
    loss = absolute_error(scores.squeeze(1), target).square().mean()
    chance = 100 * table.var(correction=0)
    return TaskOutput(loss, {"error_x100": 100 * loss.detach(), "chance": chance})
