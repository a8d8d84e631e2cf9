"""Colorization: give the colours of patches that were shown in grey."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import absolute_error, global_mean
from pretrain.models.heads import mlp
from pretrain.peers import Peers
from pretrain.tasks import color_bins
from pretrain.tasks.balance import Likelihood
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite
from pretrain.tokens import take
from pretrain.views.pixels import patchify, rgb_to_lab_ab, split_patches, to_gray

AB_SCALE = 110.0  # largest |a| or |b| of sRGB colours, roughly

RegressionTarget = Literal["pixel", "mean", "ab"]


class ColorizationConfig(TaskConfig):
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.10  # of the patches that lose their colour
    # RGB of each pixel, RGB mean of the patch, Lab a and b / 110 of each pixel; or the class of the colour of
    # each cell among bins of the ab plane
    target: Literal["pixel", "mean", "ab", "ab_cls"] = "pixel"
    cell_px: Annotated[int, Field(gt=0)] = 4  # side of what has one colour (ab_cls)
    rebalance: bool = False  # give rare colours a higher weight, by how often they were seen so far (ab_cls)


def patch_request(config: ColorizationConfig, num_patches: int) -> dict[str, int | bool | str]:
    """What the plan must draw for this task, as fields of PatchConfig."""
    return {"colorization": max(1, round(config.ratio * num_patches))}


def likelihood(config: ColorizationConfig) -> Likelihood:
    return "ce" if config.target == "ab_cls" else "l1"


def unsuited(config: ColorizationConfig, surroundings: Surroundings) -> str | None:
    patch_px = surroundings.model.token_px
    if config.target == "ab_cls" and patch_px % config.cell_px:
        return f"{config.cell_px} px cells do not divide {patch_px} px patches; set cell_px to a divisor"
    return None


def color_target(tiles: Tensor, target: RegressionTarget) -> Tensor:
    """RGB tiles (T, 3, P, P) in [0, 1] -> (T, out): 3 P^2, 3 or 2 P^2 numbers per tile."""
    if target == "mean":
        return tiles.mean(dim=(2, 3))
    colors = rgb_to_lab_ab(tiles) / AB_SCALE if target == "ab" else tiles
    return patchify(colors, tiles.shape[-1]).squeeze(1)


def cell_colors(tiles: Tensor, cell_px: int) -> Tensor:
    """Mean a and b of each cell of RGB tiles: (T, 3, P, P) in [0, 1] -> (T, cells, 2), row by row"""
    return split_patches(rgb_to_lab_ab(tiles), cell_px).mean(dim=(3, 4))


class ColorizationTask(nn.Module):
    """L1 regression of colours, or their classification (Zhang et al., 2016, arXiv:1603.08511).

    A view that is grey as a whole has no colours to give and is skipped; the mean is over the patches left on
    all ranks. The head runs for every view, so its gradient exists (as zeros) even where all were skipped.
    Metrics: `error`, the L1 error, of classes that of the colour they stand for, in a and b / 110; `chance`,
    the error of repeating the grey that is shown.
    """

    color_counts: Tensor  # int64 (Q,): cells of each colour seen in steps that are finished
    step_counts: Tensor  # int64 (Q,): in the step that goes on

    def __init__(self, config: ColorizationConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.patch_px = site.patch_px
        num_bins = 0
        if config.target == "ab_cls":
            num_bins = len(color_bins.centers())
            out_dim = (site.patch_px // config.cell_px) ** 2 * num_bins
        else:
            out_dim = {"pixel": 3 * site.patch_px**2, "mean": 3, "ab": 2 * site.patch_px**2}[config.target]
        self.head = mlp([site.embed_dim, site.embed_dim, out_dim])
        self.counts_colors = config.target == "ab_cls" and config.rebalance
        if self.counts_colors:
            self.register_buffer("color_counts", torch.zeros(num_bins, dtype=torch.int64))
            self.register_buffer("step_counts", torch.zeros(num_bins, dtype=torch.int64))

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        index = views.plan.patches.colorization  # (M, K)
        predicted = self.head(take(views.layout.patches(views.tokens), index))  # (M, K, out)
        tiles = take(split_patches(views.clean, self.patch_px), index).flatten(0, 1)  # (M * K, 3, P, P)
        colored = ~views.plan.gray  # (M,)
        if self.config.target == "ab_cls":
            return self._classify(predicted, tiles, colored, peers)
        target = color_target(tiles, self.config.target).reshape(predicted.shape)
        shown = color_target(to_gray(tiles), self.config.target).reshape(predicted.shape)

        count = colored.sum() * target[0].numel()
        loss = global_mean(_sum_over(colored, absolute_error(predicted, target)), count, peers)
        with torch.no_grad():
            chance = global_mean(_sum_over(colored, absolute_error(shown, target)), count, peers)
        return TaskOutput(loss, {"error": loss.detach(), "chance": chance})

    def _classify(self, predicted: Tensor, tiles: Tensor, colored: Tensor, peers: Peers) -> TaskOutput:
        num_views, centers = len(predicted), color_bins.centers_on(predicted.device)  # (Q, 2)
        colors = cell_colors(tiles, self.config.cell_px).reshape(num_views, -1, 2)  # (M, cells, 2)
        logits = predicted.reshape(*colors.shape[:2], len(centers))  # (M, cells, Q)
        nearest, shares = color_bins.soft_encode(colors, centers)  # (M, cells, 5) each
        losses = color_bins.soft_cross_entropy(logits, nearest, shares)  # (M, cells)
        if self.counts_colors:
            losses = losses * color_bins.rebalancing(self.color_counts, centers)[nearest[..., 0]]
            self._count(nearest[..., 0], colored, peers)
        count = colored.sum() * colors.shape[1]
        loss = global_mean(_sum_over(colored, losses.unsqueeze(2)), count, peers)
        with torch.no_grad():
            told = color_bins.annealed_mean(logits, centers)
            error = global_mean(_sum_over(colored, absolute_error(told, colors)), count, peers)
            chance = global_mean(_sum_over(colored, colors.abs()), count, peers)
        scale = 2 * AB_SCALE  # a and b
        return TaskOutput(loss, {"error": error / scale, "chance": chance / scale})

    @torch.no_grad()
    def _count(self, bins: Tensor, colored: Tensor, peers: Peers) -> None:
        """bins: int64 (M, cells), of views that count where colored, bool (M,), says so."""
        local = torch.zeros(len(self.step_counts), device=bins.device)
        counts = colored.unsqueeze(1).expand_as(bins).flatten().float()  # whole numbers, so exact
        self.step_counts += peers.sum(local.index_add_(0, bins.flatten(), counts)).long()

    def finish_step(self) -> None:
        """What was seen in a step counts from the next one on, so all its micro steps weigh alike."""
        if self.counts_colors:
            self.color_counts += self.step_counts
            self.step_counts.zero_()


def _sum_over(rows: Tensor, errors: Tensor) -> Tensor:
    """Sum of the errors (M, K, out) of the rows where bool (M,) holds. -> ()"""
    return errors.masked_fill(~rows[:, None, None], 0.0).sum()
