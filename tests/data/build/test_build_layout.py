from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.build.layout import MIB, num_shards_for, plan_shards, shuffled_places


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_the_order_is_a_permutation_whatever_stretches_it_is_asked_for_in(
    num_samples: int, seed: int, split: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, num_samples))
    parts = [shuffled_places(seed, split, *part, num_samples) for part in ((0, cut), (cut, num_samples))]
    whole = shuffled_places(seed, split, 0, num_samples, num_samples)
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert sorted(whole.tolist()) == list(range(num_samples))


def test_each_shard_draws_evenly_from_the_whole_source() -> None:
    num_samples, num_shards = 20_000, 10
    tenths = np.zeros((num_shards, 10))
    for plan in plan_shards("train", 0, num_samples, num_shards):
        places = shuffled_places(5, 0, plan.first, plan.stop, num_samples)
        tenths[plan.number] = np.bincount(places * 10 // num_samples, minlength=10)
    assert abs(tenths - 200).max() < 6 * np.sqrt(200 * 0.9)


def test_seeds_and_splits_have_orders_of_their_own() -> None:
    orders = [shuffled_places(seed, split, 0, 500, 500).tolist() for seed in (0, 1) for split in (0, 1)]
    assert all(sum(a == b for a, b in zip(orders[0], other, strict=True)) < 20 for other in orders[1:])


@pytest.mark.parametrize(
    ("num_samples", "num_mib", "wanted", "num_shards"),
    [
        (1_281_167, 140_000, {}, 547),  # 256 MiB each
        (50_000, 100, {}, 16),  # small, so spread
        (1_000_000, 1000, {}, 100),  # 10,000 samples each
        (10, 1, {}, 1),  # 64 samples each
        (3, 10_000, {}, 3),  # never more shards than samples
        (1000, 100, {"samples_per_shard": 300}, 4),
        (1000, 100, {"shard_mib": 30}, 4),
    ],
)
def test_the_number_of_shards_follows_the_stated_rule(
    num_samples: int, num_mib: int, wanted: dict[str, int], num_shards: int
) -> None:
    sizes = {"samples_per_shard": None, "shard_mib": None, **wanted}
    assert num_shards_for(num_samples, num_mib * MIB, **sizes)[0] == num_shards


def test_shards_share_the_samples_evenly() -> None:
    plans = plan_shards("train", 0, 103, 10)
    assert [plan.first for plan in plans[1:]] == [plan.stop for plan in plans[:-1]]
    assert {plan.stop - plan.first for plan in plans} == {10, 11}
    assert plans[-1].stop == 103
