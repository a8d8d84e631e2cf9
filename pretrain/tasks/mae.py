"""MAE: give the pixels of patches that were dropped, from those that were kept."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.models.decoders import MaskedDecoder
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite
from pretrain.tasks.hidden_patches import (
    hidden_mean,
    normalize_patches,
    refuse_views,
    refuse_width,
    squared_error,
)
from pretrain.views.pixels import patchify


class MaeConfig(TaskConfig):
    """Defaults are those of the release for ViT-B to ViT-H; small models want a smaller decoder, such as
    192 wide, 4 deep with 3 heads for a ViT-S with patches of 4 px."""

    decoder_dim: Annotated[int, Field(gt=0)] = 512
    decoder_depth: Annotated[int, Field(gt=0)] = 8
    decoder_heads: Annotated[int, Field(gt=0)] = 16
    norm_pix: bool = True  # the target is each patch minus its mean, over its standard deviation


def unsuited(config: MaeConfig, surroundings: Surroundings) -> str | None:
    width = refuse_width("decoder_dim", config.decoder_dim, "decoder_heads", config.decoder_heads)
    return width or refuse_views(surroundings, how="drop")


def mean_shown_color(patches: Tensor, hidden: Tensor) -> Tensor:
    """Every patch in the mean colour of the patches that are not hidden. (M, N, 3 P^2) -> the same"""
    colors = patches.reshape(*patches.shape[:2], -1, 3).mean(dim=2)  # (M, N, 3)
    shown = ~hidden.unsqueeze(2)
    color = (colors * shown).sum(dim=1, keepdim=True) / shown.sum(dim=1, keepdim=True)  # (M, 1, 3)
    return color.repeat(1, 1, patches.shape[2] // 3).expand_as(patches)


class MaeTask(nn.Module):
    """Mean squared error of the hidden patches' pixels, by a decoder that sees the kept patches and where all
    are (He et al., 2021, arXiv:2111.06377).

    The view has to drop its hidden patches; the paper drops 75 % at random, which is what a mask does by
    default. As in the release the decoder gets the class token too; registers stay with the tasks that read
    them. The target is the clean view, normalised with the statistics of the data set. Metrics: `error`, the
    loss; `chance`, the error of giving 0 with `norm_pix`, else the mean colour of the patches that are shown.
    """

    def __init__(self, config: MaeConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.patch_px = site.patch_px
        self.decoder = MaskedDecoder(
            site.embed_dim,
            site.layout.grid,
            out_dim=3 * site.patch_px**2,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
            num_prefix=int(site.layout.has_class_token),
        )

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        mask, layout = views.plan.mask, views.layout
        assert mask is not None
        assert mask.kept is not None
        assert views.whole is not None
        seen = layout.patches(views.tokens)  # (M, K, D)
        if layout.has_class_token:
            seen = torch.cat([layout.class_token(views.tokens).unsqueeze(1), seen], dim=1)
        predicted = self.decoder(seen, mask.kept)  # (M, N, 3 P^2)
        target = patchify(views.whole, self.patch_px)
        guess = torch.zeros_like(target)
        if self.config.norm_pix:
            target = normalize_patches(target)
        else:
            guess = mean_shown_color(target, mask.hidden)
        loss = hidden_mean(squared_error(predicted, target), mask.hidden, peers)
        chance = hidden_mean(squared_error(guess, target), mask.hidden, peers)
        return TaskOutput(loss, {"error": loss.detach(), "chance": chance})
