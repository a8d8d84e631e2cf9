from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import make_shards

from pretrain.data.manifest import Split
from pretrain.data.mixture import Mixture, mix
from pretrain.errors import ConfigError

SIZES = ([9, 7], [5, 8, 12], [30])


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> list[Split]:
    folder = tmp_path_factory.mktemp("sources")
    return [
        make_shards(folder / str(place), sizes, height=8, width=8).split("train")
        for place, sizes in enumerate(SIZES)
    ]


def mixed(
    splits: list[Split], weights: list[float | None], lanes: int = 8, per_lane: int = 1, block: int = 3
) -> Mixture:
    return mix(splits, weights, seed=1, lanes=lanes, shuffle_block=block, batch_size=lanes * per_lane)


def source_of(sample_ids: torch.Tensor) -> torch.Tensor:
    """By the numbers of samples 16, 25 and 30."""
    return torch.bucketize(sample_ids, torch.tensor([16, 41]), right=True)


def test_every_batch_has_the_share_of_each_source(splits: list[Split]) -> None:
    mixture = mixed(splits, [1.0, 2.0, 5.0])
    assert mixture.shares == (0.125, 0.25, 0.625)
    for step in range(40):
        sources = source_of(mixture.batch(step).sample_ids)
        assert sources.bincount(minlength=3).tolist() == [1, 2, 5]


def test_a_source_is_read_in_a_mixture_as_it_is_read_alone(splits: list[Split]) -> None:
    mixture = mixed(splits[:2], [1.0, 3.0], per_lane=2)
    alone = [mix([split], [None], seed=1, lanes=lanes, shuffle_block=3, batch_size=2 * lanes)
             for split, lanes in zip(splits, (2, 6), strict=False)]  # fmt: skip
    for step in range(30):
        sample_ids = mixture.batch(step).sample_ids
        first = sample_ids < 16
        assert torch.equal(sample_ids[first], alone[0].batch(step).sample_ids)
        assert torch.equal(sample_ids[~first] - 16, alone[1].batch(step).sample_ids)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_is_lost_or_doubled_in_any_source(splits: list[Split], data: st.DataObject) -> None:
    chosen = splits[: data.draw(st.integers(1, 3))]
    lanes, per_lane = data.draw(st.sampled_from([4, 6, 8])), data.draw(st.integers(1, 3))
    weights: list[float | None] = [float(data.draw(st.integers(1, 2))) for _ in chosen]
    world_size = data.draw(st.sampled_from([1, 2]))
    try:
        mixture = mixed(chosen, weights, lanes, per_lane, data.draw(st.integers(1, 7)))
    except ConfigError:
        return  # weights that the lanes cannot share
    num_steps = 80
    refs = [
        [mixture.batch(step, rank, world_size) for rank in range(world_size)] for step in range(num_steps)
    ]
    read = [
        (int(epoch), int(sample_id))
        for ranks in refs
        for part in ranks
        for sample_id, epoch in zip(part.sample_ids, part.epochs, strict=True)
    ]
    assert len(set(read)) == len(read) == num_steps * lanes * per_lane
    for source, split in zip(mixture.sources, chosen, strict=True):
        own = range(source.first_sample_id, source.first_sample_id + split.num_samples)
        num_read = num_steps * source.order.batch_size
        per_round = source.order.lanes * source.order.samples_per_lane
        rounds = num_read // per_round
        for epoch in range(rounds * per_round // split.num_samples):
            assert sorted(i for e, i in read if e == epoch and i in own) == list(own)
    start = data.draw(st.integers(0, num_steps - 1))  # what is read next is a function of the step alone
    again = mixed(chosen, weights, lanes, per_lane, mixture.sources[0].order.shuffle_block)
    for rank in range(world_size):
        assert torch.equal(again.batch(start, rank, world_size).sample_ids, refs[start][rank].sample_ids)


def test_every_rank_reads_a_like_share_of_each_source(splits: list[Split]) -> None:
    mixture = mixed(splits[1:], [1.0, 3.0], lanes=16)
    for rank in range(4):
        is_second = mixture.batch(0, rank, 4).sample_ids >= 25  # of 25 and 30 samples
        assert is_second.tolist().count(True) == 3


def test_without_weights_sources_count_by_their_samples(splits: list[Split]) -> None:
    assert mixed(splits[:2], [None, None], lanes=10).shares == (0.4, 0.6)  # of 16 and 25 samples


def test_impossible_weights_are_refused_with_what_to_change(splits: list[Split]) -> None:
    with pytest.raises(
        ConfigError, match=r"sources\[0\]\.weight: a share of 0\.0099 .* use more data\.lanes"
    ):
        mixed(splits[:2], [1.0, 100.0])
    with pytest.raises(ConfigError, match="some have a weight and some have none"):
        mixed(splits[:2], [1.0, None])
    with pytest.raises(ConfigError, match="use 8 or 16"):
        mix(splits, [None] * 3, seed=0, lanes=8, shuffle_block=2, batch_size=12)


def test_two_sources_stream_as_one(splits: list[Split], tmp_path: Path) -> None:
    from pretrain.data.loader import DataConfig, mixture_of, open_batches
    from pretrain.views.plan import ViewConfig

    sources = [
        {"shards": str(split.manifest.folder), "weight": weight}
        for split, weight in zip(splits, (1, 3), strict=False)
    ]
    config = DataConfig.model_validate({"sources": sources, "lanes": 4, "shuffle_block": 3})
    mixture = mixture_of(config, splits[:2], seed=5, batch_size=8)
    for resident in (False, True):
        settled = config.model_copy(update={"resident": resident})
        batches = open_batches(settled, splits[:2], [ViewConfig(size_px=8)], seed=5, batch_size=8)
        try:
            for step in range(6):
                batch, wanted = next(batches), mixture.batch(step)
                assert torch.equal(batch.sample_ids, wanted.sample_ids)
                assert torch.equal(batch.epochs, wanted.epochs)
                own = torch.where(batch.sample_ids < 16, batch.sample_ids, batch.sample_ids - 16)
                assert torch.equal(batch.labels, own % 10)
        finally:
            batches.close()
