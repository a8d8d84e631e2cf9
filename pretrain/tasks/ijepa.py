"""I-JEPA: predict what the teacher makes of blocks of the view, from a context that holds none of them."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import fp32
from pretrain.models.decoders import Predictor
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite
from pretrain.tasks.hidden_patches import refuse_views, refuse_width, squared_error
from pretrain.tokens import take


class IjepaConfig(TaskConfig):
    predictor_dim: Annotated[int, Field(gt=0)] = 384
    predictor_depth: Annotated[int, Field(gt=0)] = 6  # of the release for ViT-B; 12 for ViT-L and ViT-H
    num_heads: Annotated[int, Field(gt=0)] = 6  # of the predictor; in the release as many as the encoder has
    # smooth L1 with beta 1 is the release's; l2, the mean squared error, stands for the paper's distance
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"


def unsuited(config: IjepaConfig, surroundings: Surroundings) -> str | None:
    width = refuse_width("predictor_dim", config.predictor_dim, "num_heads", config.num_heads)
    return width or refuse_views(surroundings, how="drop", kinds=("multiblock",))


def teacher_views(config: IjepaConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """The teacher sees whole what the student sees parts of."""
    return names


@fp32
def standardize(tokens: Tensor) -> Tensor:
    """Each token to mean 0 and variance 1: a layer norm without gain and bias. (..., D) -> the same"""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)


@fp32
def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise: half the square of an error below 1, else the error minus one half."""
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=1.0)


@torch.no_grad()
@fp32
def global_std(rows: Tensor, peers: Peers) -> Tensor:
    """Standard deviation of each channel over the rows of all ranks, averaged over channels. (R, D) -> ()

    Every rank holds as many rows.
    """
    count = len(rows) * peers.world_size
    mean = peers.sum(rows.sum(dim=0)) / count
    variance = peers.sum((rows - mean).square().sum(dim=0)) / count
    return variance.sqrt().mean()


class IjepaTask(nn.Module):
    """Features of target blocks, by one predictor that is asked for each block on its own (Assran et al.,
    2023, arXiv:2301.08243).

    The view needs a `multiblock` mask. The target is the averaged teacher's token at each place, standardised
    over its channels. The published encoder has neither class token nor registers; where the model has some,
    they are encoded with the context, but the predictor gets the context's patches only. The mean is over
    everything, so a likelihood of l2, though the default loss is quadratic for errors below 1 only.
    Metrics: `error`, the loss; `chance`, that of giving 0, about 0.425 for Gaussian features; `target_std`,
    the standard deviation over patches and images of the teacher's channels before they are standardised,
    averaged: an error that falls together with it is collapse.
    """

    def __init__(self, config: IjepaConfig, site: TaskSite) -> None:
        super().__init__()
        self.error = squared_error if config.loss == "l2" else smooth_l1
        self.predictor = Predictor(
            site.embed_dim,
            site.layout.grid,
            dim=config.predictor_dim,
            depth=config.predictor_depth,
            num_heads=config.num_heads,
        )

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        mask, teacher = views.plan.mask, views.teacher
        assert mask is not None
        assert mask.kept is not None
        assert teacher is not None
        context = views.layout.patches(views.tokens)  # (M, K, D)
        predicted = self.predictor(context, mask.kept, mask.targets)  # (M, T, n, D)
        features = torch.cat([teacher.layout.patches(teacher.of_view(name)) for name in views.names])
        asked = take(features, mask.targets.flatten(1)).reshape(predicted.shape)
        target = standardize(asked)
        # the blocks of a step have one size for all images of all ranks, so means of ranks can be averaged
        loss = self.error(predicted, target).mean()
        metrics = {
            "error": loss.detach(),
            "chance": self.error(torch.zeros_like(target), target).mean(),
            "target_std": global_std(features.flatten(0, 1), peers),
        }
        return TaskOutput(loss, metrics)
