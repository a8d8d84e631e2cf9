"""What a task is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pretrain.models.backbone import BackboneConfig, Level
from pretrain.tokens import TokenLayout
from pretrain.views.plan import ViewConfig, ViewPlan
from pretrain.views.prepare import Moment


class TaskConfig(BaseModel):
    """Settings that every task has; each task adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = 1.0  # multiplies this task's loss (`fixed` balance) or its uncertainty-weighted term
    views: tuple[str, ...] | None = (
        None  # names of the views it reads; None: as the task's kind of reading says
    )


@dataclass(frozen=True)
class TaskSite:
    """Where a task is built into: the sizes of the backbone and of the data it works on."""

    layout: TokenLayout  # of a view of the model's own size
    embed_dim: int
    patch_px: int  # side of what one patch token stands for
    levels: tuple[Level, ...] = ()  # what can be tapped: every block of a ViT, every stage of a Swin
    num_samples: int = 0  # of the training data; ids run from 0


@dataclass(frozen=True)
class Surroundings:
    """What a task can be asked about before anything is built: does it fit there?"""

    views: Mapping[str, ViewConfig]  # those it reads, in order
    model: BackboneConfig
    layout: TokenLayout
    num_samples: int | None = None  # of the training data, where it is known
    batch_size: int = 0  # images of all ranks in one micro step


@dataclass(frozen=True)
class TeacherViews:
    """What the averaged teacher makes of some views, each clean and whole; without gradients.

    View-major: M = V * B rows.
    """

    names: tuple[str, ...]
    layout: TokenLayout
    tokens: Tensor  # (M, N, D) after the final norm
    heads: Mapping[str, Mapping[str, Tensor]]  # task -> view -> (B, d): its head on the image feature

    def of_view(self, name: str) -> Tensor:
        """Tokens of one view: (B, N, D)"""
        num_images = len(self.tokens) // len(self.names)
        start = self.names.index(name) * num_images
        return self.tokens[start : start + num_images]


@dataclass(frozen=True)
class EncodedViews:
    """V views of B images, encoded in one call; everything is view-major: M = V * B rows."""

    names: tuple[str, ...]  # V view names
    layout: TokenLayout
    tokens: Tensor  # (M, N, D) after the final norm; of a view with dropped patches only those that were kept
    clean: Tensor  # (M, 3, H, W) float32 in [0, 1]: what the view showed before anything was corrupted
    plan: ViewPlan  # of the same M rows
    whole: Tensor | None = None  # (M, 3, H, W): `clean`, normalised; for tasks whose spec asks for it
    changed: Tensor | None = None  # bool (M, 1, H, W): pixels that a local corruption changed
    taps: Mapping[int, Tensor] = field(default_factory=dict)  # level -> (M, C, h, w), before the final norm
    teacher: TeacherViews | None = None
    labels: Tensor | None = None  # int64 (B,): class of each image, -1 for none
    sample_ids: Tensor | None = None  # int64 (B,)
    moment: Moment = field(default_factory=Moment)
    more: tuple[EncodedViews, ...] = ()  # views the task names that have another shape

    @property
    def num_images(self) -> int:
        return len(self.tokens) // len(self.names)

    @property
    def features(self) -> Tensor:
        """What stands for each whole view: (M, D)"""
        return self.layout.image_feature(self.tokens)

    def of_view(self, rows: Tensor, name: str) -> Tensor:
        """The rows of one view. (M, ...) -> (B, ...)"""
        start = self.names.index(name) * self.num_images
        return rows[start : start + self.num_images]

    def select(self, names: tuple[str, ...]) -> EncodedViews:
        """Only these of the views, in this order."""
        if names == self.names:
            return self
        places = [self.names.index(name) for name in names]
        index: Tensor | slice
        if places == list(range(places[0], places[0] + len(places))):  # nothing is copied
            index = slice(places[0] * self.num_images, (places[-1] + 1) * self.num_images)
        else:
            rows = torch.arange(len(self.tokens), device=self.tokens.device).view(len(self.names), -1)
            index = torch.cat([rows[place] for place in places])

        def pick(value: Tensor) -> Tensor:
            return value[index]

        return replace(
            self,
            names=names,
            tokens=pick(self.tokens),
            clean=pick(self.clean),
            plan=self.plan.rows(index),
            whole=None if self.whole is None else pick(self.whole),
            changed=None if self.changed is None else pick(self.changed),
            taps={level: pick(value) for level, value in self.taps.items()},
        )


@dataclass(frozen=True)
class TaskOutput:
    """A loss and named numbers, all 0-dimensional. `metrics` are detached."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
