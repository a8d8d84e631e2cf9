"""Photographs from shards through the command, against crops that lie on the device: what is lost to data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gpu.clock import digits, timed
from gpu.command_runs import Length, random_shards, train
from gpu.setting import CONFIGS, Measured, Setting, Slice, Variant
from gpu.training import MODELS, TOY_MODEL, Training, configuration

TARGET_RATIO = 0.95
BATCHES = {"ViT-B/16": 256, "ViT-S/16": 512}
LENGTH, TOY_LENGTH = Length(steps=240, every=20, warmup=60), Length(steps=6, every=2, warmup=2)
NUM_IMAGES, HEIGHT, WIDTH = 480, 375, 500
LEFT_CORES = 3  # for the training process, the loader's own thread and the rest


def measure(setting: Setting, model: str) -> Measured:
    batch = BATCHES[model]
    training = Training(configuration(setting, model, batch), setting.device)
    images = training.config.batch.global_size
    synthetic = timed(training.step, setting.device, setting.steady)
    training.close()
    threads = max(1, len(os.sched_getaffinity(0)) - LEFT_CORES)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        given = None if setting.is_toy else setting.shards
        shards = given or random_shards(
            Path(folder), *((32, 48, 64) if setting.is_toy else (NUM_IMAGES, HEIGHT, WIDTH))
        )
        lanes = 4 if setting.is_toy else 16
        overrides = [
            f"data={{shards: {shards}, lanes: {lanes}, shuffle_block: 8, decode_threads: {threads}, "
            "prefetch_batches: 4}",
            f"batch={{global_size: {images}}}",
            "engine.recompute=false",
            *(TOY_MODEL if setting.is_toy else ()),
        ]
        length = TOY_LENGTH if setting.is_toy else LENGTH
        found = train(setting, CONFIGS / MODELS[model].config, overrides, length)
    ratio = found["images_per_second"] * synthetic.median / images
    return {
        "data": "given shards, read again and again" if given else "random images",
        "decode_threads": threads,
        "synthetic_seconds": synthetic.to_json(),
        "synthetic_images_per_second": digits(images / synthetic.median),
        **found,
        "of_synthetic_ratio": digits(ratio),
        "target_ratio": TARGET_RATIO,
        "is_reached": ratio >= TARGET_RATIO,
        "headline": f"{100 * ratio:.1f} % of the rate with crops on the device, waiting for data "
        f"{100 * found['data_wait_ratio']:.1f} % of the time",
    }


def variants(setting: Setting) -> dict[str, Variant]:
    return {model: Variant(lambda model=model: measure(setting, model), 180.0) for model in BATCHES}


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    return {
        name: {key: found[key] for key in ("of_synthetic_ratio", "is_reached")}
        for name, found in good.items()
    }


REAL_DATA = Slice("photographs from shards against crops on the device (target 95 %)", variants, summary)
