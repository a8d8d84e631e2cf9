from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Order
from pretrain.errors import ConfigError


def order_of(
    sizes: tuple[int, ...],
    lanes: int,
    shuffle_block: int,
    per_lane: int = 1,
    seed: int = 0,
    first_id: int = 0,
) -> Order:
    shard_sizes = torch.tensor(sizes)
    firsts = first_id + shard_sizes.cumsum(dim=0) - shard_sizes
    return Order(shard_sizes, firsts, seed, lanes, shuffle_block, batch_size=lanes * per_lane)


def read(order: Order, num_steps: int, world_size: int = 1, first: int = 0) -> list[tuple[int, int]]:
    """(epoch, sample id) of every sample, in the order read."""
    pairs = []
    for step in range(first, first + num_steps):
        for rank in range(world_size):
            sample_ids, epochs = order.batch(step, rank, world_size)
            pairs += list(zip(epochs.tolist(), sample_ids.tolist(), strict=True))
    return pairs


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=6)))
    if not sum(sizes):
        sizes = (*sizes, 1)
    lanes = draw(st.integers(1, sum(sizes)))
    shuffle_block, per_lane = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    return order_of(sizes, lanes, shuffle_block, per_lane, seed=draw(st.integers(0, 2**31)), first_id=100)


@settings(max_examples=60, deadline=None)
@given(orders())
def test_whole_rounds_hold_the_endless_sequence_without_loss_or_double(order: Order) -> None:
    per_lane = order.batch_size // order.lanes
    num_steps = order.samples_per_lane  # so many steps end exactly after `per_lane` rounds
    seen = read(order, num_steps)
    length = per_lane * order.lanes * order.samples_per_lane
    whole_epochs, rest = divmod(length, order.num_samples)
    assert len(seen) == length
    assert len(set(seen)) == length
    for epoch in range(whole_epochs):
        assert sorted(i for e, i in seen if e == epoch) == list(range(100, 100 + order.num_samples))
    assert sum(e == whole_epochs for e, _ in seen) == rest


@settings(max_examples=40, deadline=None)
@given(orders())
def test_blocks_name_the_samples_that_batches_hold(order: Order) -> None:
    for step in (0, 1, order.samples_per_lane, 3 * order.samples_per_lane + 1):
        expected = []
        for lane in range(order.lanes):
            for part in order.slices(step):
                runs, permutation = order.block(lane, part.round, part.block)
                held = [
                    (run.epoch, order.first_sample_ids[run.shard] + place)
                    for run in runs
                    for place in range(run.start, run.stop)
                ]
                assert sorted(permutation.tolist()) == list(range(len(held)))
                expected += [held[permutation[place]] for place in range(part.start, part.stop)]
        assert read(order, 1, first=step) == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_side_by_side_read_what_one_rank_reads(world_size: int) -> None:
    order = order_of((7, 5, 11, 2), lanes=8, shuffle_block=2, per_lane=3)
    assert read(order, 20, world_size) == read(order, 20)


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    order = order_of((7, 5, 11), lanes=4, shuffle_block=3, per_lane=2)
    forwards = [order.batch(step).sample_ids for step in range(30)]
    fresh = order_of((7, 5, 11), lanes=4, shuffle_block=3, per_lane=2)
    for step in reversed(range(30)):
        assert torch.equal(fresh.batch(step).sample_ids, forwards[step])


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = order_of((10, 10, 10, 10), lanes=4, shuffle_block=5, seed=seed)
        return [i for e, i in read(order, 30) if e == number]

    shuffles = [epoch(seed, number) for seed, number in itertools.product((0, 1), (0, 1))]
    assert all(left != right for left, right in itertools.combinations(shuffles, 2))
    assert all(sorted(shuffle) == list(range(40)) for shuffle in shuffles)


def test_a_batch_mixes_all_lanes_in_equal_parts() -> None:
    order = order_of((64,), lanes=8, shuffle_block=4, per_lane=2)
    lanes = order.batch(0).sample_ids // 8  # one shard, so lane l owns ids 8 l to 8 l + 7
    assert lanes.tolist() == [lane for lane in range(8) for _ in range(2)]


def test_the_order_of_today_is_the_order_of_tomorrow() -> None:
    order = order_of((5, 4, 7), lanes=4, shuffle_block=3, per_lane=2, seed=7)
    assert [order.batch(step).sample_ids.tolist() for step in (0, 1, 9)] == [
        [10, 9, 13, 14, 7, 6, 1, 2],
        [12, 11, 15, 5, 0, 8, 4, 3],
        [12, 11, 5, 15, 0, 8, 4, 3],
    ]


def test_impossible_settings_are_refused_with_the_nearest_possible_ones() -> None:
    with pytest.raises(ConfigError, match=r"10 samples in a micro step .* use 8 or 12"):
        Order(torch.tensor([20]), torch.tensor([0]), 0, lanes=4, shuffle_block=2, batch_size=10)
    with pytest.raises(ConfigError, match=r"64 lanes cannot share 20 samples; use 20 or fewer"):
        Order(torch.tensor([20]), torch.tensor([0]), 0, lanes=64, shuffle_block=2, batch_size=64)
    with pytest.raises(ConfigError, match=r"4 lanes cannot be shared equally by 3 ranks; use 3 or 6"):
        order_of((20,), lanes=4, shuffle_block=2).batch(0, rank=0, world_size=3)


def test_a_batch_of_thousands_takes_milliseconds() -> None:
    order = order_of((1000,) * 1281, lanes=64, shuffle_block=128, per_lane=64)
    order.batch(0)
    begin = time.process_time()
    for step in range(1, 21):
        order.batch(step)
    assert (time.process_time() - begin) / 20 < 0.02
