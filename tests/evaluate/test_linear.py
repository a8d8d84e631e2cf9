"""The linear probe learns what is linear, and chooses without a look at the test set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import DataError
from pretrain.evaluate.features import Features
from pretrain.evaluate.linear import Reading, folds, held_out_split, linear_probe, train_head
from pretrain.evaluate.probe import INPUTS, LinearConfig, Probe, accuracies, moments, softmax, train_probe
from pretrain.optim import OptimConfig, build_optimizer

QUICK = LinearConfig(num_epochs=10, batch_size=128)


def random_features(count: int, classes: int = 4, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 16, generator=generator)
    return Features(vectors, torch.randint(classes, (count,), generator=generator))


def separable(count: int, seed: int) -> Features:
    """The class is the largest of the first four features, by a margin."""
    vectors = random_features(count, seed=seed)
    return Features(vectors.features + 6 * torch.eye(4, 16)[vectors.labels], vectors.labels)


def test_a_linearly_separable_problem_is_solved() -> None:
    result = linear_probe(separable(1000, seed=1), separable(500, seed=2), QUICK)
    assert result["top1_ratio"] > 0.99
    low, high = result["top1_ratio_95"]
    assert low <= result["top1_ratio"] <= high
    assert len(result["heads"]) == len(INPUTS) * len(QUICK.lr_factors)


def test_random_labels_give_chance() -> None:
    result = linear_probe(random_features(1000, seed=1), random_features(2000, seed=2), QUICK)
    assert abs(result["top1_ratio"] - 0.25) < 0.05


def test_the_choice_does_not_look_at_the_test_set() -> None:
    """Whatever labels the test set has, the same head is chosen; on these, another one is the best."""
    train, test = separable(1000, seed=1), separable(300, seed=2)
    config = replace(
        QUICK, num_epochs=1, base_lr=1e-3, lr_factors=(0.01, 0.1, 1.0, 3.0)
    )  # heads differ widely
    honest = linear_probe(train, test, config)
    wrong = Features(test.features, (test.labels + 1) % 4)
    dishonest = linear_probe(train, wrong, config)
    assert dishonest["chosen"] == honest["chosen"]
    assert dishonest["top1_ratio"] < max(head["test_top1_ratio"] for head in dishonest["heads"])


def test_the_held_out_part_is_a_tenth_of_every_class_and_its_rows_are_not_trained_on() -> None:
    targets = torch.tensor([0] * 100 + [1] * 50 + [2] * 3 + [3])
    kept, held_out = held_out_split(targets, 0.1, seed=0)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(len(targets)))
    assert targets[held_out].bincount(minlength=4).tolist() == [10, 5, 1, 0]
    assert torch.equal(held_out, held_out_split(targets, 0.1, seed=0)[1])
    assert not torch.equal(held_out, held_out_split(targets, 0.1, seed=1)[1])


def test_every_image_is_held_out_once_in_folds_unless_it_is_alone_in_its_class() -> None:
    targets = torch.tensor([0] * 25 + [1] * 3 + [2])
    found = folds(targets, 10, seed=0)
    assert len(found) == 10
    for kept, held_out in found:
        assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(len(targets)))
        assert targets[held_out].bincount(minlength=3)[0] in (2, 3)
        assert len(targets[kept].unique()) == 3
    assert sorted(row for _, held_out in found for row in held_out.tolist()) == list(range(28))
    assert len(folds(torch.tensor([0, 0, 1, 1, 1]), 10, seed=0)) == 3


def test_few_labels_choose_by_folds_and_many_as_ever() -> None:
    few, many = separable(40, seed=1), separable(1200, seed=1)
    test = separable(300, seed=2)
    assert train_head(many, test, QUICK, few_labels=True)[1] == linear_probe(many, test, QUICK)
    head, by_folds = train_head(few, test, QUICK, few_labels=True)
    assert (by_folds["num_folds"], by_folds["num_held_out"]) == (10, 40)
    assert linear_probe(few, test, QUICK)["num_held_out"] < 8
    # the accuracy that chose is that over all folds, counted by hand
    factor, inputs = by_folds["chosen"]["lr_factor"], by_folds["chosen"]["inputs"]
    config, num_correct = replace(QUICK, lr_factors=(factor,), inputs=(inputs,)), 0
    for kept, held_out in folds(few.labels, 10, QUICK.seed):
        probe = train_probe(config, few.features, few.labels, 4, rows=kept)
        logits = probe.logits(few.features[held_out])[:, 0]
        num_correct += int((logits.argmax(dim=1) == few.labels[held_out]).sum())
    assert by_folds["chosen"]["held_out_top1_ratio"] == num_correct / 40
    assert by_folds["top1_ratio"] == (head.predict(test.features) == test.labels).double().mean().item()


def test_a_head_names_labels_as_they_are_stored_and_a_diverged_one_names_none() -> None:
    train, test = separable(300, seed=1), separable(100, seed=2)
    sparse = Features(train.features, 1000 * train.labels + 7)
    head, _ = train_head(sparse, Features(test.features, 1000 * test.labels + 7), QUICK)
    assert (head.predict(test.features) == 1000 * test.labels + 7).double().mean() > 0.95
    head.probe.weight.fill_(float("nan"))
    assert (head.predict(test.features) == -1).all()


@pytest.mark.parametrize("num_classes", [2, 10, 15, 16, 200])
def test_the_softmax_of_few_classes_is_that_of_many(num_classes: int) -> None:
    logits = 30 * torch.randn(5, 7, num_classes, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(softmax(logits), logits.double().softmax(dim=-1).float())


def test_rows_left_out_do_not_move_the_heads() -> None:
    data, rows = random_features(200, seed=3), torch.arange(0, 200, 2)
    config = replace(QUICK, num_epochs=2)
    found = train_probe(config, data.features, data.labels, 4, rows=rows)
    spoiled = data.features.clone()
    spoiled[1::2] = 1e6
    other = train_probe(config, spoiled, data.labels.clone().index_fill(0, rows + 1, 0), 4, rows=rows)
    assert torch.equal(found.weight, other.weight)
    assert torch.equal(found.mean, data.features[rows].double().mean(dim=0).float())


def train_one_head(config: LinearConfig, lr_factor: float, vectors: Tensor, labels: Tensor) -> nn.Linear:
    """By autograd and the optimizers of the pretraining. labels: classes, or the share of each."""
    generator = torch.Generator().manual_seed(config.seed)
    head = nn.Linear(vectors.shape[1], 4)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(1, vectors.shape[1], 4, generator=generator)[0].T)
        head.bias.zero_()
    settings = OptimConfig(name=config.optimizer, momentum=config.momentum, eps=1e-8)
    optimizer: Any = build_optimizer(head, settings)
    num_epochs, order_generator = config.num_epochs, torch.Generator().manual_seed(config.seed + 1)
    num_steps, step = num_epochs * -(-len(labels) // config.batch_size), 0
    peak_lr = torch.tensor([config.base_lr * config.batch_size / 256 * lr_factor])
    for _ in range(num_epochs):
        for batch in torch.randperm(len(labels), generator=order_generator).split(config.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = float(config.lr_factor(step, num_steps, peak_lr))
                group["weight_decay"] = config.weight_decay if group["decayed"] else 0.0
            optimizer.zero_grad()
            F.cross_entropy(head(vectors[batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
    return head


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_the_batched_heads_equal_one_head_trained_by_autograd(inputs: str, optimizer: Any) -> None:
    """Also in the last batch of an epoch, which is smaller."""
    data = random_features(200, seed=3)
    config = LinearConfig(
        optimizer, 0.2, (0.5, 1.0), num_epochs=3, batch_size=64, warmup_epochs=1, weight_decay=0.0, seed=5
    )
    if optimizer == "adamw":
        config = replace(config, weight_decay=0.01, base_lr=0.01)
    probe = train_probe(config, data.features, data.labels, 4)
    vectors = data.features
    if inputs == "standardised":
        variance = vectors.var(dim=0, correction=0)
        vectors = (vectors - vectors.mean(dim=0)) / (variance + 1e-6).sqrt()
    head = train_one_head(config, 1.0, vectors, data.labels)
    group = INPUTS.index(inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(probe.weight[group][:, 4:], head.weight.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.bias[group][0, 4:], head.bias.detach(), rtol=1e-4, atol=1e-5)


def test_shares_of_classes_are_learned_as_autograd_learns_them() -> None:
    data = random_features(200, seed=3)
    shares = torch.rand(200, 4, generator=torch.Generator().manual_seed(1))
    shares /= shares.sum(dim=1, keepdim=True)
    config = replace(QUICK, lr_factors=(0.5, 1.0), inputs=("raw",), num_epochs=3, batch_size=64)
    probe = train_probe(config, data.features, shares, 4)
    head = train_one_head(config, 1.0, data.features, shares)
    torch.testing.assert_close(probe.weight[0][:, 4:], head.weight.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.bias[0][0, 4:], head.bias.detach(), rtol=1e-4, atol=1e-5)


def test_a_share_of_one_is_that_class() -> None:
    data = random_features(200, seed=3)
    config = replace(QUICK, num_epochs=2)
    of_shares = train_probe(config, data.features, F.one_hot(data.labels, 4).float(), 4)
    assert torch.equal(of_shares.weight, train_probe(config, data.features, data.labels, 4).weight)


def test_the_rate_warms_up_then_follows_a_cosine_to_its_end() -> None:
    config = LinearConfig(num_epochs=10, warmup_epochs=2, final_lr=0.1)
    rates = [float(config.lr_factor(step, 100, torch.tensor([1.1]))) for step in (0, 10, 20, 60, 100)]
    assert rates == pytest.approx([0.0, 0.55, 1.1, 0.6, 0.1])


def test_two_parts_have_heads_of_their_own_whose_logits_are_averaged() -> None:
    """Each head learns from its own part alone, as if the other were not there."""
    one, two = random_features(200, seed=3), random_features(200, seed=4)
    both = torch.cat([one.features, two.features], dim=1)
    config = replace(QUICK, num_epochs=2, lr_factors=(1.0, 3.0))
    probe = train_probe(config, both, one.labels, 4, num_parts=2)
    alone = train_probe(config, one.features, one.labels, 4)
    torch.testing.assert_close(probe.weight[0], alone.weight[0])  # raw inputs, the first part
    parts = probe.inputs(both)
    by_hand = (parts[0] @ probe.weight[0] + probe.bias[0] + parts[1] @ probe.weight[1] + probe.bias[1]) / 2
    torch.testing.assert_close(probe.logits(both)[:, :2].flatten(1), by_hand)


def test_of_several_readings_the_better_one_is_taken() -> None:
    """The first half of the features says nothing."""
    train, test = separable(1000, seed=1), separable(300, seed=2)
    noise = [
        torch.randn(len(one.labels), 16, generator=torch.Generator().manual_seed(9)) for one in (train, test)
    ]
    train, test = (
        Features(torch.cat([more, one.features], dim=1), one.labels)
        for more, one in zip(noise, (train, test), strict=True)
    )
    readings = [Reading("noise", slice(0, 16)), Reading("signal", slice(16, 32))]
    result = linear_probe(train, test, QUICK, readings=readings)
    assert result["chosen"]["feature"] == "signal"
    assert result["top1_ratio"] > 0.99
    assert len(result["heads"]) == 2 * len(INPUTS) * len(QUICK.lr_factors)


def test_features_of_16_bits_give_the_same_probe_but_for_their_rounding() -> None:
    train, test = separable(1000, seed=1), separable(300, seed=2)
    halves = [Features(one.features.half(), one.labels) for one in (train, test)]
    assert (
        abs(linear_probe(*halves, QUICK)["top1_ratio"] - linear_probe(train, test, QUICK)["top1_ratio"])
        < 0.01
    )


def test_a_head_that_diverges_is_not_chosen() -> None:
    config = replace(QUICK, lr_factors=(1.0, 1e38))
    result = linear_probe(separable(500, seed=1), separable(200, seed=2), config)
    assert result["chosen"]["lr_factor"] == 1.0
    assert result["top1_ratio"] > 0.99


def test_standardising_rescues_features_of_very_unequal_scale() -> None:
    def stretch(data: Features) -> Features:
        return Features(data.features * torch.logspace(-2, 2, 16) + 50, data.labels)

    result = linear_probe(stretch(separable(1000, seed=1)), stretch(separable(300, seed=2)), QUICK)
    assert result["chosen"]["inputs"] == "standardised"
    assert result["batch_norm"] is True
    assert result["top1_ratio"] > 0.99


def test_a_feature_that_never_changes_becomes_zero() -> None:
    features = torch.cat([torch.full((5, 1), 1e4), torch.arange(5.0)[:, None]], dim=1)
    probe = Probe(QUICK, 2, *moments(features, torch.arange(5)), batch_size=5)
    standardised = probe.inputs(features)[INPUTS.index("standardised")]
    assert torch.equal(standardised[:, 0], torch.zeros(5))
    assert standardised[:, 1].std(correction=0) == pytest.approx(1.0, abs=1e-5)


def test_a_class_the_train_set_lacks_is_always_wrong() -> None:
    train, test = separable(500, seed=1), separable(100, seed=2)
    result = linear_probe(train, Features(test.features, torch.full_like(test.labels, 99)), QUICK)
    assert result["top1_ratio"] == 0.0


def test_accuracies_are_one_per_head() -> None:
    data = separable(300, seed=1)
    probe = train_probe(replace(QUICK, lr_factors=(0.0, 1.0)), data.features, data.labels, 4)
    untrained, trained, *_ = accuracies(probe, data.features, data.labels)
    assert untrained < 0.9 < trained


def test_a_train_set_of_single_samples_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match="no class has two samples") as caught:
        held_out_split(torch.arange(5), ratio=0.1, seed=0)
    assert "\n" not in str(caught.value)
