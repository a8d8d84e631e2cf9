"""Colorization: give the colours of patches that were shown in grey."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import absolute_error, global_mean
from pretrain.models.heads import mlp
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite
from pretrain.tokens import take
from pretrain.views.pixels import patchify, rgb_to_lab_ab, split_patches, to_gray

AB_SCALE = 110.0  # largest |a| or |b| of sRGB colours, roughly


class ColorizationConfig(TaskConfig):
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.10  # of the patches that lose their colour
    target: Literal["pixel", "mean", "ab"] = (
        "pixel"  # RGB of each pixel, RGB mean of the patch, Lab a and b / 110
    )


def patch_request(config: ColorizationConfig, num_patches: int) -> dict[str, int | bool | str]:
    """What the plan must draw for this task, as fields of PatchConfig."""
    return {"colorization": max(1, round(config.ratio * num_patches))}


def color_target(tiles: Tensor, target: Literal["pixel", "mean", "ab"]) -> Tensor:
    """RGB tiles (T, 3, P, P) in [0, 1] -> (T, out): 3 P^2, 3 or 2 P^2 numbers per tile."""
    if target == "mean":
        return tiles.mean(dim=(2, 3))
    colors = rgb_to_lab_ab(tiles) / AB_SCALE if target == "ab" else tiles
    return patchify(colors, tiles.shape[-1]).squeeze(1)


class ColorizationTask(nn.Module):
    """L1 regression of colours (task: Zhang et al., 2016, arXiv:1603.08511).

    A view that is grey as a whole has no colours to give and is skipped; the mean is over the patches left on
    all ranks. The head runs for every view, so its gradient exists (as zeros) even where all were skipped.
    Metrics: `error`, the L1 loss; `chance`, the error of repeating the grey that is shown.
    """

    def __init__(self, config: ColorizationConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.patch_px = site.patch_px
        out_dim = {"pixel": 3 * site.patch_px**2, "mean": 3, "ab": 2 * site.patch_px**2}[config.target]
        self.head = mlp([site.embed_dim, site.embed_dim, out_dim])

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        index = views.plan.patches.colorization  # (M, K)
        predicted = self.head(take(views.layout.patches(views.tokens), index))  # (M, K, out)
        tiles = take(split_patches(views.clean, self.patch_px), index).flatten(0, 1)  # (M * K, 3, P, P)
        target = color_target(tiles, self.config.target).reshape(predicted.shape)
        shown = color_target(to_gray(tiles), self.config.target).reshape(predicted.shape)

        colored = ~views.plan.gray  # (M,)
        count = colored.sum() * target[0].numel()
        loss = global_mean(_sum_over(colored, absolute_error(predicted, target)), count, peers)
        with torch.no_grad():
            chance = global_mean(_sum_over(colored, absolute_error(shown, target)), count, peers)
        return TaskOutput(loss, {"error": loss.detach(), "chance": chance})


def _sum_over(rows: Tensor, errors: Tensor) -> Tensor:
    """Sum of the errors (M, K, out) of the rows where bool (M,) holds. -> ()"""
    return errors.masked_fill(~rows[:, None, None], 0.0).sum()
