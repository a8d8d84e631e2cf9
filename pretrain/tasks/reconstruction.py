"""Reconstruction: give the pixels of a view of which parts were damaged."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import absolute_error, global_mean
from pretrain.models.heads import mlp
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite
from pretrain.views.pixels import unpatchify


class ReconstructionConfig(TaskConfig):
    """Defaults are those of the first SiT, to which its published results belong."""

    # pixels that count: all, as in the first SiT, or those that were damaged, as in its later versions
    where: Literal["all", "changed"] = "all"
    # layers with GELU before the linear one, as wide as tokens; the later versions have 2
    hidden_layers: Annotated[int, Field(ge=0)] = 0


def unsuited(config: ReconstructionConfig, surroundings: Surroundings) -> str | None:
    for name, view in surroundings.views.items():
        if view.mask is not None and view.mask.how == "drop":
            return f"reads all patches, but view '{name}' drops some (mask.how: drop); read another view"
        if config.where == "changed" and view.local is None:
            return f"where: changed counts damaged pixels, and view '{name}' has none; give it `local`"
    return None


class ReconstructionTask(nn.Module):
    """L1 regression of the pixels of clean views from damaged ones, each patch from its own token: SiT
    (Atito et al., 2021, arXiv:2104.03602).

    The target is the whole clean view, normalised with the statistics of the data set. One linear layer is
    the release's transposed convolution with a stride of one patch, but has a bias for each pixel of a patch
    where that has one for each channel. Metrics: `error`, the L1 loss; `chance`, the error of repeating what
    was not damaged and giving what was damaged the mean colour of the rest.
    """

    def __init__(self, config: ReconstructionConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.patch_px = site.patch_px
        self.head = mlp([*[site.embed_dim] * (1 + config.hidden_layers), 3 * site.patch_px**2])

    def images(self, views: EncodedViews) -> Tensor:
        """What the head gives for every pixel: (M, 3, H, W)"""
        patches = self.head(views.layout.patches(views.tokens))  # (M, N, 3 P^2)
        return unpatchify(patches, self.patch_px, views.layout.grid[1])

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        target, counted = views.whole, None
        assert target is not None
        if self.config.where == "changed":
            assert views.changed is not None
            counted = views.changed
        loss = _mean_where(counted, absolute_error(self.images(views), target), peers)
        chance = _mean_where(counted, absolute_error(guess(target, views.changed), target), peers)
        return TaskOutput(loss, {"error": loss.detach(), "chance": chance})


def guess(target: Tensor, changed: Tensor | None) -> Tensor:
    """The view with its damaged pixels in the mean colour of the others; if none is marked as damaged, all of
    it in its mean colour. target: (M, 3, H, W), changed: bool (M, 1, H, W) -> (M, 3, H, W)"""
    everywhere = torch.ones_like(target[:, :1], dtype=torch.bool)
    painted, known = (everywhere, everywhere) if changed is None else (changed, ~changed)
    count = known.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    color = target.masked_fill(~known, 0.0).sum(dim=(2, 3), keepdim=True) / count  # (M, 3, 1, 1)
    return torch.where(painted, color, target)


def _mean_where(counted: Tensor | None, errors: Tensor, peers: Peers) -> Tensor:
    """This rank's share of the mean over all ranks of the errors (M, 3, H, W), all of them or those at the
    pixels where bool (M, 1, H, W) holds."""
    if counted is None:
        return errors.mean()
    return global_mean(errors.masked_fill(~counted, 0.0).sum(), counted.sum() * errors.shape[1], peers)
