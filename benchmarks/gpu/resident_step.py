"""A step of ViT-S/4 on images of 32 px that lie on the GPU, by the command; do CUDA graphs pay?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from gpu.clock import digits
from gpu.command_runs import Length, random_shards, train
from gpu.setting import CONFIGS, Measured, Setting, Slice, Variant
from gpu.training import TOY_MODEL, compiled

CONFIG = CONFIGS / "cifar10_vits4_multitask.yaml"
TARGET_SECONDS = 0.008
LENGTH, TOY_LENGTH = Length(steps=1200, every=100, warmup=400), Length(steps=6, every=2, warmup=2)
NUM_IMAGES, TOY_IMAGES = 10_000, 64
# a hundred epochs of 50,000 images
STEPS_OF_100_EPOCHS = 100 * 50_000 // 256


def measure(setting: Setting, *settings: str) -> Measured:
    length = TOY_LENGTH if setting.is_toy else LENGTH
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        # the whole of a real set is read and decoded first, which toy sizes need not
        given = None if setting.is_toy else setting.cifar
        shards = given or random_shards(Path(folder), TOY_IMAGES if setting.is_toy else NUM_IMAGES, 32, 32)
        overrides = [
            f"data={{shards: {shards}, lanes: 8, resident: true}}",
            f"batch.global_size={8 if setting.is_toy else 256}",
            *(TOY_MODEL if setting.is_toy else ()),
            *settings,
        ]
        found = train(setting, CONFIG, overrides, length)
    seconds = found["wall_seconds_per_step"]
    return {
        "data": "given shards" if given else "random images",
        **found,
        "target_seconds": TARGET_SECONDS,
        "is_reached": seconds <= TARGET_SECONDS,
        "seconds_of_100_epochs": digits(seconds * STEPS_OF_100_EPOCHS),
        "headline": f"{1000 * seconds:.3g} ms a step (target {1000 * TARGET_SECONDS:g})",
    }


def variants(setting: Setting) -> dict[str, Variant]:
    graphs = "engine.compile_mode=reduce-overhead"
    return {
        "compiled": Variant(lambda: measure(setting, compiled(setting, True)), 90.0),
        "compiled, CUDA graphs": Variant(lambda: measure(setting, compiled(setting, True), graphs), 90.0),
        "eager": Variant(lambda: measure(setting, compiled(setting, False)), 75.0),
        "compiled, plain torch engine": Variant(
            lambda: measure(setting, compiled(setting, True), "engine.kind=local"), 90.0
        ),
    }


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    best = min(good, key=lambda name: good[name]["wall_seconds_per_step"], default=None)
    if best is None:
        return {"problem": "nothing was measured"}
    seconds = good[best]["wall_seconds_per_step"]
    return {"best": best, "seconds": seconds, "is_reached": seconds <= TARGET_SECONDS}


RESIDENT_STEP = Slice(
    "ViT-S/4, resident images of 32 px, batch 256, by `pretrain train` (target 8 ms)", variants, summary
)
