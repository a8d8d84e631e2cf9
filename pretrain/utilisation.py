"""What the devices of a run can do, and what its model asks of them: the model FLOP utilisation."""

from __future__ import annotations

import logging
import time

import torch

from pretrain import cluster
from pretrain.config import RunConfig
from pretrain.metrics.meter import Work
from pretrain.plan.flops import train_flops
from pretrain.plan.hardware import Peak, peak_flops

MEASURED_SIDE = 512  # of the matrices that are multiplied where no datasheet is known
MEASURED_TIMES = 5

logger = logging.getLogger("pretrain")


def model_work(config: RunConfig, place: cluster.Cluster, num_samples: int) -> Work | None:
    """On rank 0, what a step costs and what all devices can do; every rank calls this.

    None where the FLOPs of a model cannot be counted, which is told and stops nothing.
    """
    peaks = cluster.from_all(device_peak(place.device, config.engine.precision))
    if not place.is_first:
        return None
    try:
        flops = train_flops(config, place.world_size, num_samples).train
    except Exception as error:
        logger.warning("FLOPs of the model cannot be counted (%s: %s): no MFU", type(error).__name__, error)
        return None
    total = sum(peak.flops_per_second for peak in peaks)
    return Work(flops, total, " and ".join(sorted({peak.name for peak in peaks})))


def device_peak(device: torch.device, precision: str) -> Peak:
    """Of a datasheet for matrix products in bf16 on a GPU that is known; else as measured here and now."""
    if device.type == "cuda" and precision == "bf16":
        known = peak_flops(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    if device.type == "cpu":  # whose bf16 products are often emulated, and far slower
        return Peak("CPU fp32 measured", measured_flops(device, torch.float32))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    name = f"{torch.cuda.get_device_name(device)} {precision} measured"
    return Peak(name, measured_flops(device, dtype))


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the best of a few products of two matrices; all ranks of a node at a time."""
    side = MEASURED_SIDE if device.type == "cpu" else 8 * MEASURED_SIDE
    matrix = torch.full((side, side), 0.5, device=device, dtype=dtype)
    seconds = []
    for _ in range(MEASURED_TIMES):
        began = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)
