"""Inpainting: give the pixels of patches that were not shown."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import absolute_error
from pretrain.models.heads import mlp
from pretrain.peers import Peers
from pretrain.tasks.balance import Likelihood
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite
from pretrain.tasks.hidden_patches import normalize_patches
from pretrain.tokens import take
from pretrain.views.pixels import patchify
from pretrain.views.plan import PatchSets


class InpaintingConfig(TaskConfig):
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.15  # of the patches that are hidden
    block: bool = False  # hide one contiguous region, which is harder than scattered patches
    fill: Literal["token", "zero"] = (
        "token"  # shown instead: a learned mask token, or zeros after normalisation
    )
    loss: Literal["l1", "l2"] = "l1"  # mean absolute or mean squared error
    norm_pix: bool = False  # the target is each patch minus its mean, over its standard deviation


def patch_request(config: InpaintingConfig, num_patches: int) -> dict[str, int | bool | str]:
    """What the plan must draw for this task, as fields of PatchConfig."""
    return {"inpainting": max(1, round(config.ratio * num_patches)), "inpainting_block": config.block}


def likelihood(config: InpaintingConfig) -> Likelihood:
    return config.loss


def mean_clean_color(patches: Tensor, sets: PatchSets) -> Tensor:
    """Mean colour of the patches that no task works on. (M, N, 3 P^2) -> (M, 3)"""
    clean = patches.new_ones(patches.shape[:2])
    worked_on = torch.cat([sets.colorization, sets.inpainting, sets.pairs.flatten(1), sets.jigsaw], dim=1)
    clean = clean.scatter(1, worked_on, 0.0)
    colors = patches.reshape(*patches.shape[:2], -1, 3).mean(dim=2)  # (M, N, 3)
    return (colors * clean.unsqueeze(2)).sum(dim=1) / clean.sum(dim=1, keepdim=True).clamp(min=1)


class InpaintingTask(nn.Module):
    """Regression of the hidden patches' pixels (task: Pathak et al., 2016, arXiv:1604.07379).

    Metrics: `error`, the loss; `chance`, the error of giving every hidden pixel the mean colour of the
    image's clean patches, or, with `norm_pix`, of giving 0.
    """

    def __init__(self, config: InpaintingConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.patch_px = site.patch_px
        self.head = mlp([site.embed_dim, site.embed_dim, 3 * site.patch_px**2])

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        sets = views.plan.patches
        predicted = self.head(take(views.layout.patches(views.tokens), sets.inpainting))  # (M, K, 3 P^2)
        patches = patchify(views.clean, self.patch_px)  # (M, N, 3 P^2)
        target = take(patches, sets.inpainting)
        if self.config.norm_pix:
            target = normalize_patches(target)
            guess = torch.zeros_like(target)
        else:
            guess = mean_clean_color(patches, sets).repeat(1, self.patch_px**2).unsqueeze(1).expand_as(target)
        loss = self._error(predicted, target)
        return TaskOutput(loss, {"error": loss.detach(), "chance": self._error(guess, target)})

    def _error(self, predicted: Tensor, target: Tensor) -> Tensor:
        errors = absolute_error(predicted, target)
        return (errors.square() if self.config.loss == "l2" else errors).mean()
