"""Initial weights. Xavier's bound is sqrt(6 / (fan in + fan out)), its standard deviation bound / sqrt(3)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.initial import fix_positions, initialize, trunc_normal_linears, xavier_linears
from pretrain.models.positions import sincos_positions


def build(**args: Any) -> VisionTransformer:
    torch.manual_seed(0)
    size = {"img_size": 24, "patch_size": 8, "depth": 2, "embed_dim": 96, "num_heads": 4, "reg_tokens": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **(size | args))


def is_uniform(weight: Tensor, bound: float) -> bool:
    """Within the bound, up to it, and spread like a uniform draw, with room for chance."""
    largest, std = weight.abs().max().item(), weight.std().item()
    return 0.99 * bound < largest <= bound and abs(std / (bound / math.sqrt(3)) - 1) < 0.05


def test_timms_own_weights_are_left_as_they_are() -> None:
    vit, same = build(), build()
    initialize(vit, "timm")
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in vit.state_dict().items())


@pytest.mark.parametrize(("kind", "token_std"), [("mae", 0.02), ("moco", 1e-6)])
def test_linear_layers_and_patches_are_xavier_uniform_and_biases_zero(kind: Any, token_std: float) -> None:
    vit = build(class_token=True)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.fill_(5.0)
    norm = vit.blocks[0].norm1.weight.clone()
    initialize(vit, kind)
    for block in vit.blocks:
        assert is_uniform(block.attn.proj.weight, math.sqrt(6 / (96 + 96)))
        assert is_uniform(block.mlp.fc1.weight, math.sqrt(6 / (96 + 384)))
        assert is_uniform(block.mlp.fc2.weight, math.sqrt(6 / (96 + 384)))
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert not layer.bias.any()
    # the patch embedding as the linear layer 3 * 8 * 8 -> 96 it is, not as the convolution torch would see
    assert is_uniform(vit.patch_embed.proj.weight, math.sqrt(6 / (192 + 96)))
    assert not vit.patch_embed.proj.bias.any()
    tokens = torch.cat([vit.cls_token, vit.reg_token], dim=1)
    assert abs(tokens.std().item() / token_std - 1) < 0.15
    assert abs(tokens.mean().item()) < token_std / 2
    assert torch.equal(vit.blocks[0].norm1.weight, norm)
    assert torch.equal(vit.pos_embed, torch.full_like(vit.pos_embed, 5.0))


def test_moco_draws_query_key_and_value_as_three_layers_and_mae_as_one() -> None:
    """96 -> 96 three times, or 96 -> 288 once: bounds sqrt(6 / 192) and sqrt(6 / 384)."""
    for kind, bound in (("moco", math.sqrt(6 / 192)), ("mae", math.sqrt(6 / 384))):
        vit = build()
        initialize(vit, kind)  # type: ignore[arg-type]
        parts = vit.blocks[1].attn.qkv.weight.chunk(3)
        assert all(is_uniform(part, bound) for part in parts), kind
        assert not torch.equal(parts[0], parts[1])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    drawn = []
    for seed in (1, 1, 2):
        vit = build()
        torch.manual_seed(seed)
        initialize(vit, "moco")
        drawn.append(vit.blocks[0].attn.qkv.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_model_without_class_token_registers_or_biases_is_initialized_too() -> None:
    vit = build(
        class_token=False, global_pool="avg", fc_norm=False, reg_tokens=0, qkv_bias=False, pre_norm=True
    )
    initialize(vit, "mae")
    assert vit.patch_embed.proj.bias is None
    assert is_uniform(vit.blocks[0].attn.qkv.weight, math.sqrt(6 / 384))


def test_only_linear_layers_are_drawn() -> None:
    module = nn.Sequential(nn.Linear(300, 100), nn.LayerNorm(100), nn.Conv2d(2, 2, 1))
    conv = module[2].weight.clone()
    xavier_linears(module)
    assert is_uniform(module[0].weight, math.sqrt(6 / 400))
    assert torch.equal(module[2].weight, conv)
    trunc_normal_linears(module)
    assert abs(module[0].weight.std().item() / 0.02 - 1) < 0.05
    assert module[0].weight.abs().max() > 0.06  # 0.035 would be the largest of a uniform draw
    assert not module[0].bias.any()
    assert torch.equal(module[2].weight, conv)


@pytest.mark.parametrize("order", ["mae", "moco"])
@pytest.mark.parametrize(
    ("args", "num_before"),
    [
        ({}, 3),  # class token and two registers have positions in timm
        ({"reg_tokens": 0}, 1),
        ({"no_embed_class": True}, 0),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, 2),
        ({"img_size": (16, 40)}, 3),
    ],
)
def test_fixed_positions_stand_at_the_patches_and_are_zero_before_them(
    args: dict[str, Any], num_before: int, order: Any
) -> None:
    vit = build(**args)
    before = vit.pos_embed
    fix_positions(vit, order)
    grid = tuple(side // 8 for side in vit.patch_embed.img_size)
    assert vit.pos_embed is before
    assert vit.pos_embed.shape == (1, num_before + grid[0] * grid[1], 96)
    assert torch.equal(vit.pos_embed[0, num_before:], sincos_positions(96, grid, order))  # type: ignore[arg-type]
    assert not vit.pos_embed[0, :num_before].any()


def test_fixed_positions_get_no_gradient_and_all_else_does() -> None:
    vit = build()
    fix_positions(vit, "mae")
    vit.forward_features(torch.randn(2, 3, 24, 24)).square().sum().backward()
    without = [name for name, parameter in vit.named_parameters() if parameter.grad is None]
    assert without == ["pos_embed"]


def test_a_model_without_positions_cannot_have_them_fixed() -> None:
    with pytest.raises(ConfigError, match=r"^model\.pos_embed: "):
        fix_positions(build(pos_embed="none"), "mae")
