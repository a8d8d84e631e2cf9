"""Dense relative localization: tell how far apart, down and across, randomly drawn pairs of patches are."""

from __future__ import annotations

from functools import cache
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.constants import constant
from pretrain.losses import absolute_error
from pretrain.models.heads import mlp
from pretrain.peers import Peers
from pretrain.randomness import uniform
from pretrain.tasks.contract import EncodedViews, TaskOutput, TaskSite
from pretrain.tasks.grid_relations import Grid, GridConfig, grid_tokens
from pretrain.tokens import TokenLayout, take

PAIR_STREAM = 1 << 22  # of the random numbers; view v adds v. Views and the data order have theirs below


class DrlocConfig(GridConfig):
    num_pairs: Annotated[int, Field(gt=0)] = 64  # of each view, drawn with replacement
    raw: bool = False  # the unit is patches, as in the authors' runs, instead of the side of the grid
    # The loss is multiplied by a ratio that rises from 0 to 1 over the first epochs, then falls to 0; with
    # fixed balance `weight` is what the paper calls lambda: 0.5 for Swin, 0.1 for T2T-ViT.
    ramp_epochs: Annotated[float, Field(ge=0)] = 20.0
    end_epochs: Annotated[float, Field(gt=0)] | None = 300.0  # when it is 0 again; null: it stays at 1
    hidden_dim: Annotated[int, Field(gt=0)] = 512  # of the head's two hidden layers

    @model_validator(mode="after")
    def _rises_before_it_ends(self) -> DrlocConfig:
        if self.end_epochs is not None and self.end_epochs <= self.ramp_epochs:
            raise ValueError(
                f"end_epochs, {self.end_epochs:g}, must be after ramp_epochs, {self.ramp_epochs:g}"
            )
        return self


def ramp(config: DrlocConfig, epoch: float) -> float:
    """What the loss is multiplied by: 0 at epoch 0, 1 at `ramp_epochs`, 0 from `end_epochs` on."""
    rise = epoch / config.ramp_epochs if config.ramp_epochs else 1.0
    fall = 1.0
    if config.end_epochs is not None:
        fall = (config.end_epochs - epoch) / (config.end_epochs - config.ramp_epochs)
    return max(0.0, min(rise, fall, 1.0))


def draw_pairs(views: EncodedViews, num_pairs: int, num_places: int) -> Tensor:
    """Two places each, uniform and independent, which may be the same: int64 (M, num_pairs, 2)

    From the sample, the step and the view, so the same whatever the number of ranks.
    """
    assert views.sample_ids is not None
    draws = [
        uniform(views.moment.seed, views.moment.step, views.sample_ids, PAIR_STREAM + view, 2 * num_pairs)
        for view in range(len(views.names))
    ]
    return (torch.cat(draws) * num_places).long().view(-1, num_pairs, 2)


def unit_of(grid: Grid, raw: bool) -> tuple[float, float]:
    """What a distance down and one across are divided by."""
    return (1.0, 1.0) if raw else (grid[0] - 1.0, grid[1] - 1.0)


@cache
def best_constant_error(grid: Grid, raw: bool) -> float:
    """Mean absolute error of giving the median distance for every pair."""
    errors = []
    for length, unit in zip(grid, unit_of(grid, raw), strict=True):
        place = torch.arange(length, dtype=torch.float64)
        apart = (place.unsqueeze(1) - place).abs().flatten() / unit
        errors.append((apart - apart.median()).abs().mean())
    return float(torch.stack(errors).mean())


class DrlocTask(nn.Module):
    """L1 regression of the distances within pairs (Liu et al., 2021, arXiv:2106.03746).

    Of the two outputs the first is |row - row'|, the second |column - column'|, in sides of the grid.
    Metrics: `error`, the L1 error without the ramp; `chance`, that of the best constant; `ramp`.
    """

    def __init__(self, config: DrlocConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        dims = [2 * site.embed_dim, config.hidden_dim, config.hidden_dim, 2]
        self.head = mlp(dims, activation=nn.ReLU)
        self.starts_silent = config.ramp_epochs > 0  # its loss counts nothing in the first step

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        config = self.config
        tokens, grid = grid_tokens(views, config.pool)
        pairs = draw_pairs(views, config.num_pairs, tokens.shape[1])  # (M, m, 2)
        joined = take(tokens, pairs.flatten(1)).reshape(*pairs.shape[:2], -1)  # (M, m, 2D)
        target = pair_distances(pairs, grid, config.raw, views.plan.patches.shuffled)
        error = absolute_error(self.head(joined), target).mean()
        factor = ramp(config, views.moment.epoch)
        metrics = {
            "error": error.detach(),
            "chance": error.new_full((), best_constant_error(grid, config.raw)),
            "ramp": error.new_full((), factor),
        }
        return TaskOutput(factor * error, metrics)


def pair_distances(pairs: Tensor, grid: Grid, raw: bool, source: Tensor | None = None) -> Tensor:
    """Distance down and across of the patches shown at two places each: int64 (M, m, 2) -> float32 (M, m, 2)

    source: int64 (M, N), the patch whose content each place shows; None where each shows its own.
    """
    shown = pairs if source is None else take(source, pairs.flatten(1)).view_as(pairs)
    position = TokenLayout(grid).positions(pairs.device)[shown]  # (M, m, 2 patches, 2 axes)
    apart = (position[:, :, 0] - position[:, :, 1]).abs()
    return apart / constant(unit_of(grid, raw), torch.float32, pairs.device)
