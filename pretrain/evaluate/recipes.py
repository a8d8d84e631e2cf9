"""Recipes of full fine-tuning: all numbers of a protocol in one place, and how a user changes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.errors import ConfigError, nearest
from pretrain.schedules import Schedule, cosine_with_warmup, quarter_cosine

RecipeName = Literal["deit", "sit", "mae", "relvit"]
Pool = Literal["class", "mean_patch", "class_rotation"]  # the last: a head for each of the two tokens

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class FinetuneRecipe(BaseModel):
    """How a whole backbone and a fresh linear head learn a labelled set: AdamW, and everything around it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_epochs: Count = 100
    batch_size: Count  # over all processes

    base_lr: Positive
    lr_batch: Count | None  # base_lr is for a batch of this size and scales with it; null: never scaled
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of the learning rate, per layer downwards
    schedule: Literal["cosine", "quarter_cosine"] = "cosine"
    warmup_epochs: NotNegative = 0.0
    warmup_ratio: BelowOne = 0.0  # of all steps, on top of the epochs
    warmup_lr: NotNegative = 0.0  # where the warm-up begins, as such: not scaled with the batch
    final_lr: NotNegative  # where the schedule ends, as such
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    weight_decay: NotNegative
    decay_everything: bool = False  # false: not of vectors, positional embedding and prefix tokens
    clip_norm: NotNegative = 0.0  # 0: no clipping

    pool: Pool  # what the head reads; a network without ViT tokens pools as timm has it
    norm_after_pool: bool = False  # mean_patch only: a fresh LayerNorm after the mean, for the final norm
    pos_embed: Literal["keep", "add"] = "keep"  # add: a fresh learned one for a ViT that has none
    head_std: NotNegative  # of the head's truncated normal weights; its bias is 0
    drop_path_ratio: BelowOne

    crop: Literal["auto", "padded", "resized"] = "auto"  # auto: padded up to 64 px, resized above
    pad_px: Count = 4  # black border of a padded crop
    crop_scale: tuple[Positive, Positive] = (0.08, 1.0)  # share of the image's area, of a resized crop
    flip_ratio: Ratio = 0.5
    rand_augment: str | None  # in timm's words
    repeats: Count = 1  # times an image comes in one epoch of unchanged length (repeated augmentation)
    erase_ratio: Ratio
    mixup_alpha: NotNegative
    cutmix_alpha: NotNegative
    label_smoothing_ratio: BelowOne

    def lr(self, batch_size: int) -> float:
        """The highest learning rate, for a global batch of so many images."""
        return self.base_lr if self.lr_batch is None else self.base_lr * batch_size / self.lr_batch

    def lr_schedule(self, batch_size: int, steps_per_epoch: int) -> Schedule:
        num_steps = self.num_epochs * steps_per_epoch
        warmup_steps = round(self.warmup_epochs * steps_per_epoch + self.warmup_ratio * num_steps)
        if warmup_steps >= num_steps:
            raise ConfigError(
                f"warmup_epochs: {self.warmup_epochs:g} of {self.num_epochs} epochs leave nothing after the "
                f"warm-up; add warmup_epochs={0.1 * self.num_epochs:g}, or train for more --epochs"
            )
        if self.schedule == "quarter_cosine":
            return quarter_cosine(self.lr(batch_size), self.final_lr, num_steps, warmup_steps)
        return cosine_with_warmup(
            self.lr(batch_size), self.final_lr, num_steps, warmup_steps, start=self.warmup_lr
        )

    def crops_padded(self, image_px: int) -> bool:
        return self.crop == "padded" or (self.crop == "auto" and image_px <= 64)


RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # two operations of magnitude 9

DEIT = FinetuneRecipe(
    batch_size=1024,
    base_lr=5e-4,
    lr_batch=512,
    warmup_epochs=5,
    warmup_lr=1e-6,
    final_lr=1e-5,
    weight_decay=0.05,
    pool="class",
    head_std=0.02,
    drop_path_ratio=0.1,
    rand_augment=RAND_AUGMENT,
    repeats=3,
    erase_ratio=0.25,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    label_smoothing_ratio=0.1,
)

RECIPES: dict[RecipeName, FinetuneRecipe] = {
    # Touvron et al., 2020, arXiv:2012.12877; also of MoCo v3, for 100 to 150 epochs
    "deit": DEIT,
    # Atito et al., 2021, arXiv:2104.03602: DeiT's, with two heads whose losses add up, four times 120 images
    "sit": DEIT.model_copy(update={"num_epochs": 501, "batch_size": 480, "pool": "class_rotation"}),
    # He et al., 2021, arXiv:2111.06377, of ViT-B (in their repository with layer_decay=0.65). ViT-L and -H:
    # base_lr=1e-3 num_epochs=50, and drop_path_ratio 0.2 and 0.3
    "mae": FinetuneRecipe(
        batch_size=1024,
        base_lr=5e-4,
        lr_batch=256,
        layer_decay=0.75,
        warmup_epochs=5,
        final_lr=1e-6,
        weight_decay=0.05,
        pool="mean_patch",
        norm_after_pool=True,
        head_std=2e-5,
        drop_path_ratio=0.1,
        rand_augment=RAND_AUGMENT,
        erase_ratio=0.25,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        label_smoothing_ratio=0.1,
    ),
    # Camporese et al., 2022, arXiv:2206.00481; of their later release: weight_decay=0.1 drop_path_ratio=0.1
    "relvit": FinetuneRecipe(
        batch_size=256,
        base_lr=5e-4,
        lr_batch=None,
        schedule="quarter_cosine",
        warmup_ratio=0.1,
        final_lr=1.25e-6,
        weight_decay=0.0,
        decay_everything=True,
        clip_norm=1.0,
        pool="class",
        pos_embed="add",
        head_std=0.02,
        drop_path_ratio=0.0,
        rand_augment=None,
        erase_ratio=0.0,
        mixup_alpha=0.0,
        cutmix_alpha=0.0,
        label_smoothing_ratio=0.0,
    ),
}


def recipe_with(name: RecipeName, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """A recipe with some of its settings replaced: `key=value`, the value as JSON or plain text."""
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name}: {nearest(name, RECIPES)}")
    given: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{override}': an override reads key=value, such as weight_decay=0.1")
        if key not in FinetuneRecipe.model_fields:
            raise ConfigError(f"{key}: unknown setting; {nearest(key, FinetuneRecipe.model_fields)}")
        given[key] = _value(text)
    settings = RECIPES[name].model_dump(mode="json") | given
    try:
        return FinetuneRecipe.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise ConfigError("; ".join(problems)) from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
