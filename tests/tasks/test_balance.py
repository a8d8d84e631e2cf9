"""Balance of losses: METHODS B0."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.tasks.balance import Balance, BalanceConfig, Likelihood, settled_product

KINDS: tuple[Likelihood, ...] = ("ce", "l1", "l2")


def balance_at(kind: Likelihood, log_variance: float, weight: float = 1.0) -> Balance:
    return Balance({"task": kind}, {"task": weight}, BalanceConfig(initial_log_variance=log_variance))


def gradient(kind: Likelihood, log_variance: float, loss: float, weight: float = 1.0) -> float:
    """dTotal / ds"""
    balance = balance_at(kind, log_variance, weight)
    balance({"task": torch.tensor(loss)})[0].backward()
    grad = balance.log_variances["task"].grad
    assert grad is not None
    return float(grad)


@pytest.mark.parametrize("loss", [0.01, 3.0])
@pytest.mark.parametrize(("kind", "slope", "factor"), [("ce", 1.0, 1.0), ("l1", 0.5, 1.0), ("l2", 1.0, 0.5)])
def test_gradient_of_the_log_variance_follows_the_formula(
    kind: Likelihood, slope: float, factor: float, loss: float
) -> None:
    """T-B0-1: 1/2 - a e^(-a s) L, with L halved for `l2`; negative for a large loss, else positive."""
    value = gradient(kind, 0.4, loss)
    assert value == pytest.approx(0.5 - slope * math.exp(-slope * 0.4) * factor * loss, rel=1e-5)
    assert (value < 0) == (loss == 3.0)


@pytest.mark.parametrize(
    ("kind", "best"), [("ce", math.log(2 * 0.7)), ("l2", math.log(0.7)), ("l1", 2 * math.log(0.7))]
)
def test_gradient_vanishes_where_the_likelihood_is_largest(kind: Likelihood, best: float) -> None:
    """T-B0-2: `ce` e^s = 2 L, `l2` e^s = L, `l1` e^(s/2) = L, here at L = 0.7."""
    assert gradient(kind, best, 0.7) == pytest.approx(0.0, abs=1e-6)
    _, weights = balance_at(kind, best)({"task": torch.tensor(0.7)})
    assert float(weights["task"]) * 0.7 == pytest.approx(settled_product(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_variance", [-50.0, -6.0, 0.0, 6.0, 50.0])
def test_weights_stay_positive_and_finite_at_any_log_variance(kind: Likelihood, log_variance: float) -> None:
    """T-B0-3: never beyond their values at -6 and 6; the largest is e^6 = 403.43."""
    total, weights = balance_at(kind, log_variance)({"task": torch.tensor(1.0)})
    assert total.isfinite()
    low, high = (float(balance_at(kind, end)({"task": torch.tensor(1.0)})[1]["task"]) for end in (6.0, -6.0))
    assert 0 < low <= float(weights["task"]) <= high <= 403.43


def test_a_log_variance_below_the_clamp_comes_back_when_the_loss_grows() -> None:
    """At s = -8 the weight is e^6, so a loss of 1 pulls with 1/2 - e^6 and one of 0 pushes with 1/2."""
    assert gradient("ce", -8.0, 1.0) == pytest.approx(0.5 - math.exp(6), rel=1e-5)
    assert gradient("ce", -8.0, 0.0) == 0.5


def test_a_log_variance_of_zero_gives_the_plain_sum_with_half_the_squared_errors() -> None:
    """T-B0-4: 2 + 3 + 5 / 2 = 7.5."""
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0), "c": torch.tensor(5.0)}
    balance = Balance({"a": "ce", "b": "l1", "c": "l2"}, dict.fromkeys("abc", 1.0), BalanceConfig())
    total, weights = balance(losses)
    assert total.item() == 7.5
    assert {name: weight.item() for name, weight in weights.items()} == {"a": 1.0, "b": 1.0, "c": 0.5}


def test_initial_weights_of_the_sit_preset() -> None:
    """B0: s = 1 gives 0.368 for cross-entropy and 0.607 for L1."""
    balance = Balance({"a": "ce", "b": "l1"}, {"a": 1.0, "b": 1.0}, BalanceConfig(initial_log_variance=1.0))
    _, weights = balance({"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
    assert weights["a"].item() == pytest.approx(0.368, abs=5e-4)
    assert weights["b"].item() == pytest.approx(0.607, abs=5e-4)


def test_every_log_variance_is_a_float32_number_that_the_optimizer_sees_and_does_not_decay() -> None:
    """T-B0-5: of shape (1,), so the rule that spares 1-D tensors from decay spares them."""
    balance = Balance({"a": "ce", "b": "l1"}, {"a": 1.0, "b": 1.0}, BalanceConfig())
    parameters = dict(balance.named_parameters())
    assert parameters.keys() == {"log_variances.a", "log_variances.b"}
    assert all(value.dtype == torch.float32 and value.shape == (1,) for value in parameters.values())


def test_terms_are_float32_under_autocast_and_for_half_precision_losses() -> None:
    balance = balance_at("l1", 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        total, weights = balance({"task": torch.tensor(1.5, dtype=torch.bfloat16)})
    assert (total.dtype, weights["task"].dtype) == (torch.float32, torch.float32)
    assert total.item() == pytest.approx(1.5 * math.exp(-0.15) + 0.15, rel=1e-6)


def test_the_task_weight_multiplies_the_whole_term() -> None:
    """2 (e^-1 * 3 + 1 / 2) = 3.20728; the loss itself is multiplied by 2 e^-1."""
    total, weights = balance_at("ce", 1.0, weight=2.0)({"task": torch.tensor(3.0)})
    assert total.item() == pytest.approx(3.20728, abs=1e-5)
    assert weights["task"].item() == pytest.approx(2 * math.exp(-1), rel=1e-6)


def test_fixed_weights_give_a_weighted_sum_and_no_parameters() -> None:
    """0.5 * 4 + 3 * 2 = 8; no halving of squared errors."""
    balance = Balance({"a": "ce", "b": "l2"}, {"a": 0.5, "b": 3.0}, BalanceConfig(kind="fixed"))
    total, weights = balance({"a": torch.tensor(4.0), "b": torch.tensor(2.0)})
    assert total.item() == 8.0
    assert weights["b"].item() == 3.0
    assert not list(balance.parameters())
