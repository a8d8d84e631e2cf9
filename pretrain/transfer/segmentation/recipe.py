"""The recipe of a segmentation: every number of a protocol, with those of SETR-PUP on Cityscapes as defaults.

Zheng et al., 2021, arXiv:2012.15840, as in their release.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.schedules import Schedule
from pretrain.settings import Settings

HeadKind = Literal["naive", "pup", "mla", "upernet"]
VIT_HEADS: tuple[HeadKind, ...] = ("naive", "pup", "mla")

Count = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Levels = Annotated[tuple[NotNegativeInt, ...], Field(min_length=1)]


class DataRecipe(Settings):
    """What is read of the data folder, and at which size."""

    layout: Literal["auto", "cityscapes", "folder"] = "auto"
    train_split: str = "train"
    test_split: str = "val"
    ignore_label: Annotated[int, Field(ge=0, le=65535)] = 255  # of mask files; left out of loss and metrics
    # longer and shorter side that images are fitted into before all else; none: their own size
    fit_px: tuple[Count, Count] | None = None

    @model_validator(mode="after")
    def _longer_side_first(self) -> DataRecipe:
        if self.fit_px is not None and self.fit_px[0] < self.fit_px[1]:
            raise ValueError(f"fit_px: {list(self.fit_px)} reads [longer side, shorter side]; swap them")
        return self


class AugmentRecipe(Settings):
    """What happens to a training image."""

    scale: tuple[Positive, Positive] = (0.5, 2.0)  # factor of both sides, uniform in between
    cat_max_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75  # most that one class may fill of a crop
    flip_ratio: Ratio = 0.5
    photometric: bool = True  # brightness, contrast, saturation, hue

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> AugmentRecipe:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: {list(self.scale)} reads [least, most]; swap them")
        return self


class HeadRecipe(Settings):
    """The part that turns feature maps into classes. naive, pup and mla read a ViT, upernet a Swin."""

    kind: HeadKind = "pup"
    channels: Count | None = None  # none: 256, and 512 of upernet
    # Blocks of a ViT, from 0: of mla the four it joins, of naive and pup the one it reads; none: as published
    # for 12 blocks, and at the same shares of another depth
    levels: Levels | None = None
    # Of naive and pup: blocks with an auxiliary head; []: none. mla has one on each of its levels, upernet
    # one on the third stage
    aux_levels: tuple[NotNegativeInt, ...] | None = None
    aux_weight: NotNegative = 0.4  # 0: no auxiliary heads
    dropout_ratio: BelowOne = 0.1  # of upernet, before the last layer


class OptimRecipe(Settings):
    """How weights are stepped. The learning rate falls as a power of what is left of the steps."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01
    min_lr: NotNegative = 1e-4
    power: Positive = 0.9
    warmup_steps: NotNegativeInt = 0  # linear, from a millionth of the rate
    head_lr_scale: Positive = 10.0  # of what is new, but for the neck of mla
    momentum: BelowOne = 0.9  # of sgd
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)  # of adamw
    weight_decay: NotNegative = 0.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of the rate, per layer downwards
    clip_norm: NotNegative = 0.0  # 0: no clipping

    def schedule(self, num_steps: int) -> Schedule:
        return poly(self.lr, self.min_lr, num_steps, self.power, self.warmup_steps)


class InferenceRecipe(Settings):
    """How the trained network is tested."""

    mode: Literal["slide", "whole"] = "slide"  # windows of the crop's size, or the image in one piece
    # between windows, two thirds of crop_px if none; what several see is the mean of their logits
    stride_px: Count | None = None
    flip: bool = False  # mean of the image's and its mirror image's probabilities
    every_steps: NotNegativeInt = 0  # test also at saves that are multiples of this; 0: only at the end
    initialisation: bool = True  # test the network before its first step too, for comparison
    num_pictures: NotNegativeInt = 8


class SegmentationRecipe(Settings):
    """A segmentation, completely."""

    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    num_steps: Count = 80_000
    batch_size: Count = 8  # over all processes
    crop_px: Count = 768  # side of the square that is trained on
    drop_path_ratio: BelowOne = 0.0
    save_every_steps: Count = 4000
    log_every_steps: Count = 50
    num_workers: NotNegativeInt | None = None  # processes that read and augment; none: the cores
    data: DataRecipe = DataRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    head: HeadRecipe = HeadRecipe()
    optim: OptimRecipe = OptimRecipe()
    test: InferenceRecipe = InferenceRecipe()

    @model_validator(mode="after")
    def _parts_fit(self) -> SegmentationRecipe:
        if self.test.stride_px is not None and self.test.stride_px > self.crop_px:
            raise ValueError(
                f"test.stride_px: {self.test.stride_px} is more than crop_px ({self.crop_px}), so windows "
                f"would leave gaps; use {max(1, self.crop_px * 2 // 3)}"
            )
        if self.optim.warmup_steps >= self.num_steps:
            raise ValueError(
                f"optim.warmup_steps: {self.optim.warmup_steps} of {self.num_steps} steps leave nothing "
                f"after the warm-up; use {self.num_steps // 10}"
            )
        return self

    @property
    def stride_px(self) -> int:
        """Between the windows of a test."""
        return self.test.stride_px or max(1, self.crop_px * 2 // 3)

    def workers(self, num_processes: int) -> int:
        """Processes of one process that read and augment."""
        if self.num_workers is not None:
            return self.num_workers
        return min(16, max(1, (os.cpu_count() or 1) // num_processes))


def poly(base: float, final: float, num_steps: int, power: float, warmup_steps: int = 0) -> Schedule:
    """From `base` to `final` as (1 - step / num_steps) ** power; a warm-up climbs to that curve in a line."""

    def value(step: int) -> float:
        left: float = max(0.0, 1.0 - step / num_steps) ** power
        rate = (base - final) * left + final
        if step < warmup_steps:
            return rate * (1e-6 + (1.0 - 1e-6) * step / warmup_steps)
        return rate

    return value
