from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig, create_backbone
from pretrain.optim import STATE_KEYS, AdamW, OptimConfig, build_optimizer, parameter_groups

TINY = BackboneConfig(
    name="vit_tiny_patch16_224", img_px=16, patch_px=4, args={"depth": 1, "embed_dim": 24, "num_heads": 2}
)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def step(model: nn.Module, optimizer: AdamW, seed: int, lr: float = 0.1) -> None:
    set_gradients(model, seed)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def snapshot(model: nn.Module, optimizer: AdamW) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def test_matrices_and_tokens_are_decayed_and_biases_and_norms_are_not() -> None:
    vit = create_backbone(TINY, num_registers=1)
    model = nn.ModuleDict({"vit": vit, "head": nn.Linear(24, 2)})
    model.log_variance = nn.Parameter(torch.zeros(1))
    decayed, exempt = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [{name_of[id(parameter)] for parameter in group["params"]} for group in (decayed, exempt)]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == set(name_of.values())
    assert {"vit.cls_token", "vit.reg_token", "vit.pos_embed", "head.weight"} <= names[0]
    assert {"head.bias", "vit.norm.weight", "vit.norm.bias", "log_variance"} <= names[1]
    assert all(
        name.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight", "log_variance"))
        for name in names[1]
    )


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1]
    assert groups[0]["params"][0] is model.weight


def test_it_is_torchs_adamw_with_our_numbers() -> None:
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, OptimConfig(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3))
    assert all(group["lr"] == 0.0 for group in optimizer.param_groups)
    reference = torch.optim.AdamW(parameter_groups(theirs, 0.3), lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    for seed in range(3):
        step(ours, optimizer, seed)
        set_gradients(theirs, seed)
        reference.step()
    assert same(ours.state_dict(), theirs.state_dict())


def test_one_step_by_hand() -> None:
    """Step 1 of Adam moves by lr * sign(gradient) when eps is small, after decay by lr * weight_decay."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0]])
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5))
    model.weight.grad = torch.tensor([[3.0, -0.1]])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert torch.allclose(model.weight, torch.tensor([[0.95 - 0.1, -1.9 + 0.1]]), atol=1e-6)


@pytest.mark.parametrize("num_steps_before", [0, 2])
def test_a_skipped_step_changes_nothing_and_the_next_is_as_if_it_had_not_been(num_steps_before: int) -> None:
    model, twin = small_model(), small_model()
    config = OptimConfig()
    optimizer, other = build_optimizer(model, config), build_optimizer(twin, config)
    for seed in range(num_steps_before):
        step(model, optimizer, seed)
        step(twin, other, seed)
    before = snapshot(model, optimizer)
    optimizer.skipping = True
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert same(snapshot(model, optimizer), before)
    optimizer.skipping = False
    step(model, optimizer, 9)
    step(twin, other, 9)
    assert same(snapshot(model, optimizer), snapshot(twin, other))
    assert not same(model.state_dict(), before[0])


def test_the_switch_belongs_to_one_optimizer() -> None:
    first, second = (build_optimizer(small_model(), OptimConfig()) for _ in range(2))
    first.skipping = True
    assert not second.skipping
    assert not AdamW.skipping


def test_state_made_ahead_of_the_first_step_changes_nothing() -> None:
    model, twin = small_model(), small_model()
    optimizer, other = build_optimizer(model, OptimConfig()), build_optimizer(twin, OptimConfig())
    for parameter in model.parameters():
        state = optimizer.state_for(parameter)
        assert state["step"] == 0.0
        assert all(state[key].shape == parameter.shape and not state[key].any() for key in STATE_KEYS)
    for seed in range(2):
        step(model, optimizer, seed)
        step(twin, other, seed)
    assert same(snapshot(model, optimizer), snapshot(twin, other))


def test_state_for_gives_the_state_of_a_stepped_parameter_itself() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig())
    step(model, optimizer, 0)
    parameter = next(model.parameters())
    state = optimizer.state_for(parameter)
    assert state is optimizer.state[parameter]
    assert set(state) == {"step", *STATE_KEYS}
    assert state["step"] == 1.0
    torch.testing.assert_close(state["exp_avg"], 0.1 * parameter.grad)


def test_the_rate_scales_with_the_global_batch() -> None:
    assert OptimConfig(base_lr=1e-3, lr_batch=256).scaled_lr(1024) == pytest.approx(4e-3)
    assert OptimConfig(base_lr=1e-3, lr_batch=256).scaled_lr(64) == pytest.approx(2.5e-4)
