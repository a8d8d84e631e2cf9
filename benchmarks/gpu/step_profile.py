"""What a step consists of: kernels by time, and calls that make the host wait, by torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

from gpu.clock import digits, synchronize
from gpu.setting import Measured, Setting, Slice, Variant
from gpu.training import MODELS, Training, compiled, configuration

NUM_WARMUP, NUM_STEPS = 4, 3
NUM_KERNELS = 30
# Calls that make the host wait. Not among them: the wait for all at the end, which is the profiler's, and
# that for the event of the step before, by which the loop reads its numbers.
WAITING = re.compile(r"cu(da)?StreamSynchronize|cudaMemcpy$|cuMemcpy(HtoD|DtoH)")
COUNTED = re.compile(r"(Stream|Device|Event)Synchronize|cudaMemcpy|LaunchKernel|GraphLaunch")


def measure(setting: Setting, name: str, model: str, *settings: str) -> Measured:
    config = configuration(setting, model, MODELS[model].usual_batch, *settings)
    training = Training(config, setting.device)
    for _ in range(1 if setting.is_toy else NUM_WARMUP):
        training.step()
    synchronize(setting.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.is_gpu else [])]
    num_steps = 1 if setting.is_toy else NUM_STEPS
    with profile(activities=activities) as profiler:
        for _ in range(num_steps):
            training.step()
        synchronize(setting.device)
    training.close()
    trace = setting.out / "traces" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json.gz"
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    events = profiler.key_averages()
    kernels = _kernels(events, setting, num_steps)
    calls = {event.key: round(event.count / num_steps, 2) for event in events if COUNTED.search(event.key)}
    waits = sum(event.count for event in events if WAITING.search(event.key))
    return {
        "steps": num_steps,
        "batch": config.batch.global_size,
        "kernels": kernels,
        "kernel_ms_per_step": digits(sum(kernel["ms_per_step"] for kernel in kernels)),
        "runtime_calls_per_step": calls,
        "waits_per_step": digits(waits / num_steps),
        "trace": str(trace.relative_to(setting.out)),
        "headline": f"{kernels[0]['name'][:60]} first; {waits / num_steps:.3g} waits a step",
    }


def _kernels(events: Any, setting: Setting, num_steps: int) -> list[dict[str, Any]]:
    """By the device's own time; on a CPU operations by theirs."""

    def microseconds(event: Any) -> float:
        found = event.self_device_time_total if setting.is_gpu else event.self_cpu_time_total
        return float(found)

    on_device = [
        event
        for event in events
        if microseconds(event) > 0 and (not setting.is_gpu or event.device_type.name == "CUDA")
    ]
    total = sum(map(microseconds, on_device))
    return [
        {
            "name": event.key[:160],
            "ms_per_step": digits(microseconds(event) / 1000 / num_steps),
            "share_ratio": digits(microseconds(event) / total),
            "calls_per_step": round(event.count / num_steps, 2),
        }
        for event in sorted(on_device, key=microseconds, reverse=True)[:NUM_KERNELS]
    ]


def variants(setting: Setting) -> dict[str, Variant]:
    def of(name: str, model: str, *settings: str) -> Variant:
        return Variant(lambda: measure(setting, name, model, *settings), 60.0)

    on, off = compiled(setting, True), compiled(setting, False)
    return {
        name: of(name, model, switch)
        for name, model, switch in (
            ("ViT-B/16, compiled", "ViT-B/16", on),
            ("ViT-S/16, compiled", "ViT-S/16", on),
            ("ViT-L/16, compiled", "ViT-L/16", on),
            ("ViT-B/16, eager", "ViT-B/16", off),
        )
    }


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    return {f"waits a step, {name}": found["waits_per_step"] for name, found in good.items()}


STEP_PROFILE = Slice("top kernels of a step, and calls that wait", variants, summary)
