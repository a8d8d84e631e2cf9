"""What is kept under bf16 autocast on a GPU, by torch's own rules, without a GPU.

Fake tensors have a device, types and sizes, but no memory, so autocast's rules for CUDA run here as they are.
The fused attention kernels do not; a stand-in keeps what their interface says: queries, keys, values, output.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from method_configs import METHODS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.config import load_config
from pretrain.plan.backbone import encoder_of
from pretrain.plan.memory import BF16
from pretrain.plan.parameters import FP32

BATCH = 4
CUDA = torch.device("cuda")


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch, heads, tokens, dim = queries.shape
        attended = queries.new_empty(batch, tokens, heads, dim).transpose(1, 2)
        ctx.save_for_backward(queries, keys, values, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradient, gradient, gradient


def fused(queries: Tensor, keys: Tensor, values: Tensor, **_: object) -> Tensor:
    result: Tensor = FusedAttention.apply(queries, keys, values)
    return result


def on_fake_gpu(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, device=CUDA)))
    return module


def test_a_vit_under_autocast_keeps_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["views={one: {}}", "tasks={classification: {num_classes: 2}}"]
    settings = load_config(METHODS.parent / "imagenet_vitb16_multitask.yaml", overrides).model_dump(
        mode="json"
    )
    encoder = encoder_of(settings)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    kept: dict[int, Tensor] = {}
    torch.clear_autocast_cache()
    was_on, was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)  # `torch.autocast` would refuse without a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        with FakeTensorMode(allow_non_fake_inputs=True):
            on_fake_gpu(backbone)
            images = torch.empty(BATCH, 3, 224, 224, device=CUDA)
            given = {p.untyped_storage()._cdata for p in (*backbone.parameters(), images)}

            def pack(tensor: Tensor) -> Tensor:
                if tensor.untyped_storage()._cdata not in given:
                    kept.setdefault(tensor.untyped_storage()._cdata, tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                tokens = backbone.forward_features(images)
        by_type = {
            dtype: sum(t.untyped_storage().nbytes() for t in kept.values() if t.dtype == dtype)
            for dtype in (torch.bfloat16, torch.float32)
        }
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", was_on)
        torch.set_autocast_dtype("cuda", was)
        torch.clear_autocast_cache()
    assert tokens.dtype == torch.float32  # the residual stream is not rounded
    copies = BF16 * encoder.cost.matrices  # of the weights
    assert by_type[torch.bfloat16] == pytest.approx(BATCH * BF16 * encoder.cost.saved + copies, rel=0.02)
    assert by_type[torch.float32] == pytest.approx(BATCH * FP32 * encoder.cost.saved_fp32, rel=0.12)
    told = BATCH * (BF16 * encoder.cost.saved + FP32 * encoder.cost.saved_fp32) + copies
    assert sum(by_type.values()) == pytest.approx(told, rel=0.05)
