"""What the chip reaches at most: products of matrices, copies, launches. The other slices divide by it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from gpu.clock import digits, timed
from gpu.setting import Measured, Pace, Setting, Slice, Variant
from pretrain.plan.hardware import peak_flops

SIDES, TOY_SIDES = (4096, 8192, 16384), (32, 64)
WIDTHS, TOY_WIDTHS = {"ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}, {"ViT-S": 24}
TOKENS = 2 * 128 * 198  # two views of 128 images
COPY_BYTES, TOY_BYTES = 2**30, 2**16
SUSTAINED = Pace(num_windows=5, window_seconds=2.0, num_warmup=5)


def product_rate(setting: Setting, rows: int, inner: int, columns: int, pace: Pace) -> Measured:
    """FLOP/s of (rows, inner) @ (inner, columns) in bf16, with random numbers: zeros take less power."""
    options = {"device": setting.device, "dtype": torch.bfloat16}
    left, right = torch.randn(rows, inner, **options), torch.randn(inner, columns, **options)
    out = torch.empty(rows, columns, **options)
    timing = timed(lambda: torch.mm(left, right, out=out), setting.device, pace)
    rate = 2 * rows * inner * columns / timing.median
    return {
        "shape": [rows, inner, columns],
        "seconds": timing.to_json(),
        "flops_per_second": digits(rate),
        "headline": f"{rate / 1e12:.4g} TFLOP/s",
    }


def _products_of_blocks(setting: Setting, width: int) -> Measured:
    """Forward products of one block, one after another."""
    tokens = 64 if setting.is_toy else TOKENS
    shapes = {
        "qkv": (width, 3 * width),
        "projection": (width, width),
        "mlp up": (width, 4 * width),
        "mlp down": (4 * width, width),
    }
    found = {name: product_rate(setting, tokens, *shape, setting.quick) for name, shape in shapes.items()}
    flops = sum(2 * tokens * inner * columns for inner, columns in shapes.values())
    rate = flops / sum(result["seconds"]["median"] for result in found.values())
    return {"products": found, "flops_per_second": digits(rate), "headline": f"{rate / 1e12:.4g} TFLOP/s"}


def _copy(setting: Setting, source: str, target: str) -> Measured:
    """Bytes of the tensor a second; a copy on the device reads and writes them."""
    num_bytes = TOY_BYTES if setting.is_toy else COPY_BYTES
    tensors = []
    for where in (source, target):
        is_host = where == "host"
        tensor = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu" if is_host else setting.device)
        tensors.append(tensor.pin_memory() if is_host and setting.is_gpu else tensor)
    timing = timed(lambda: tensors[1].copy_(tensors[0], non_blocking=True), setting.device, setting.quick)
    rate = num_bytes / timing.median
    return {
        "bytes": num_bytes,
        "seconds": timing.to_json(),
        "bytes_per_second": digits(rate),
        "headline": f"{rate / 1e9:.4g} GB/s",
    }


def _launch(setting: Setting) -> Measured:
    """What the host takes to ask for a kernel that does next to nothing."""
    tensor = torch.zeros(1, device=setting.device)
    num = 10 if setting.is_toy else 1000

    def run() -> None:
        for _ in range(num):
            tensor.add_(1.0)

    timing = timed(run, setting.device, setting.quick)
    seconds = timing.median / num
    return {"seconds_each": digits(seconds), "headline": f"{1e6 * seconds:.3g} µs a launch"}


def variants(setting: Setting) -> dict[str, Variant]:
    pace = setting.quick if setting.is_toy else SUSTAINED
    found = {
        f"product, {side} square": Variant(lambda side=side: product_rate(setting, side, side, side, pace))
        for side in (TOY_SIDES if setting.is_toy else SIDES)
    }
    for name, width in (TOY_WIDTHS if setting.is_toy else WIDTHS).items():
        found[f"products of a block of {name}"] = Variant(
            lambda width=width: _products_of_blocks(setting, width)
        )
    found["copy, device to device"] = Variant(lambda: _copy(setting, "device", "device"))
    found["copy, pinned host to device"] = Variant(lambda: _copy(setting, "host", "device"))
    found["copy, device to pinned host"] = Variant(lambda: _copy(setting, "device", "host"))
    found["launches"] = Variant(lambda: _launch(setting))
    return found


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    squares = {name: found["flops_per_second"] for name, found in good.items() if "square" in name}
    best = max(squares, key=squares.__getitem__, default=None)
    return {
        "flops_per_second": squares[best] if best else None,
        "of": best,
        "copy_bytes_per_second": good["copy, device to device"]["bytes_per_second"],
        "host_to_device_bytes_per_second": good["copy, pinned host to device"]["bytes_per_second"],
    }


CEILINGS = Slice("matrix products, copies and launches: the denominators of the rest", variants, summary)


def measured_rate(setting: Setting) -> tuple[float, str]:
    """FLOP/s that the utilisation is a share of, and where it is from."""
    try:
        found = json.loads((setting.out / "ceilings.json").read_text())["summary"]["flops_per_second"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found:
        return float(found), "ceilings.json"
    side = TOY_SIDES[-1] if setting.is_toy else 8192
    rate = product_rate(setting, side, side, side, setting.quick)["flops_per_second"]
    return float(rate), f"a product of {side} square, just now"


def utilisation(setting: Setting, flops: float, seconds: float) -> Measured:
    """Model FLOP/s as shares of what is measured and of what the datasheet says."""
    rate, source = measured_rate(setting)
    reached = flops / seconds
    found: Measured = {
        "flops_per_second": digits(reached),
        "mfu_of_measured_ratio": digits(reached / rate),
        "measured_flops_per_second": rate,
        "measured_by": source,
    }
    peak = peak_flops(torch.cuda.get_device_name(setting.device)) if setting.is_gpu else None
    if peak is not None:
        found |= {"mfu_of_datasheet_ratio": digits(reached / peak.flops_per_second), "datasheet": peak.name}
    return found
