"""The linear probe learns what is linear, and chooses without a look at the test set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.errors import DataError
from pretrain.evaluate.features import Features
from pretrain.evaluate.linear import (
    INPUTS,
    LinearConfig,
    accuracies,
    held_out_split,
    linear_probe,
    train_heads,
    wilson_interval,
)

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
    config = replace(QUICK, num_epochs=1, base_lr=1e-3)  # heads differ widely
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


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_batched_heads_equal_one_head_trained_by_autograd(inputs: str) -> None:
    data = random_features(200, seed=3)
    config = LinearConfig(base_lr=0.2, lr_factors=(0.5, 1.0), num_epochs=3, batch_size=64, seed=5)
    heads = train_heads(data.features, data.labels, 4, config)

    generator = torch.Generator().manual_seed(5)
    head = nn.Linear(16, 4)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(16, 4, generator=generator).T)
        head.bias.zero_()
    vectors = data.features
    if inputs == "standardised":
        vectors = (vectors - vectors.mean(dim=0)) / vectors.std(dim=0, correction=0)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.2 * 64 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for _ in range(3):
        order = torch.randperm(200, generator=generator)
        for batch in order[:192].split(64):
            optimizer.zero_grad()
            F.cross_entropy(head(vectors[batch]), data.labels[batch]).backward()
            optimizer.step()
            schedule.step()
    group = INPUTS.index(inputs)
    torch.testing.assert_close(heads.weight[group][:, 4:], head.weight.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads.bias[group][0, 4:], head.bias.detach(), rtol=1e-4, atol=1e-5)


def test_a_head_that_diverges_is_not_chosen() -> None:
    config = replace(QUICK, lr_factors=(1.0, 1e38))
    result = linear_probe(separable(500, seed=1), separable(200, seed=2), config)
    assert result["chosen"]["lr_factor"] == 1.0
    assert result["top1_ratio"] > 0.99


def test_standardising_rescues_features_of_very_unequal_scale() -> None:
    def stretch(data: Features) -> Features:
        return Features(data.features * torch.logspace(-4, 2, 16) + 50, data.labels)

    result = linear_probe(stretch(separable(1000, seed=1)), stretch(separable(300, seed=2)), QUICK)
    assert result["chosen"]["inputs"] == "standardised"
    assert result["top1_ratio"] > 0.99


def test_a_class_the_train_set_lacks_is_always_wrong() -> None:
    train, test = separable(500, seed=1), separable(100, seed=2)
    result = linear_probe(train, Features(test.features, torch.full_like(test.labels, 99)), QUICK)
    assert result["top1_ratio"] == 0.0


def test_the_interval_is_the_published_one() -> None:
    """Wilson's interval for 81 of 263, a worked example: 0.2553 to 0.3662 (Newcombe, 1998)."""
    low, high = wilson_interval(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(1.0, 100)[1] == 1.0
    assert wilson_interval(0.0, 100)[0] == 0.0


def test_accuracies_are_one_per_head() -> None:
    data = separable(300, seed=1)
    heads = train_heads(data.features, data.labels, 4, replace(QUICK, lr_factors=(0.0, 1.0)))
    untrained, trained, *_ = accuracies(heads, data.features, data.labels)
    assert untrained < 0.9 < trained


def test_a_train_set_of_single_samples_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match="no class has two samples") as caught:
        held_out_split(torch.arange(5), ratio=0.1, seed=0)
    assert "\n" not in str(caught.value)
