"""Training steps of real configs on random crops that lie on the device: what most slices time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from gpu.setting import CONFIGS, Setting
from pretrain import build
from pretrain.config import RunConfig, load_config
from pretrain.engine.deepspeed_engine import zero_stage
from pretrain.engine.engine import StepResult
from pretrain.optim import Knobs
from pretrain.peers import ALONE
from pretrain.plan.flops import train_flops
from pretrain.views.prepare import Inputs, Moment, prepare, with_labels

KNOBS = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=0.0)
LIGHT_TASKS = ("rotation", "colorization", "inpainting", "relative_position", "jigsaw")
CONTRASTIVE_ONLY = [f"tasks.{name}=null" for name in LIGHT_TASKS]
NUM_SAMPLES = 100_000
MOMENTUM = 0.99
TOY_MODEL = [
    "model={name: vit_tiny_patch16_224, img_px: 32, patch_px: 4}",
    "model.args={depth: 2, embed_dim: 24, num_heads: 2}",
    *(f"views.{view}.size_px=32" for view in ("one", "two")),
    "tasks.contrastive={hidden_dim: 32, out_dim: 16}",
    "tasks.relative_position={pos_embed: mask, hidden_dim: 32}",
]
TOY_BATCH = 4


@dataclass(frozen=True)
class Model:
    """A config of the core method, and what is expected of it."""

    config: str
    batches: tuple[int, ...]  # images of a step, two views each; growing until memory ends
    usual_batch: int  # for comparisons
    target_ratio: float  # of the measured rate of matrix products


MODELS = {
    "ViT-S/16": Model("imagenet_vits16_multitask.yaml", (64, 256, 512, 1024), 512, 0.40),
    "ViT-B/16": Model("imagenet_vitb16_multitask.yaml", (32, 128, 256, 512), 256, 0.50),
    "ViT-L/16": Model("imagenet_vitl16_multitask.yaml", (16, 64, 128, 192), 128, 0.55),
}


def configuration(setting: Setting, model: str, batch: int, *more: str) -> RunConfig:
    """Of the core method, with bf16 products, on one rank without accumulation."""
    return load_config(
        CONFIGS / MODELS[model].config,
        [
            "data.lanes=1",
            "batch.accumulation_steps=1",
            "engine.recompute=false",
            *(TOY_MODEL if setting.is_toy else ()),
            f"batch.global_size={TOY_BATCH if setting.is_toy else batch}",
            *more,
        ],
    )


def method(setting: Setting, config: str, batch: int, *more: str) -> RunConfig:
    """Of another config, with two views of its model's size."""
    return load_config(
        CONFIGS / config,
        [
            "data.lanes=1",
            "batch.accumulation_steps=1",
            *(TOY_MODEL[:4] if setting.is_toy else ()),
            f"batch.global_size={batch}",
            *more,
        ],
    )


def compiled(setting: Setting, is_on: bool) -> str:
    """Toy sizes leave it to the device: compiling for a CPU takes longer than all the rest."""
    how = ("auto" if setting.is_toy else "on") if is_on else "off"
    return f"engine.compile='{how}'"  # in quotes: bare, on and off are booleans in YAML


def random_crops(config: RunConfig, device: torch.device) -> list[Tensor]:
    """uint8 (V, B, S, S, 3) of each size of view, in order of first use."""
    generator = torch.Generator(device).manual_seed(0)
    by_size: dict[int, int] = {}
    for view in config.views.values():
        by_size[view.size_px] = by_size.get(view.size_px, 0) + 1
    return [
        torch.randint(
            0,
            256,
            (count, config.batch.global_size, side, side, 3),
            dtype=torch.uint8,
            device=device,
            generator=generator,
        )
        for side, count in by_size.items()
    ]


_OPEN: list[Training] = []  # not closed yet


def close_all() -> None:
    """Also of variants that failed while their memory was full."""
    while _OPEN:
        _OPEN[-1].close()


class Training:
    """What a run steps, without its files and its loader."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        _OPEN.append(self)
        self.config, self.device = config, device
        self.recipe = build.recipe(config, device)
        self.crops = random_crops(config, device)
        self.ids = torch.arange(config.batch.global_size, device=device)
        self.model = build.module(config, ALONE, device, num_samples=NUM_SAMPLES)
        self.teacher = self.model.make_teacher() if config.teacher else None
        self.engine = build.engine(config, self.model, ALONE, self.teacher)
        self._nothing = torch.zeros(0, dtype=torch.float64, device=device)
        self._is_whole = zero_stage(config.engine) < 3  # else ranks hold parts of the weights
        self._prepared: Inputs | None = None
        self._last: StepResult | None = None

    def views(self) -> Inputs:
        """The pixel stage: what is on the device before, and after."""
        inputs = prepare(self.recipe, self.config.seed, self.crops, torch.zeros_like(self.ids), self.ids)
        return with_labels(inputs, self.ids, Moment(0, 10, 1.0))

    def _seen(self, inputs: Inputs) -> Inputs:
        if self.teacher is None:
            return inputs
        is_low = self.config.engine.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_low):
            return self.model.consult(self.teacher, inputs)

    def _take(self, inputs: Iterator[Inputs]) -> None:
        """As the loop: the numbers of a step are read when the device has been given the next."""
        result = self.engine.train_step(inputs, KNOBS, lambda: self._nothing)
        if self.teacher is not None:
            self.teacher.update(self._student(), MOMENTUM, result.skipped, at_once=self._is_whole)
        if self._last is not None:
            self._last.read()
        self._last = result

    def _student(self) -> Iterator[tuple[str, Tensor]]:
        assert self.teacher is not None
        for part in self.teacher.parts:
            for name, value in self.engine.student(self.model.get_submodule(part)):
                yield f"{part}.{name}", value

    def step(self) -> None:
        """From crops on the device to stepped weights."""
        self._take(self._seen(self.views()) for _ in repeat(None))

    def prepared_step(self) -> None:
        """The same without making the views, which are always the same."""
        if self._prepared is None:
            self._prepared = self.views()
        prepared = self._prepared
        self._take(self._seen(prepared) for _ in repeat(None))

    @property
    def flops(self) -> float:
        """Of one step."""
        return self.config.batch.global_size * train_flops(self.config, 1, NUM_SAMPLES).train

    def close(self) -> None:
        """Give the memory back; hooks of DeepSpeed would keep it otherwise."""
        _OPEN.remove(self)
        inner: Any = getattr(getattr(self, "engine", None), "engine", None)
        if inner is not None:
            inner.destroy()
        device = self.device
        self.__dict__.clear()
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int | None:
    """The most that tensors took since the last reset; unknown on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
