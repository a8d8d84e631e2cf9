from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from range_server import Fault, RangeServer
from small_shards import jpeg, make_shards, samples, write_shard
from torch import Tensor

from pretrain.data.indexing import index_folder
from pretrain.data.loader import Batch, Batches, DataConfig, mixture_of, open_batches, open_splits, pool_bytes
from pretrain.data.manifest import Manifest
from pretrain.data.quarantine import Quarantine
from pretrain.data.reader import read_split
from pretrain.data.streaming import StreamingBatches
from pretrain.errors import ConfigError, DataError, TrainingError
from pretrain.views.plan import ViewConfig

VIEWS = [ViewConfig(size_px=16), ViewConfig(size_px=8, scale=(0.05, 0.3)), ViewConfig(size_px=16)]
SETTINGS: dict[str, Any] = {"lanes": 4, "shuffle_block": 3}


@contextmanager
def batches(manifest: Manifest, **settings: Any) -> Iterator[Batches]:
    """Open batches of 8, with settings of the data or of the call."""
    call = {key: settings.pop(key) for key in list(settings) if key not in DataConfig.model_fields}
    config = DataConfig(shards=str(manifest.folder), **SETTINGS | settings)
    opened = open_batches(config, [manifest.split("train")], VIEWS, **{"seed": 3, "batch_size": 8} | call)
    try:
        yield opened
    finally:
        opened.close()


def copy(batch: Batch) -> Batch:
    crops = tuple(crop.clone() for crop in batch.crops)
    return Batch(crops, batch.sample_ids.clone(), batch.epochs.clone(), batch.labels.clone())


def take(manifest: Manifest, count: int, **settings: Any) -> list[Batch]:
    with batches(manifest, **settings) as opened:
        return [copy(next(opened)) for _ in range(count)]


def tensors(batch: Batch) -> list[Tensor]:
    return [*batch.crops, batch.sample_ids, batch.epochs, batch.labels]


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("shards"), [9, 7, 10])


@pytest.fixture(scope="module")
def streamed(manifest: Manifest) -> list[Batch]:
    return take(manifest, 8)


def test_a_stream_holds_the_samples_of_the_order_with_their_labels(
    manifest: Manifest, streamed: list[Batch]
) -> None:
    order = mixture_of(DataConfig(shards="x", **SETTINGS), [manifest.split("train")], 3, 8)
    for micro_step, batch in enumerate(streamed):
        sample_ids, epochs = order.batch(micro_step)
        assert torch.equal(batch.sample_ids, sample_ids)
        assert torch.equal(batch.epochs, epochs)
        assert torch.equal(batch.labels, sample_ids % 10)
        assert [tuple(crop.shape) for crop in batch.crops] == [(2, 8, 16, 16, 3), (1, 8, 8, 8, 3)]


def test_views_of_an_image_differ_and_so_do_its_epochs(streamed: list[Batch]) -> None:
    assert not torch.equal(streamed[0].crops[0][0], streamed[0].crops[0][1])
    rows = [
        (i, e, crop)
        for b in streamed
        for i, e, crop in zip(b.sample_ids, b.epochs, b.crops[0][0], strict=True)
    ]
    first = {int(i): crop for i, e, crop in rows if e == 0}
    second = {int(i): crop for i, e, crop in rows if e == 1}
    common = first.keys() & second.keys()
    assert common
    assert any(not torch.equal(first[i], second[i]) for i in common)


def test_threads_prefetching_and_compression_change_nothing(streamed: list[Batch], tmp_path: Path) -> None:
    compressed = make_shards(tmp_path, [9, 7, 10], ".tar.gz")
    assert_equal(take(compressed, 8, decode_threads=3, prefetch_batches=1), streamed)


def test_two_ranks_side_by_side_make_the_batches_of_one(manifest: Manifest, streamed: list[Batch]) -> None:
    ranks = [take(manifest, 8, rank=rank, world_size=2) for rank in range(2)]
    joined = [
        Batch(
            tuple(torch.cat(crops, dim=1) for crops in zip(left.crops, right.crops, strict=True)),
            *(torch.cat(pair) for pair in zip(tensors(left)[-3:], tensors(right)[-3:], strict=True)),
        )
        for left, right in zip(*ranks, strict=True)
    ]
    assert_equal(joined, streamed)


def test_a_start_in_the_middle_continues_the_stream(manifest: Manifest, streamed: list[Batch]) -> None:
    assert_equal(take(manifest, 5, start_micro_step=3), streamed[3:])


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(manifest: Manifest) -> None:
    with batches(manifest, prefetch_batches=1) as opened:
        batch = next(opened)
        before = copy(batch)
        time.sleep(0.3)
        assert_equal([batch], [before])
        assert opened.wait_seconds > 0


def test_resident_batches_equal_streamed_ones(manifest: Manifest, streamed: list[Batch]) -> None:
    for resident, stream in zip(take(manifest, 8, resident=True), streamed, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(tensors(resident)[-3:], tensors(stream)[-3:], strict=True)
        )
        for left, right in zip(resident.crops, stream.crops, strict=True):
            assert (left.int() - right.int()).abs().max() <= 2


def test_resident_batches_split_over_ranks_and_start_anywhere(manifest: Manifest) -> None:
    whole = take(manifest, 6, resident=True)
    assert_equal(take(manifest, 4, resident=True, start_micro_step=2), whole[2:])
    right = take(manifest, 6, resident=True, rank=1, world_size=2)
    assert all(torch.equal(a.crops[0], b.crops[0][:, 4:]) for a, b in zip(right, whole, strict=True))


def test_resident_images_of_two_sizes_are_refused_by_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [*samples(0, 8), ("x.jpg", jpeg(0, 32, 32))])
    with (
        pytest.raises(
            DataError, match=r"40 x 48 and 32 x 32 px \('x' in 0\.tar\); set data\.resident: false"
        ),
        batches(index_folder(tmp_path), resident=True),
    ):
        pass


BAD = {5: b"", 6: jpeg(6)[:-2], 20: b"<html>"}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards of 26 samples, three of them undecodable."""
    folder = tmp_path_factory.mktemp("spoiled")
    members = samples(0, 26)
    for number, data in BAD.items():
        members[2 * number] = (members[2 * number][0], data)
    write_shard(folder / "0.tar", members[:26])
    write_shard(folder / "1.tar", members[26:])
    return index_folder(folder)


@pytest.mark.parametrize("resident", [False, True])
def test_bad_images_are_replaced_alike_everywhere_and_recorded_once(
    spoiled: Manifest, tmp_path: Path, resident: bool
) -> None:
    settings: dict[str, Any] = {"max_bad_ratio": 0.2, "resident": resident}
    record = tmp_path / "quarantine.jsonl"
    with batches(spoiled, **settings, quarantine_path=record) as opened:
        whole = [copy(next(opened)) for _ in range(8)]
        assert opened.counts.num_bad == 3
    order = mixture_of(DataConfig(shards="x", **SETTINGS), [spoiled.split("train")], 3, 8)
    for micro_step, batch in enumerate(whole):
        wanted = order.batch(micro_step).sample_ids
        is_bad = torch.isin(wanted, torch.tensor(list(BAD)))
        assert torch.equal(batch.sample_ids[~is_bad], wanted[~is_bad])
        assert not torch.isin(batch.sample_ids, torch.tensor(list(BAD))).any()
        assert torch.equal(batch.labels, batch.sample_ids % 10)
    right = take(spoiled, 8, **settings, decode_threads=3, rank=1, world_size=2)
    assert all(torch.equal(a.sample_ids, b.sample_ids[4:]) for a, b in zip(right, whole, strict=True))
    records = [json.loads(line) for line in record.read_text().splitlines()]
    assert {(r["sample_id"], r["shard"], r["key"], r["reason"]) for r in records} == {
        (5, "0.tar", "000005", "empty"),
        (6, "0.tar", "000006", "damaged"),
        (20, "1.tar", "000020", "unknown_format"),
    }
    assert all(
        r["offset"] == spoiled.samples(spoiled.shard(r["sample_id"] // 13)).starts[r["sample_id"] % 13]
        for r in records
    )


def test_a_restart_goes_on_counting_and_records_nothing_twice(manifest: Manifest, tmp_path: Path) -> None:
    record = tmp_path / "quarantine.jsonl"
    bad = list(read_split(manifest.split("train")))[:3]
    first = Quarantine(record, num_samples=1000, max_bad_ratio=0.002)
    for sample in (bad[0], bad[1], bad[1]):
        first.add(sample, "damaged")
    with record.open("a") as file:
        file.write('{"sample_id": 7')  # a write cut short by a crash
    again = Quarantine(record, num_samples=1000, max_bad_ratio=0.002)
    assert first.num_bad == again.num_bad == 2
    again.add(bad[0], "damaged")
    assert record.read_text().count("damaged") == 2
    with pytest.raises(
        DataError, match=r"3 samples do not decode, listed in .*quarantine\.jsonl, 2 are allowed"
    ):
        again.add(bad[2], "damaged")


@pytest.mark.parametrize("resident", [False, True])
def test_more_bad_images_than_allowed_end_the_run(spoiled: Manifest, resident: bool) -> None:
    with pytest.raises(
        DataError, match=r"3 samples do not decode, 2 are allowed|2 samples .*, 1 are allowed"
    ):
        take(spoiled, 8, resident=resident, max_bad_ratio=0.08)


def test_one_bad_image_is_always_allowed(tmp_path: Path) -> None:
    members = samples(0, 8)
    members[0] = ("000000.jpg", b"")
    write_shard(tmp_path / "0.tar", members)
    assert len(take(index_folder(tmp_path), 2, max_bad_ratio=0)) == 2


def test_a_shard_damaged_during_the_run_ends_it_with_its_name(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [9, 7])
    os.truncate(manifest.shard(1).path, 5000)
    with pytest.raises(DataError, match=r"train-1\.tar: does not hold what its index .*5000 bytes instead"):
        take(manifest, 8)


@pytest.mark.parametrize("resident", [False, True])
def test_a_rotten_sample_is_set_aside_though_its_image_still_decodes(tmp_path: Path, resident: bool) -> None:
    manifest = make_shards(tmp_path, [9, 7])
    shard = manifest.shard(1)
    with shard.path.open("r+b") as file:
        file.seek(int(manifest.samples(shard).starts[3]) + 5)
        file.write(b"x")  # the name in a header: the image is whole, its key is not
    record = tmp_path / "quarantine.jsonl"
    with batches(manifest, resident=resident, quarantine_path=record) as opened:
        seen = torch.cat([copy(next(opened)).sample_ids for _ in range(8)])
    assert 12 not in seen
    (line,) = map(json.loads, record.read_text().splitlines())
    assert (line["sample_id"], line["shard"], line["reason"]) == (12, "train-1.tar", "checksum")
    assert line["offset"] == manifest.samples(shard).starts[3]


def test_a_shard_replaced_by_one_of_its_size_ends_the_run(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [9, 7])
    path = manifest.shard(1).path
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DataError, match=r"train-1\.tar"):
        take(manifest, 8)


def loader_of(opened: Batches) -> psutil.Process:
    assert isinstance(opened, StreamingBatches)
    return psutil.Process(opened._process.pid)


def test_a_killed_loader_is_an_error_within_seconds_and_stays_one(manifest: Manifest) -> None:
    with batches(manifest) as opened:
        next(opened)
        loader_of(opened).kill()
        begin = time.monotonic()
        with pytest.raises(TrainingError, match=r"loader process of rank 0 .* was killed by signal 9"):
            list(itertools.islice(opened, 10))
        assert time.monotonic() - begin < 5
        with pytest.raises(TrainingError, match="signal 9"):
            next(opened)


def test_signals_to_the_whole_job_leave_the_loader_running(manifest: Manifest) -> None:
    with batches(manifest) as opened:
        loader = loader_of(opened)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loader.send_signal(number)  # while it starts
        for _ in range(3):
            next(opened)
        loader.send_signal(signal.SIGTERM)
        for _ in range(8):
            next(opened)


def test_closing_ends_the_loader(manifest: Manifest) -> None:
    with batches(manifest) as opened:
        loader = loader_of(opened)
        next(opened)
        opened.close()
        assert not loader.is_running()
        with pytest.raises(TrainingError, match="closed"):
            next(opened)


def test_the_loader_ends_with_its_trainer(manifest: Manifest, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent("""
            import sys, time
            from pretrain.data.loader import DataConfig, open_batches, open_splits
            from pretrain.views.plan import ViewConfig

            if __name__ == "__main__":
                config = DataConfig(shards=sys.argv[1], lanes=4)
                views = [ViewConfig(size_px=8)]
                opened = open_batches(config, open_splits(config), views, seed=0, batch_size=8)
                next(opened)
                print(opened._process.pid, flush=True)
                if sys.argv[2] == "wait":
                    time.sleep(60)
        """)
    )
    root = str(Path(__file__).parents[2])
    for ending in ("wait", "return"):  # killed; or ended without closing
        command = [sys.executable, str(script), str(manifest.folder), ending]
        trainer = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root})
        assert trainer.stdout is not None
        with trainer.stdout as output:
            loader = int(output.readline())
        if ending == "wait":
            trainer.kill()
        assert trainer.wait(timeout=20) == (-signal.SIGKILL if ending == "wait" else 0)
        deadline = time.monotonic() + 10
        while psutil.pid_exists(loader) and psutil.Process(loader).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_settings_that_cannot_work_are_refused_before_any_process_starts(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="use 3 or 6"), batches(manifest, world_size=3):
        pass
    with pytest.raises(ConfigError, match="use 8 or 12"), batches(manifest, batch_size=10):
        pass
    for wrong in ({"lane": 3}, {"lanes": 0}, {"max_bad_ratio": 2.0}):
        with pytest.raises(ValidationError):
            DataConfig(shards=str(manifest.folder), **wrong)


def test_shared_memory_that_does_not_suffice_is_told_not_crashed_into(manifest: Manifest) -> None:
    with pytest.raises(DataError, match=r"MiB are free; lower data\.prefetch_batches"):
        take(manifest, 1, prefetch_batches=2**40)


def test_the_pool_counts_two_blocks_of_every_lane(manifest: Manifest) -> None:
    split = manifest.split("train")
    config = DataConfig(shards="x", **SETTINGS)
    mixture = mixture_of(config, [split], seed=0, batch_size=8)
    mean_bytes = split.stored_bytes / 26
    assert pool_bytes(config, mixture, num_lanes=4) == pytest.approx(2 * 4 * 3 * mean_bytes, rel=0.01)
    whole = DataConfig(shards="x", lanes=2, shuffle_block=1000)
    mixture = mixture_of(whole, [split], seed=0, batch_size=8)
    assert pool_bytes(whole, mixture, num_lanes=2) == pytest.approx(2 * split.stored_bytes, rel=0.01)


def test_crops_come_in_recipe_order_by_size(streamed: list[Batch]) -> None:
    for batch, size in itertools.product(streamed, (0, 1)):
        assert batch.crops[size].dtype == torch.uint8
        assert batch.crops[size].float().std() > 1


@pytest.mark.parametrize("threads", [0, 1])
def test_a_stalled_or_failing_read_is_tried_again_and_counted(
    manifest: Manifest, streamed: list[Batch], threads: int
) -> None:
    with RangeServer(manifest.folder.path) as server:
        config = DataConfig(shards=server.url, decode_threads=threads, timeout_seconds=1.0, **SETTINGS)
        splits = open_splits(config)
        splits[0].samples(splits[0].shard(0))
        server.faults.extend([Fault(status=503), Fault(stall_after_bytes=100)])
        opened = open_batches(config, splits, VIEWS, seed=3, batch_size=8)
        try:
            assert_equal([copy(next(opened)) for _ in range(8)], streamed)
            assert opened.counts.num_retries == 2
        finally:
            opened.close()


def test_storage_that_stays_away_ends_the_run_with_its_name(manifest: Manifest) -> None:
    with RangeServer(manifest.folder.path) as server:
        config = DataConfig(shards=server.url, timeout_seconds=0.2, **SETTINGS)
        splits = open_splits(config)
        server.always = Fault(stall_after_bytes=10)
        opened = open_batches(config, splits, VIEWS, seed=3, batch_size=8)
        try:
            with pytest.raises(DataError, match=r"train-\d\.tar: .*no answer within 0\.2 seconds"):
                next(opened)
        finally:
            opened.close()


def test_a_bad_image_alone_in_its_block_is_replaced_from_the_next(tmp_path: Path) -> None:
    members = samples(0, 16)
    for number in (5, 6, 7):
        members[2 * number] = (members[2 * number][0], b"not an image")
    write_shard(tmp_path / "0.tar", members)
    manifest = index_folder(tmp_path)
    settings: dict[str, Any] = {"shuffle_block": 1, "max_bad_ratio": 0.3}
    seen = take(manifest, 6, **settings)
    wanted = mixture_of(DataConfig(shards="x", **SETTINGS | settings), [manifest.split("train")], 3, 8)
    bad = torch.tensor([5, 6, 7])
    for micro_step, batch in enumerate(seen):
        asked = wanted.batch(micro_step).sample_ids
        is_bad = torch.isin(asked, bad)
        assert torch.equal(batch.sample_ids[~is_bad], asked[~is_bad])
        assert not torch.isin(batch.sample_ids, bad).any()
    assert_equal(take(manifest, 6, **settings, decode_threads=3), seen)


def test_ranks_share_one_record_and_one_budget(tmp_path: Path) -> None:
    members = samples(0, 64)
    bad = set(range(0, 64, 5))  # 13 of them
    for number in bad:
        members[2 * number] = (members[2 * number][0], b"not an image")
    write_shard(tmp_path / "0.tar", members)
    manifest, record = index_folder(tmp_path), tmp_path / "quarantine.jsonl"

    def go_on(max_bad_ratio: float) -> int:
        ranks = [
            open_batches(
                DataConfig(shards="x", lanes=4, shuffle_block=4, max_bad_ratio=max_bad_ratio),
                [manifest.split("train")], VIEWS, seed=3, batch_size=8, rank=rank, world_size=4,
                quarantine_path=record,
            )
            for rank in range(4)
        ]  # fmt: skip
        try:
            for _ in range(8):  # an epoch, the ranks in turn
                for batches in ranks:
                    next(batches)
            return sum(batches.counts.num_bad for batches in ranks)
        finally:
            for batches in ranks:
                batches.close()

    with pytest.raises(DataError, match=r"\d+ samples do not decode, listed in .*, 6 are allowed"):
        go_on(0.1)
    record.unlink()
    assert go_on(0.25) == 13
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert sorted(line["sample_id"] for line in lines) == sorted(bad)


def test_the_record_of_other_data_counts_for_nothing(manifest: Manifest, tmp_path: Path) -> None:
    record = tmp_path / "quarantine.jsonl"
    sample = next(iter(read_split(manifest.split("train"))))
    Quarantine(record, 100, 0.0, data="one").add(sample, "damaged")
    other = Quarantine(record, 100, 0.0, data="other")
    assert other.num_bad == 0
    other.add(sample, "damaged")
    assert [json.loads(line)["data"] for line in record.read_text().splitlines()] == ["one", "other"]


def test_an_index_that_goes_away_before_the_loader_reads_it_is_one_line(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [8])
    manifest.columns_path.unlink()
    with pytest.raises(DataError, match=r"index\.safetensors.* start again") as caught:
        take(manifest, 1)
    assert "\n" not in str(caught.value)


def test_one_set_under_two_paths_is_not_two_sources(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", [8])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    sources = [{"shards": str(tmp_path / name)} for name in ("a", "b")]
    with pytest.raises(
        ConfigError, match=r"data\.sources\[1\]\.shards: split 'train' .* is already a source"
    ):
        open_splits(DataConfig.model_validate({"sources": sources}))
