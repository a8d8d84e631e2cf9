"""What a task is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pretrain.tokens import TokenLayout
from pretrain.views.plan import ViewPlan


class TaskConfig(BaseModel):
    """Settings that every task has; each task adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = 1.0  # multiplies this task's loss (`fixed` balance) or its uncertainty-weighted term


@dataclass(frozen=True)
class TaskSite:
    """Where a task is built into: the sizes of the backbone it reads."""

    layout: TokenLayout
    embed_dim: int
    patch_px: int


@dataclass(frozen=True)
class EncodedViews:
    """V views of B images, encoded in one call; everything is view-major: M = V * B rows."""

    names: tuple[str, ...]  # V view names
    layout: TokenLayout
    tokens: Tensor  # (M, N, D) after the final norm
    clean: Tensor  # (M, 3, H, W) float32 in [0, 1]: what the view showed before patches were corrupted
    plan: ViewPlan  # of the same M rows

    @property
    def num_images(self) -> int:
        return len(self.tokens) // len(self.names)

    def of_view(self, rows: Tensor, name: str) -> Tensor:
        """The rows of one view. (M, ...) -> (B, ...)"""
        start = self.names.index(name) * self.num_images
        return rows[start : start + self.num_images]


@dataclass(frozen=True)
class TaskOutput:
    """A loss and named numbers, all 0-dimensional. `metrics` are detached."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
