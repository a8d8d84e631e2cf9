"""Which timm reads an export as it is meant. Each version that is named here was tried."""

from __future__ import annotations

import re

import timm
from timm.models.swin_transformer import SwinTransformer

from pretrain.errors import UserError
from pretrain.export.source import RunWeights
from pretrain.models.backbone import Backbone

OLDEST = "1.0.16"  # that reads local folders


def oldest_timm(source: RunWeights, model: Backbone) -> tuple[str, str]:
    """The oldest version that will do for a backbone, and what those before it do, if they differ."""
    if isinstance(model, SwinTransformer):
        windows = [stage.blocks[0].window_size for stage in model.layers]
        if any(rows != columns for rows, columns in windows):
            return "1.0.31", "cannot load windows that are not square"  # 1.0.30 could not
    elif source.backbone.pos_embed == "none" and source.layout.num_prefix:
        return "1.0.26", "silently drops class token and registers where there are no positions"  # 1.0.25 did
    return OLDEST, ""


def check_timm(source: RunWeights, model: Backbone) -> None:
    """UserError where the installed timm is too old for a backbone."""
    oldest, why = oldest_timm(source, model)
    if why and _numbers(timm.__version__) < _numbers(oldest):
        raise UserError(f"timm {timm.__version__} {why}; install timm>={oldest}")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
