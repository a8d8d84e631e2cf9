"""What a run reads depends on the step alone: not on ranks, threads, prefetching, cache or breaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from range_server import RangeServer
from small_shards import make_shards, samples, write_shard

from pretrain.data import streaming
from pretrain.data.indexing import index_folder
from pretrain.data.loader import Batch, Batches, DataConfig, mixture_of, open_batches, open_splits
from pretrain.views.plan import ViewConfig

VIEWS = [ViewConfig(size_px=8)]
NUM_STEPS = 10
BATCH_SIZE = 8


@pytest.fixture(autouse=True)
def many_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_server.context()
    monkeypatch.setattr(streaming, "START_METHOD", "forkserver")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 samples in three shards; one image is bad."""
    folder = tmp_path_factory.mktemp("shards")
    members = samples(0, 26, height=12, width=10)
    members[2 * 17] = (members[2 * 17][0], b"not an image")
    for name, part in (("a.tar", members[:18]), ("b.tar", members[18:32]), ("c.tar.gz", members[32:])):
        write_shard(folder / name, part)
    index_folder(folder)
    return folder


@contextmanager
def opened(shards: str | Path, start: int = 0, **settings: Any) -> Iterator[Batches]:
    call = {key: settings.pop(key) for key in ("rank", "world_size") if key in settings}
    config = DataConfig(
        **{"shards": str(shards), "lanes": 4, "shuffle_block": 3, "max_bad_ratio": 0.1} | settings
    )
    splits = open_splits(config)
    batches = open_batches(
        config, splits, VIEWS, seed=3, batch_size=BATCH_SIZE, start_micro_step=start, **call
    )
    try:
        yield batches
    finally:
        batches.close()


def row_of(batch: Batch) -> list[tuple[int, int, int]]:
    """(sample id, epoch, sum of the pixels) of every image."""
    pixels = batch.crops[0][0].flatten(1).long().sum(dim=1)
    return list(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), pixels.tolist(), strict=True))


Log = list[list[tuple[int, int, int]]]


def log_of(shards: str | Path, breaks: tuple[int, ...] = (), world_size: int = 1, **settings: Any) -> Log:
    """What is read in each step by all ranks, started anew after each break."""
    log: Log = [[] for _ in range(NUM_STEPS)]
    for rank in range(world_size):
        for start, stop in zip((0, *breaks), (*breaks, NUM_STEPS), strict=True):
            with opened(shards, start, rank=rank, world_size=world_size, **settings) as batches:
                for step in range(start, stop):
                    log[step] += row_of(next(batches))
    return log


@pytest.fixture(scope="module")
def whole(shards: Path) -> Log:
    return log_of(shards, decode_threads=0)


def cases() -> list[Any]:
    """Ranks, threads and breaks; the usual test run leaves out what starts many processes."""
    quick = [(1, 1, ()), (2, 1, (4,)), (4, 4, ()), (1, 4, (3, 7))]
    every = [(r, t, b) for r in (1, 2, 4) for t in (0, 1, 4) for b in ((), (3, 7))]
    return [
        pytest.param(*case, marks=() if case in quick or case[1] == 0 else pytest.mark.slow)
        for case in dict.fromkeys([*quick, *every])
    ]


@pytest.mark.parametrize(("world_size", "threads", "breaks"), cases())
def test_ranks_threads_prefetching_and_breaks_change_no_sample(
    shards: Path, whole: Log, world_size: int, threads: int, breaks: tuple[int, ...]
) -> None:
    settings = {"decode_threads": threads, "prefetch_batches": 1 + threads}
    assert log_of(shards, breaks, world_size, **settings) == whole


@pytest.mark.parametrize("threads", [0, 1])
def test_a_cache_cold_warm_or_too_small_changes_no_sample(
    shards: Path, whole: Log, tmp_path: Path, threads: int
) -> None:
    with RangeServer(shards) as server:
        assert log_of(server.url, decode_threads=threads) == whole
        for max_bytes in (2**30, 2**30, 40_000):  # cold, warm, room for one shard
            cache = {"folder": tmp_path / "cache", "max_gib": max_bytes / 2**30}
            assert log_of(server.url, (4,), 2, decode_threads=threads, cache=cache) == whole


def test_a_bad_sample_changes_only_its_own_place(shards: Path, whole: Log, tmp_path: Path) -> None:
    sound = make_shards(tmp_path, [9, 7, 10], height=12, width=10)
    for name, path in zip(
        ("a.tar", "b.tar", "c.tar.gz"), ("train-0.tar", "train-1.tar", "train-2.tar"), strict=True
    ):
        assert (shards / name).is_file()
        assert (tmp_path / path).is_file()
    log = log_of(sound.folder.url, decode_threads=0)
    for wanted, found in zip(log, whole, strict=True):
        for one, other in zip(wanted, found, strict=True):
            assert one == other or (one[0] == 17 and other[0] != 17)


def test_the_end_of_an_epoch_and_the_very_start_are_places_to_continue_from(shards: Path, whole: Log) -> None:
    epoch_ends_in = 26 // BATCH_SIZE
    for start in (0, epoch_ends_in, epoch_ends_in + 1):
        with opened(shards, start, decode_threads=1) as batches:
            assert [row_of(next(batches)) for _ in range(2)] == whole[start : start + 2]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_or_doubled_whatever_the_shards_and_breaks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    suffix = data.draw(st.sampled_from([".tar", ".tar.gz"]))
    manifest = make_shards(tmp_path_factory.mktemp("random"), sizes, suffix, height=2, width=3)
    lanes = data.draw(st.sampled_from([lanes for lanes in (1, 2, 4) if lanes <= sum(sizes)]))
    per_lane, world_size = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, lanes]))
    config = DataConfig(
        shards=manifest.folder.url, lanes=lanes, shuffle_block=data.draw(st.integers(1, 5)), decode_threads=0
    )
    splits = open_splits(config)
    batch_size = lanes * per_lane
    per_round = sum(sizes) // lanes * lanes
    num_steps = -(-2 * per_round // batch_size)
    breaks = sorted(data.draw(st.sets(st.integers(1, num_steps), max_size=2)))
    read: list[tuple[int, int]] = []
    mixture = mixture_of(config, splits, 1, batch_size)
    for start, stop in zip([0, *breaks], [*breaks, num_steps], strict=True):
        ranks = [
            open_batches(config, splits, VIEWS, seed=1, batch_size=batch_size, start_micro_step=start,
                         rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]  # fmt: skip
        for step in range(start, stop):
            parts = [next(batches) for batches in ranks]
            assert torch.equal(torch.cat([p.sample_ids for p in parts]), mixture.batch(step).sample_ids)
            for part in parts:
                read += zip(part.epochs.tolist(), part.sample_ids.tolist(), strict=True)
                assert torch.equal(part.labels, part.sample_ids % 10)
        for batches in ranks:
            batches.close()
    assert len(set(read)) == len(read) == num_steps * batch_size
    for epoch in range(2 * per_round // sum(sizes)):
        assert sorted(sample_id for e, sample_id in read if e == epoch) == list(range(sum(sizes)))


def test_a_copy_that_rots_in_the_cache_changes_no_sample(shards: Path, whole: Log, tmp_path: Path) -> None:
    cache = {"folder": tmp_path / "cache", "max_gib": 1.0}
    assert log_of(shards, decode_threads=0, cache=cache) == whole
    original = (shards / "a.tar").read_bytes()
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    (entry,) = [path for path in files if path.stat().st_size == len(original)]
    before = entry.stat()
    rotten = bytearray(original)
    rotten[len(rotten) // 2] ^= 1
    entry.write_bytes(rotten)
    os.utime(entry, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a bad disk would leave it
    assert log_of(shards, decode_threads=0, cache=cache) == whole
    assert entry.read_bytes() == original
