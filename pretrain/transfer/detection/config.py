"""DetectionConfig: all that decides on a detector; by default the 1x recipe of Mask R-CNN on Swin-T."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.optim import Beta, NotNegative, Positive
from pretrain.schedules import Schedule, cosine_with_warmup
from pretrain.settings import Settings

Count = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]

NUM_LEVELS = 5  # of the pyramid; the coarsest only proposes
STANDARD_DETECTIONS = 100  # an image, that published AP counts


class DataConfig(Settings):
    """Which splits of the folder, and what to do with annotations that cannot be."""

    train: str = "train"
    val: str = "val"
    skip_invalid: bool = False  # leave out objects with an impossible box or mask, and say how many
    skip_empty: bool = True  # train images without an object are not trained on
    num_workers: Annotated[int, Field(ge=0)] | None = None  # of each process; null: the cores there are


class AugmentConfig(Settings):
    """What a training image goes through, before a flip.

    multi_scale: the shorter side becomes one of `shortest_px`, unless the longer one would be above
    `longest_px`; of `crop_ratio` of the images only a part is taken first (Swin's recipe, from DETR). jitter:
    fitted into a square of `size_px`, times a factor from `scale`, then cut and padded to that square (LSJ,
    arXiv:2012.07177). crop: as jitter, but the factor is of the image's own pixels.
    """

    kind: Literal["multi_scale", "jitter", "crop"] = "multi_scale"
    flip_ratio: Ratio = 0.5
    shortest_px: Annotated[tuple[Count, ...], Field(min_length=1)] = tuple(range(480, 801, 32))
    longest_px: Count = 1333
    crop_ratio: Ratio = 0.5
    size_px: Count = 1024
    scale: tuple[Positive, Positive] = (0.1, 2.0)

    @model_validator(mode="after")
    def _settings_of_its_kind(self) -> AugmentConfig:
        others = (
            ("size_px", "scale")
            if self.kind == "multi_scale"
            else ("shortest_px", "longest_px", "crop_ratio")
        )
        fields = type(self).model_fields
        given = [name for name in others if getattr(self, name) != fields[name].default]
        if given:
            raise ValueError(f"'{given[0]}' means nothing to kind '{self.kind}'; remove it, or change kind")
        if self.scale[0] > self.scale[1]:
            raise ValueError(
                f"scale goes from {self.scale[0]} down to {self.scale[1]}; give the smaller first"
            )
        return self


class ModelConfig(Settings):
    """Mask R-CNN above a feature pyramid, in torchvision's parts."""

    masks: bool | None = None  # null: if the data has them; false: Faster R-CNN
    channels: Count = 256  # of the pyramid
    window_px: Count | None = None  # a ViT's blocks attend in windows of this side; null: globally
    global_blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # but for these, counted from 0
    drop_path_ratio: BelowOne = 0.2
    # sides of the square anchors, one on each level of the pyramid from fine to coarse
    anchor_px: Annotated[tuple[Positive, ...], Field(min_length=NUM_LEVELS, max_length=NUM_LEVELS)] = (
        32, 64, 128, 256, 512,
    )  # fmt: skip
    anchor_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)  # height / width
    canonical_px: Positive = 224.0  # a box of this side is read from the map of stride 16 (arXiv:1612.03144)
    rpn_convs: Count = 1
    proposals_train: tuple[Count, Count] = (2000, 2000)  # of a level before NMS, of an image after it
    proposals_test: tuple[Count, Count] = (1000, 1000)
    anchors_per_image: Count = 256  # that the RPN learns from
    boxes_per_image: Count = 512  # that the heads learn from, a quarter of them objects
    box_convs: Annotated[int, Field(ge=0)] = 0
    box_layers: Count = 2  # fully connected
    box_dim: Count = 1024
    mask_convs: Count = 4
    mask_dim: Count = 256
    head_norm: Literal["none", "layer"] = "none"  # after the convolutions of the box and the mask head


class OptimConfig(Settings):
    """AdamW; norms, biases, relative position biases and absolute positions are not decayed."""

    lr: Positive = 1e-4
    lr_batch: Count | None = None  # `lr` is for a batch of this size and scales with it; null: never scaled
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of the rate, per block downwards
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NotNegative = 0.05
    clip_norm: NotNegative = 0.0  # 0: off
    batch_size: Count = 16  # over all processes


class ScheduleConfig(Settings):
    """How long, and where the learning rate drops; `drops` are in the unit of the length."""

    epochs: Positive | None = None
    steps: Count | None = None
    kind: Literal["steps", "cosine"] = "steps"
    drops: tuple[Positive, ...] | None = None  # of kind steps; null: after 8/12 and 11/12 of the length
    drop_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    warmup_start_ratio: Ratio = 0.001  # of the rate
    save_every_steps: Count = 2000
    log_every_steps: Count = 50

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps both say how long; remove one (epochs=null or steps=null)")
        if self.kind == "cosine" and self.drops is not None:
            raise ValueError("drops means nothing to kind 'cosine'; remove it, or set kind=steps")
        length = self.length
        if self.drops is not None and (
            list(self.drops) != sorted(set(self.drops)) or self.drops[-1:] >= (length,)
        ):
            raise ValueError(f"drops {list(self.drops)} must rise and end before the length of {length:g}")
        return self

    @property
    def length(self) -> float:
        """In epochs, or in steps where those are given."""
        return self.steps if self.steps is not None else self.epochs if self.epochs is not None else 12.0

    def in_steps(self, amount: float, steps_per_epoch: float) -> float:
        """Steps, of an amount in the unit of the length."""
        return amount if self.steps is not None else amount * steps_per_epoch


class EvaluateConfig(Settings):
    """How the val split is detected, scored and shown."""

    shortest_px: Count | None = 800  # null: images keep their size, unless the longer side is too long
    longest_px: Count | None = 1333
    square: bool = False  # pad to longest_px on both sides, as training by jitter does
    detections_per_image: Count = STANDARD_DETECTIONS
    score_threshold: BelowOne = 0.05
    nms_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    initial: bool = True  # score the detector before training as well
    pictures: Annotated[int, Field(ge=0)] = 8
    picture_threshold: BelowOne = 0.5  # of the scores that a picture shows

    @model_validator(mode="after")
    def _square_has_a_side(self) -> EvaluateConfig:
        if self.square and self.longest_px is None:
            raise ValueError("square pads to longest_px; give longest_px, or set square=false")
        return self


class DetectionConfig(Settings):
    """A detector, completely."""

    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def train_side_px(self) -> int | None:
        """Sides of the square that training images are padded to, or None: as large as a batch needs."""
        return None if self.augment.kind == "multi_scale" else self.augment.size_px

    @property
    def test_side_px(self) -> int | None:
        return self.evaluate.longest_px if self.evaluate.square else None

    def lr(self) -> float:
        scale = self.optim.batch_size / self.optim.lr_batch if self.optim.lr_batch else 1.0
        return self.optim.lr * scale

    def num_steps(self, num_images: int) -> int:
        steps = self.schedule.in_steps(self.schedule.length, num_images / self.optim.batch_size)
        return math.ceil(steps - 1e-9)

    def lr_schedule(self, num_images: int) -> Schedule:
        """The learning rate at every step of a training on so many images."""
        schedule, steps_per_epoch = self.schedule, num_images / self.optim.batch_size
        num_steps, base = self.num_steps(num_images), self.lr()
        warmup_steps, start = schedule.warmup_steps, schedule.warmup_start_ratio * self.lr()
        if schedule.kind == "cosine":
            return cosine_with_warmup(base, 0.0, num_steps, min(warmup_steps, num_steps - 1), start=start)
        drops = schedule.drops or tuple(schedule.length * part / 12 for part in (8, 11))
        drop_steps = [round(schedule.in_steps(drop, steps_per_epoch)) for drop in drops]
        return step_down(base, drop_steps, schedule.drop_factor, warmup_steps, start)


def step_down(
    base: float, drop_steps: list[int], factor: float, warmup_steps: int, start: float = 0.0
) -> Schedule:
    """Linear from `start` to `base` over the warm-up; times `factor` from each of the steps on."""

    def value(step: int) -> float:
        risen = start + (base - start) * min(1.0, step / warmup_steps) if warmup_steps else base
        return risen * factor ** sum(step >= drop for drop in drop_steps)

    return value
