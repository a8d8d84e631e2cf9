"""MaskFeat: tell the gradients' directions in patches that a mask token stands in for."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm
from torch import nn

from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite
from pretrain.tasks.hidden_patches import hidden_mean, refuse_views, squared_error
from pretrain.views.hog import CELLS, HOG_DIM, hog


class MaskfeatConfig(TaskConfig):
    """What is hidden is a setting of the view: blocks of 40 % of the patches in the release."""


def unsuited(config: MaskfeatConfig, surroundings: Surroundings) -> str | None:
    patch_px = surroundings.model.patch_px
    if patch_px % CELLS:
        return f"needs patches of {CELLS} x {CELLS} cells, and {patch_px} px are odd; use {patch_px + 1} px"
    return refuse_views(surroundings, how="token")


class MaskfeatTask(nn.Module):
    """Mean squared error of the histograms of oriented gradients of the hidden patches (Wei et al., 2021,
    arXiv:2112.09133).

    The head is the release's, a layer norm and one linear layer. Tokens come here after the backbone's own
    final norm, so this second one only takes back that one's gain and bias and learns others. Targets are
    taken from the clean, normalised view, without a Gaussian window and each cell of unit length, as the
    release's. Metrics: `error`, the loss; `chance`, the error of giving 0, which is 1 / 9 where no cell is
    empty.
    """

    def __init__(self, config: MaskfeatConfig, site: TaskSite) -> None:
        super().__init__()
        self.patch_px = site.patch_px
        self.head = nn.Sequential(LayerNorm(site.embed_dim), nn.Linear(site.embed_dim, HOG_DIM))

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        mask = views.plan.mask
        assert mask is not None
        assert views.whole is not None
        predicted = self.head(views.layout.patches(views.tokens))  # (M, N, 108)
        target = hog(views.whole, self.patch_px)
        loss = hidden_mean(squared_error(predicted, target), mask.hidden, peers)
        chance = hidden_mean(squared_error(torch.zeros_like(target), target), mask.hidden, peers)
        return TaskOutput(loss, {"error": loss.detach(), "chance": chance})
