"""Small choices inside a block: memory layout of the patch embedding, and the kernel of attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.clock import digits, timed
from gpu.setting import Measured, Setting, Slice, Variant

WIDTHS = {"ViT-S/16": (384, 6), "ViT-B/16": (768, 12), "ViT-L/16": (1024, 16)}  # width, heads
BATCH, TOKENS = 256, 198  # views; patches, class token and one register
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}


def embedding(setting: Setting, width: int, is_channels_last: bool) -> Measured:
    """Forward and backward of the convolution that makes patches, with autocast; images need no gradient."""
    side, patch, batch = (32, 4, 4) if setting.is_toy else (224, 16, BATCH)
    width = 24 if setting.is_toy else width
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    images = torch.randn(batch, 3, side, side, device=setting.device).to(memory_format=layout)
    convolution = nn.Conv2d(3, width, patch, patch).to(setting.device, memory_format=layout)
    gradient = None

    def run() -> None:
        nonlocal gradient
        with torch.autocast(setting.device.type, torch.bfloat16):
            tokens = convolution(images).flatten(2).transpose(1, 2)
        gradient = torch.ones_like(tokens) if gradient is None else gradient
        tokens.backward(gradient)
        convolution.zero_grad(set_to_none=True)

    timing = timed(run, setting.device, setting.quick)
    return {"seconds": timing.to_json(), "headline": f"{1000 * timing.median:.4g} ms"}


def attention(setting: Setting, width: int, num_heads: int, backend: SDPBackend) -> Measured:
    """Forward and backward in bf16. An error where the backend does not take these shapes on this device."""
    batch, tokens = (2, 18) if setting.is_toy else (BATCH, TOKENS)
    head_width = width // num_heads
    shape = (batch, num_heads, tokens, head_width)
    options = {"device": setting.device, "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(shape, **options) for _ in range(3))
    gradient = torch.randn(shape, device=setting.device, dtype=torch.bfloat16)

    def run() -> None:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(query, key, value).backward(gradient)
        query.grad = key.grad = value.grad = None

    timing = timed(run, setting.device, setting.quick)
    flops = 7 / 2 * 4 * batch * num_heads * tokens**2 * head_width  # backward 2.5 times forward
    rate = flops / timing.median
    return {
        "seconds": timing.to_json(),
        "flops_per_second": digits(rate),
        "headline": f"{1000 * timing.median:.4g} ms, {rate / 1e12:.4g} TFLOP/s",
    }


def variants(setting: Setting) -> dict[str, Variant]:
    found = {}
    models = dict(list(WIDTHS.items())[: 1 if setting.is_toy else None])
    for model, (width, num_heads) in models.items():
        for layout in ("contiguous", "channels last"):
            found[f"patch embedding of {model}, {layout}"] = Variant(
                lambda width=width, layout=layout: embedding(setting, width, layout == "channels last"), 10.0
            )
        for name, backend in BACKENDS.items():
            found[f"attention of {model}, {name}"] = Variant(
                lambda case=(width, num_heads, backend): attention(setting, *case), 10.0
            )
    return found


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    """The fastest of each model."""
    found: Measured = {}
    for subject in dict.fromkeys(name.rpartition(", ")[0] for name in good):
        seconds = {
            name: result["seconds"]["median"]
            for name, result in good.items()
            if name.rpartition(", ")[0] == subject
        }
        fastest = min(seconds, key=seconds.__getitem__)
        rest = {name: digits(value / seconds[fastest]) for name, value in seconds.items() if name != fastest}
        found[subject] = {"fastest": fastest.rpartition(", ")[2], "others": rest}
    return found


LAYOUTS = Slice("patch embedding in two layouts, attention by each kernel", variants, summary)
