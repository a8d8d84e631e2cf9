"""RePre: give the pixels of a view from features of several depths."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from pretrain.errors import ConfigError
from pretrain.losses import absolute_error
from pretrain.models.decoders import FusionDecoder, tap_indices
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite


class RepreConfig(TaskConfig):
    num_levels: Annotated[int, Field(gt=0)] = 4  # depths that are read; 1: the last one, the paper's `Single`
    num_layers: Annotated[int, Field(gt=0)] = 2  # that fuse a level with the deeper ones
    decoder: Literal["conv", "transformer"] = "conv"  # what these layers are
    # width to which levels are projected first. By default each keeps its own, for the paper speaks of twice
    # the width after joining; that costs several times the 4 % of a step it states, half the width about 4 %
    dec_dim: Annotated[int, Field(gt=0)] | None = None
    tap_norm: Literal["own", "none"] = "own"  # a layer norm for each level; the paper does not tell


def taps(config: RepreConfig, num_levels: int) -> tuple[int, ...]:
    """Evenly spaced blocks of a ViT; of a Swin its stages."""
    if config.num_levels > num_levels:
        raise ConfigError(
            f"tasks.repre.num_levels: {config.num_levels} is more than the {num_levels} levels of the model; "
            f"use 1 to {num_levels}"
        )
    return tap_indices(num_levels, config.num_levels)


class RepreTask(nn.Module):
    """L1 regression of all pixels of one view, next to whatever else the view is for (Wang et al., 2022,
    arXiv:2201.06857).

    Decodes the first view it reads and no other. The target is that view as it was before anything was
    hidden or damaged and before normalisation, in [0, 1]; the paper hides nothing. Features are those of the
    encoder pass that all tasks share, before the final norm, patches only. Metrics: `error`, the L1 loss;
    `chance`, the error of giving every pixel the view's mean colour.
    """

    def __init__(self, config: RepreConfig, site: TaskSite) -> None:
        super().__init__()
        self.taps = taps(config, len(site.levels))
        levels = [site.levels[tap] for tap in self.taps]
        self.decoder = FusionDecoder(
            [level.dim for level in levels],
            [level.stride_px for level in levels],
            num_layers=config.num_layers,
            kind=config.decoder,
            dec_dim=config.dec_dim,
            tap_norm=config.tap_norm,
        )

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        name = views.names[0]
        predicted = self.decoder(*(views.of_view(views.taps[tap], name) for tap in self.taps))  # (B, 3, H, W)
        target = views.of_view(views.clean, name)
        guess = target.mean(dim=(2, 3), keepdim=True).expand_as(target)
        # no task may read what comes after the last tap, the final norm; its gradient is 0 then, not missing
        loss = absolute_error(predicted, target).mean() + 0.0 * views.tokens.mean()
        return TaskOutput(loss, {"error": loss.detach(), "chance": absolute_error(guess, target).mean()})
