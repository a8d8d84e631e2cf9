"""What the light heads of the core method add to a step that only contrasts: ViT-B/16, two views."""

from __future__ import annotations

from collections.abc import Mapping

from gpu.clock import ratio, turns
from gpu.setting import Measured, Setting, Slice, Variant
from gpu.training import CONTRASTIVE_ONLY, MODELS, Training, compiled, configuration

MODEL = "ViT-B/16"
TARGET_RATIO = 1.05
ALL, BASE = "all six tasks", "contrastive only"


def measure(setting: Setting, is_compiled: bool) -> Measured:
    batch = MODELS[MODEL].usual_batch
    trainings = {
        name: Training(
            configuration(setting, MODEL, batch, compiled(setting, is_compiled), *more), setting.device
        )
        for name, more in ((ALL, []), (BASE, CONTRASTIVE_ONLY))
    }
    timings = turns(
        {name: training.step for name, training in trainings.items()}, setting.device, setting.steady
    )
    found = ratio(timings[ALL], timings[BASE])
    for training in trainings.values():
        training.close()
    return {
        "batch": batch,
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "ratio": found,
        "target_ratio": TARGET_RATIO,
        "headline": f"{found['median']:.3f} times the contrastive step (target {TARGET_RATIO})",
    }


def variants(setting: Setting) -> dict[str, Variant]:
    return {
        name: Variant(lambda is_on=is_on: measure(setting, is_on), 90.0)
        for name, is_on in (("compiled", True), ("eager", False))
    }


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    return {
        name: {"ratio": found["ratio"]["median"], "is_reached": found["ratio"]["median"] <= TARGET_RATIO}
        for name, found in good.items()
    }


HEAD_COST = Slice(f"all light heads against contrastive only (target {TARGET_RATIO})", variants, summary)
