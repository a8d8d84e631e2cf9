from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.backbone import BackboneConfig, create_backbone
from pretrain.optim import (
    AdamW,
    Knobs,
    OptimConfig,
    Optimizer,
    ParameterRule,
    build_optimizer,
    check_optimizer_stage,
    parameter_groups,
    set_knobs,
)

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


def knobs(lr: float = 0.1, weight_decay: float = 0.3, epoch: float = 0.0) -> Knobs:
    return Knobs(lr=lr, peak_lr=1.0, weight_decay=weight_decay, epoch=epoch)


def step(model: nn.Module, optimizer: Optimizer, seed: int, lr: float = 0.1) -> None:
    set_gradients(model, seed)
    set_knobs(optimizer, knobs(lr))
    optimizer.step()


def snapshot(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def vit_and_head() -> nn.Module:
    model = nn.Module()
    model.backbone = create_backbone(TINY, num_registers=1)
    model.mask_token = nn.Parameter(torch.zeros(1, 1, 24))
    model.head = nn.Linear(24, 2)
    model.balance = nn.Module()
    model.balance.log_variances = nn.ParameterDict({"rotation": nn.Parameter(torch.zeros(1))})
    return model


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [name_of[id(parameter)] for parameter in group["params"]] for group in groups}


TOKENS = {"backbone.cls_token", "backbone.reg_token", "backbone.pos_embed", "mask_token"}
LOG_VARIANCE = "balance.log_variances.rotation"


@pytest.mark.parametrize("decay", ["matrices", "no_tokens"])
def test_matrices_are_decayed_and_biases_and_norms_are_not(decay: Any) -> None:
    model = vit_and_head()
    members = names_of(model, parameter_groups(model, decay))
    decayed, exempt = set(members["decayed"]), set(members["exempt"])
    assert decayed.isdisjoint(exempt)
    assert decayed | exempt == {name for name, _ in model.named_parameters()}
    assert (decayed if decay == "matrices" else exempt) >= TOKENS
    assert {"head.weight", "backbone.patch_embed.proj.weight", "backbone.blocks.0.attn.qkv.weight"} <= decayed
    one_dimensional = ("bias", "norm.weight", "norm1.weight", "norm2.weight", LOG_VARIANCE)
    assert exempt - TOKENS == {name for name, _ in model.named_parameters() if name.endswith(one_dimensional)}


def test_all_are_decayed_but_never_the_log_variances() -> None:
    """MoCo v3 and RelViT decay biases too (METHODS A3)."""
    model = vit_and_head()
    members = names_of(model, parameter_groups(model, "all"))
    assert members["exempt"] == [LOG_VARIANCE]
    assert len(members["decayed"]) == len(list(model.parameters())) - 1


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    groups = parameter_groups(model)
    assert [len(group["params"]) for group in groups] == [1]
    assert groups[0]["params"][0] is model.weight


def test_the_layout_does_not_depend_on_the_order_of_the_modules() -> None:
    rules = [ParameterRule("b."), ParameterRule("a.9.")]

    def layout(order: tuple[str, ...], rules: list[ParameterRule]) -> dict[str, list[str]]:
        blocks = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
        parts = {"a": blocks, "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)}
        model = nn.ModuleDict({name: parts[name] for name in order})
        return names_of(model, parameter_groups(model, rules=rules))

    first, second = layout(("a", "b", "c"), rules), layout(("c", "b", "a"), rules[::-1])
    assert list(first.items()) == list(second.items())
    assert list(first) == ["decayed", "exempt", "a.9.:decayed", "a.9.:exempt", "b.:decayed", "b.:exempt"]
    assert first["decayed"] == [*(f"a.{block}.weight" for block in (*range(9), 10, 11)), "c.weight"]


def test_of_several_rules_the_longest_prefix_holds() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    groups = parameter_groups(
        model, rules=[ParameterRule("0.", constant_lr=True), ParameterRule("0.1.", frozen_epochs=2.0)]
    )
    assert [(group["name"], group["constant_lr"], group["frozen_epochs"]) for group in groups] == [
        ("0.:decayed", True, 0.0),
        ("0.:exempt", True, 0.0),
        ("0.1.:decayed", False, 2.0),
        ("0.1.:exempt", False, 2.0),
    ]


def test_a_rule_for_no_parameter_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="no parameter is below 'head'"):
        parameter_groups(nn.Linear(2, 2), rules=[ParameterRule("head")])
    with pytest.raises(AssertionError, match="two rules"):
        parameter_groups(nn.Linear(2, 2), rules=[ParameterRule("weight"), ParameterRule("weight")])


def test_the_knobs_reach_each_group_as_its_rule_says() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "steady": nn.Linear(2, 2), "last": nn.Linear(2, 2)})
    rules = (ParameterRule("steady.", constant_lr=True), ParameterRule("last.", frozen_epochs=1.0))
    optimizer = build_optimizer(model, OptimConfig(), rules)
    assert all(group["lr"] == 0.0 for group in optimizer.param_groups)

    def seen(epoch: float) -> dict[str, tuple[float, float]]:
        set_knobs(optimizer, knobs(0.1, 0.3, epoch))
        return {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}

    plain = {"decayed": (0.1, 0.3), "exempt": (0.1, 0.0)}
    steady = {"steady.:decayed": (1.0, 0.3), "steady.:exempt": (1.0, 0.0)}
    assert seen(0.99) == {**plain, **steady, "last.:decayed": (0.0, 0.0), "last.:exempt": (0.0, 0.0)}
    assert seen(1.0) == {**plain, **steady, "last.:decayed": (0.1, 0.3), "last.:exempt": (0.1, 0.0)}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_frozen_layer_keeps_its_weights_bit_for_bit_until_its_epoch(name: Any) -> None:
    """T-DI-6: the last layer is unchanged in epoch 0."""
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(name=name), (ParameterRule("2.", frozen_epochs=1.0),))
    before = copy.deepcopy(model.state_dict())
    for seed, epoch in enumerate((0.0, 0.5, 0.999)):
        set_gradients(model, seed)
        set_knobs(optimizer, knobs(epoch=epoch))
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model[2].state_dict(prefix="2.").items())
    assert not torch.equal(before["0.weight"], model[0].weight)
    set_gradients(model, 9)
    set_knobs(optimizer, knobs(epoch=1.0))
    optimizer.step()
    assert not torch.equal(before["2.weight"], model[2].weight)
    assert not torch.equal(before["2.bias"], model[2].bias)


def torch_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed, exempt = parameter_groups(model)
    return [
        {"params": decayed["params"], "weight_decay": weight_decay},
        {"params": exempt["params"], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"betas": (0.8, 0.95), "eps": 1e-6}, partial(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-6)),
        ({"name": "sgd", "momentum": 0.8}, partial(torch.optim.SGD, momentum=0.8)),
        ({"name": "sgd", "nesterov": True}, partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
        ({"name": "sgd", "momentum": 0.0}, torch.optim.SGD),
    ],
)
def test_it_is_torchs_optimizer_with_our_numbers(
    settings: dict[str, Any], reference: Callable[..., torch.optim.Optimizer]
) -> None:
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, OptimConfig(**settings))
    other = reference(torch_groups(theirs, 0.3), lr=0.1, fused=True)
    for seed in range(3):
        step(ours, optimizer, seed)
        set_gradients(theirs, seed)
        other.step()
    assert same(ours.state_dict(), theirs.state_dict())


def test_one_step_by_hand() -> None:
    """Step 1 of Adam moves by lr * sign(gradient) when eps is small, after decay by lr * weight_decay."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0]])
    optimizer = build_optimizer(model, OptimConfig())
    model.weight.grad = torch.tensor([[3.0, -0.1]])
    set_knobs(optimizer, knobs(lr=0.1, weight_decay=0.5))
    optimizer.step()
    assert torch.allclose(model.weight, torch.tensor([[0.95 - 0.1, -1.9 + 0.1]]), atol=1e-6)


def lars_model() -> nn.Linear:
    """|w| = 5 with |gradient| = 10; |bias| = 1 with |gradient| = 2."""
    model = nn.Linear(2, 1)
    model.weight.data, model.bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
    model.weight.grad, model.bias.grad = torch.tensor([[-6.0, 8.0]]), torch.tensor([2.0])
    return model


def test_two_steps_of_lars_by_hand() -> None:
    """trust = 0.02 * 5 / (10 + 0.4 * 5) = 1/120; the bias takes a plain step of SGD, without decay."""
    model = lars_model()
    optimizer = build_optimizer(model, OptimConfig(name="lars", trust_coefficient=0.02))
    set_knobs(optimizer, knobs(lr=0.6, weight_decay=0.4))
    optimizer.step()
    update = torch.tensor([[-6.0 + 1.2, 8.0 + 1.6]]) / 120
    weight = torch.tensor([[3.0, 4.0]]) - 0.6 * update
    torch.testing.assert_close(model.weight.data, weight)
    torch.testing.assert_close(model.bias.data, torch.tensor([1.0 - 0.6 * 2.0]))
    optimizer.step()  # the same gradients again; the momentum holds 0.9 of the first, already scaled, update
    trust = 0.02 * weight.norm() / (10 + 0.4 * weight.norm())
    second = 0.9 * update + trust * (torch.tensor([[-6.0, 8.0]]) + 0.4 * weight)
    torch.testing.assert_close(model.weight.data, weight - 0.6 * second)
    torch.testing.assert_close(model.bias.data, torch.tensor([-0.2 - 0.6 * 1.9 * 2.0]))


def test_lars_adapts_without_weight_decay_and_not_biases() -> None:
    """METHODS B3.2: biases and norms are excluded from adaptation and weight decay."""
    model = lars_model()
    optimizer = build_optimizer(model, OptimConfig(name="lars"))
    set_knobs(optimizer, knobs(lr=1.0, weight_decay=0.0))
    optimizer.step()
    torch.testing.assert_close(
        model.weight.data, torch.tensor([[3.0, 4.0]]) - 0.001 * 0.5 * torch.tensor([[-6.0, 8.0]])
    )
    torch.testing.assert_close(model.bias.data, torch.tensor([-1.0]))


def test_lars_does_not_see_the_size_of_a_gradient() -> None:
    moved = []
    for factor in (1.0, 1000.0):
        model = lars_model()
        model.weight.grad *= factor
        optimizer = build_optimizer(model, OptimConfig(name="lars"))
        set_knobs(optimizer, knobs(lr=1.0, weight_decay=0.0))
        optimizer.step()
        moved.append(model.weight.data)
    torch.testing.assert_close(*moved)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("num_steps_before", [0, 2])
def test_a_skipped_step_changes_nothing_and_the_next_is_as_if_it_had_not_been(
    name: Any, num_steps_before: int
) -> None:
    model, twin = small_model(), small_model()
    config = OptimConfig(name=name)
    optimizer, other = build_optimizer(model, config), build_optimizer(twin, config)
    for seed in range(num_steps_before):
        step(model, optimizer, seed)
        step(twin, other, seed)
    for parameter, twin_parameter in zip(model.parameters(), twin.parameters(), strict=True):
        optimizer.state_for(parameter)  # as the engines do
        other.state_for(twin_parameter)
    before = snapshot(model, optimizer)
    optimizer.found_inf = torch.ones(())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert same(snapshot(model, optimizer), before)
    optimizer.found_inf = None
    step(model, optimizer, 9)
    step(twin, other, 9)
    assert same(snapshot(model, optimizer), snapshot(twin, other))
    assert not same(model.state_dict(), before[0])


def test_the_switch_belongs_to_one_optimizer() -> None:
    first, second = (build_optimizer(small_model(), OptimConfig()) for _ in range(2))
    first.found_inf = torch.ones(())
    assert second.found_inf is None
    assert AdamW.found_inf is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"name": "sgd"},
        {"name": "sgd", "nesterov": True},
        {"name": "sgd", "momentum": 0.0},
        {"name": "lars"},
        {"name": "lars", "nesterov": True},
        {"name": "lars", "momentum": 0.0},
    ],
)
def test_state_made_ahead_of_the_first_step_changes_nothing(settings: dict[str, Any]) -> None:
    model, twin = small_model(), small_model()
    optimizer, other = (build_optimizer(each, OptimConfig(**settings)) for each in (model, twin))
    for parameter in model.parameters():
        state = optimizer.state_for(parameter)
        assert all(
            state[key].shape == parameter.shape and not state[key].any() for key in optimizer.state_keys
        )
    for seed in range(2):
        step(model, optimizer, seed)
        step(twin, other, seed)
    assert same(model.state_dict(), twin.state_dict())
    for parameter, twin_parameter in zip(model.parameters(), twin.parameters(), strict=True):
        state = other.state[twin_parameter]
        assert same(optimizer.state[parameter], state)
        assert state.keys() - {"step"} == set(other.state_keys)


def test_state_for_gives_the_state_of_a_stepped_parameter_itself() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig())
    step(model, optimizer, 0)
    parameter = next(model.parameters())
    state = optimizer.state_for(parameter)
    assert state is optimizer.state[parameter]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"] == 1.0
    torch.testing.assert_close(state["exp_avg"], 0.1 * parameter.grad)


def test_what_needs_whole_tensors_is_refused_where_they_are_divided() -> None:
    """F 41: at ZeRO stage 1 and above the optimizer sees one flat piece of all tensors."""
    lars, each = OptimConfig(name="lars"), OptimConfig(clip="tensor")
    for optim in (lars, each, OptimConfig(), OptimConfig(name="sgd")):
        check_optimizer_stage(optim, 0)
    for stage in (1, 2, 3):
        check_optimizer_stage(OptimConfig(name="sgd"), stage)
        check_optimizer_stage(OptimConfig(clip="tensor", clip_norm=0.0), stage)  # nothing is clipped
        with pytest.raises(ConfigError, match=rf"optim\.name: 'lars' .* stage {stage}.*stage=0$"):
            check_optimizer_stage(lars, stage)
        with pytest.raises(
            ConfigError, match=rf"optim\.clip: 'tensor' .* stage {stage}.*optim\.clip=global$"
        ):
            check_optimizer_stage(each, stage)


def test_nesterov_without_a_momentum_is_refused() -> None:
    with pytest.raises(ValidationError, match="nesterov needs a momentum above 0"):
        OptimConfig(name="sgd", nesterov=True, momentum=0.0)


def test_the_rate_scales_with_the_global_batch_unless_told_not_to() -> None:
    assert OptimConfig(base_lr=1e-3, lr_batch=256).scaled_lr(1024) == pytest.approx(4e-3)
    assert OptimConfig(base_lr=1e-3, lr_batch=256).scaled_lr(64) == pytest.approx(2.5e-4)
    assert OptimConfig(base_lr=1e-3, lr_batch=None).scaled_lr(64) == 1e-3
