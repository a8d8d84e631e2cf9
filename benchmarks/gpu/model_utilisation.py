"""Model FLOP utilisation of the core method with crops that lie on the device: two views, six tasks, bf16."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from gpu.ceilings import utilisation
from gpu.clock import digits, synchronize, turns
from gpu.setting import Measured, Setting, Slice, Variant
from gpu.training import MODELS, Training, compiled, configuration, peak_bytes

WHOLE, PREPARED = "step", "step on views made before"


def measure(setting: Setting, model: str, batch: int, *settings: str) -> Measured:
    config = configuration(setting, model, batch, *settings)
    began = time.perf_counter()
    training = Training(config, setting.device)
    built = time.perf_counter()
    training.step()
    synchronize(setting.device)
    first = time.perf_counter() - built
    runs: dict[str, Callable[[], None]] = {WHOLE: training.step, PREPARED: training.prepared_step}
    timings = turns(runs, setting.device, setting.steady)
    flops, images = training.flops, config.batch.global_size
    whole, prepared = timings[WHOLE], timings[PREPARED]
    of_step = utilisation(setting, flops, whole.median)
    reached = of_step["mfu_of_measured_ratio"]
    training.close()
    return {
        "model": config.model.name,
        "batch": images,
        "views": len(config.views),
        "settings": list(settings),
        "build_seconds": round(built - began, 2),
        "first_step_seconds": round(first, 2),
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "images_per_second": digits(images / whole.median),
        "gflop_per_image": digits(flops / images / 1e9),
        **of_step,
        "mfu_without_views_of_measured_ratio": digits(reached * whole.median / prepared.median),
        "views_share_ratio": digits(1 - prepared.median / whole.median),
        "peak_bytes": peak_bytes(setting.device),
        "headline": f"{1000 * whole.median:.4g} ms, {images / whole.median:.4g} images/s, "
        f"{100 * reached:.1f} % of the measured rate",
    }  # fmt: skip


def variants(setting: Setting, model: str) -> dict[str, Variant]:
    of = MODELS[model]
    usual = of.usual_batch
    found = {}

    def add(name: str, batch: int, *settings: str, seconds: float = 60.0) -> None:
        found[name] = Variant(lambda: measure(setting, model, batch, *settings), seconds)

    for batch in of.batches[:1] if setting.is_toy else of.batches:
        add(f"batch {batch}, compiled", batch, compiled(setting, True))
    add(f"batch {usual}, eager", usual, compiled(setting, False))
    add(f"batch {usual}, compiled, plain torch engine", usual, compiled(setting, True), "engine.kind=local")
    add(f"batch {usual}, compiled, recomputing", usual, compiled(setting, True), "engine.recompute=true")
    autotuned = "engine.compile_mode=max-autotune-no-cudagraphs"
    add(f"batch {usual}, compiled, max-autotune", usual, compiled(setting, True), autotuned, seconds=200.0)
    return found


def summary(model: str, good: Mapping[str, Measured]) -> Measured:
    best = max(good, key=lambda name: good[name]["mfu_of_measured_ratio"], default=None)
    if best is None:
        return {"problem": "nothing was measured"}
    reached, target = good[best]["mfu_of_measured_ratio"], MODELS[model].target_ratio
    return {
        "best": best,
        "mfu_of_measured_ratio": reached,
        "mfu_of_datasheet_ratio": good[best].get("mfu_of_datasheet_ratio"),
        "target_ratio": target,
        "is_reached": reached >= target,
    }


def slice_of(model: str) -> Slice:
    return Slice(
        f"utilisation of {model}, crops on the device (target {MODELS[model].target_ratio:.0%})",
        lambda setting: variants(setting, model),
        lambda setting, good: summary(model, good),
    )
