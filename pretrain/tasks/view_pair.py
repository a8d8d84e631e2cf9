"""Which two views a task compares."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.tasks.contract import EncodedViews


def view_pair(rows: Tensor, views: EncodedViews, names: tuple[str, str] | None) -> Tensor:
    """The rows of two views, view-major; by default the first two. (M, ...) -> (2B, ...)"""
    first, *others = names or views.names[:2]
    if not others:
        raise ConfigError(f"views: a task that compares two views got only '{first}'; add a second view")
    return torch.cat([views.of_view(rows, first), views.of_view(rows, others[0])])
