"""Memory of a GPU at each ZeRO stage, with and without recomputing, beside what `pretrain plan` predicts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gpu.clock import digits, synchronize
from gpu.setting import Measured, Setting, Slice, Variant
from gpu.training import NUM_SAMPLES, TOY_BATCH, Training, compiled, configuration, peak_bytes
from pretrain.config import RunConfig
from pretrain.plan.backbone import encoder_of
from pretrain.plan.flops import site_of
from pretrain.plan.memory import activity_of, memory_of
from pretrain.plan.parameters import parameters_of

NUM_STEPS = 3
CASES = (  # model, batch, stage, recompute, compiled
    *(("ViT-B/16", 128, stage, recompute, False) for recompute in (False, True) for stage in range(4)),
    ("ViT-B/16", 128, 1, False, True),
    ("ViT-B/16", 128, 1, True, True),
    ("ViT-L/16", 64, 1, False, False),
    ("ViT-L/16", 64, 1, True, False),
)


def predicted(config: RunConfig, stage: int) -> tuple[float, float]:
    """Bytes at rest and at the peak of one rank, alone."""
    settings = config.model_dump(mode="json")
    encoder = encoder_of(settings)
    site = site_of(settings, encoder, 1, NUM_SAMPLES)
    found = memory_of(
        settings,
        encoder,
        parameters_of(settings, encoder, site),
        activity_of(settings, encoder, site),
        stage=stage,
        world_size=1,
        micro_batch=config.batch.global_size,
        recompute=config.engine.recompute,
    )
    return found.at_rest, found.peak


def measure(
    setting: Setting, model: str, batch: int, stage: int, recompute: bool, is_compiled: bool
) -> Measured:
    config = configuration(
        setting,
        model,
        batch,
        compiled(setting, is_compiled),
        f"engine.recompute={str(recompute).lower()}",
        f"engine.deepspeed={{zero_optimization: {{stage: {stage}}}}}",
    )
    device = setting.device
    before = torch.cuda.memory_allocated(device) if setting.is_gpu else 0
    training = Training(config, device)
    for _ in range(NUM_STEPS - 1):
        training.prepared_step()
    synchronize(device)
    rest = torch.cuda.memory_allocated(device) if setting.is_gpu else None
    if setting.is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    training.prepared_step()
    synchronize(device)
    peak = peak_bytes(device)
    reserved = torch.cuda.max_memory_reserved(device) if setting.is_gpu else None
    training.close()
    told_rest, told_peak = predicted(config, stage)
    found: Measured = {
        "batch": TOY_BATCH if setting.is_toy else batch,
        "predicted_rest_bytes": round(told_rest),
        "predicted_peak_bytes": round(told_peak),
    }
    if rest is None or peak is None:
        return {**found, "headline": f"{told_peak / 2**30:.3g} GiB predicted; nothing measured on a CPU"}
    return {
        **found,
        "rest_bytes": rest - before,
        "peak_bytes": peak - before,
        "reserved_peak_bytes": reserved,  # of the process, with the gaps between tensors
        "rest_ratio": digits(told_rest / max(rest - before, 1)),
        "peak_ratio": digits(told_peak / max(peak - before, 1)),
        "headline": f"peak {(peak - before) / 2**30:.2f} GiB, {told_peak / 2**30:.2f} predicted",
    }  # fmt: skip


def variants(setting: Setting) -> dict[str, Variant]:
    found = {}
    for model, batch, stage, recompute, is_compiled in CASES:
        name = f"{model}, ZeRO-{stage}{', recomputing' * recompute}{', compiled' * is_compiled}"
        case = (model, batch, stage, recompute, is_compiled)
        found[name] = Variant(lambda case=case: measure(setting, *case), 30.0)
    return found


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    errors = {name: abs(found["peak_ratio"] - 1) for name, found in good.items() if "peak_ratio" in found}
    if not errors:
        return {"problem": "memory is measured on a GPU only"}
    worst = max(errors, key=errors.__getitem__)
    return {"worst": worst, "peak_error_ratio": digits(errors[worst])}


STAGE_MEMORY = Slice("memory of each ZeRO stage beside the prediction", variants, summary)
