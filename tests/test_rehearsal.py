"""A rehearsal is the first step of rank 0 of the real run, without the others and without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_config import small_config
from small_shards import make_shards

from pretrain import build, changes, cluster
from pretrain.checkpoint import OPTIMIZER, STUDENT
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.inline import InlineBatches
from pretrain.errors import ConfigError
from pretrain.losses import info_nce
from pretrain.peers import ALONE
from pretrain.preflight import Request
from pretrain.rehearsal import Rehearsal, describe_rehearsal, rehearse, stand_in

INLINE = ("data.decode_threads=0", "log={prometheus: {enabled: false}}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_shards(folder, [12, 12])
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)


def request_for(shards: Path, folder: Path, *overrides: str) -> Request:
    config = small_config(folder, f"data.shards={shards}", *INLINE, *overrides)
    return Request(config, folder / "run", "none")


def place_of(world_size: int) -> cluster.Cluster:
    return cluster.Cluster(0, world_size, 0, world_size, "--nproc")


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Batch], list[RunConfig]]:
    """What is read, and what the engine is made for, while a rehearsal runs."""
    read: list[Batch] = []
    made: list[RunConfig] = []
    following, engine = InlineBatches.__next__, build.engine

    def read_on(batches: InlineBatches) -> Batch:
        batch = following(batches)
        read.append(replace(batch, sample_ids=batch.sample_ids.clone(), epochs=batch.epochs.clone()))
        return batch

    def make(config: RunConfig, *parts: object) -> object:
        made.append(config)
        return engine(config, *parts)  # type: ignore[arg-type]

    monkeypatch.setattr(InlineBatches, "__next__", read_on)
    monkeypatch.setattr(build, "engine", make)
    return read, made


def rehearse_locally(request: Request, world_size: int, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    """With plain torch, in a world that only DeepSpeed could train in."""
    engine = build.engine

    def local(config: RunConfig, *parts: object) -> object:
        settings = config.engine.model_copy(update={"kind": "local"})
        return engine(config.model_copy(update={"engine": settings}), *parts)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "engine", local)
    return rehearse(request, place_of(world_size))


def test_copies_of_the_own_rows_stand_for_the_other_ranks() -> None:
    peers, rows = stand_in(3), torch.randn(4, 8, requires_grad=True)
    assert torch.equal(peers.gather(rows), torch.cat([rows, rows, rows]))
    assert torch.equal(peers.sum(rows), rows + rows + rows)
    keys = torch.randn(4, 8)
    info_nce(rows, keys, 0.2, peers)[0].backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
    assert (peers.rank, peers.world_size) == (0, 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_step_has_the_samples_and_the_share_of_rank_0_of_many(
    world_size: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(shards, tmp_path)
    read, made = watched(monkeypatch)
    found = rehearse_locally(request, world_size, monkeypatch)
    mixture = found.inspected.mixture
    assert len(read) == 2 * 2, "two micro steps, of a cold and of a warm step"
    for micro_step, batch in enumerate(read):
        expected = mixture.batch(micro_step, 0, world_size)
        assert torch.equal(batch.sample_ids, expected.sample_ids)
        assert len(batch.sample_ids) == 16 // 2 // world_size
    assert [config.batch.global_size for config in made] == [16 // world_size]
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"], "nothing is written"


def test_what_is_told_follows_from_what_was_seen(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(shards, tmp_path, "teacher={momentum: 0.9}")
    found = rehearse_locally(request, 2, monkeypatch)
    module = build.module(request.config, ALONE, torch.device("cpu"), 24)
    num_weights = sum(p.numel() for p in module.parameters())
    assert found.optimizer_bytes == 2 * 4 * num_weights  # two moments, fp32
    files = changes.outline(request.config, 24)
    assert found.checkpoint_bytes == changes.num_bytes(files)
    assert changes.num_bytes({STUDENT: files[STUDENT]}) >= 4 * num_weights
    assert found.peak_bytes > 50 * 2**20, "torch alone takes more"
    assert found.loader_bytes == 0
    assert found.warm_seconds is not None
    assert 0 < found.wait_seconds < found.warm_seconds
    assert found.run_seconds == 10 * found.warm_seconds
    cold = replace(found, warm_seconds=None, first_seconds=30.0)
    assert cold.run_seconds == 300.0
    text = describe_rehearsal(request, cold, place_of(2))
    assert "1 node x 2 ranks" in text
    assert "global batch 16 = micro 4 x accumulation 2 x ranks 2" in text
    assert "first step 30.00 s" in text
    assert "10 steps take 5.0 minutes (prediction: one process alone" in text
    assert f"a checkpoint takes {found.checkpoint_bytes / 2**20:.1f} MiB" in text
    assert f"{found.optimizer_bytes // 2 / 2**20:.1f} MiB less in the run, where ZeRO divides" in text
    assert sum(len(tensors) for name, tensors in files.items() if name == OPTIMIZER) > 0


def test_a_run_of_one_step_is_rehearsed_with_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rehearse_locally(request_for(shards, tmp_path, "schedule.steps=1"), 1, monkeypatch)
    assert found.warm_seconds is None
    assert found.run_seconds == found.first_seconds


def test_what_a_real_start_would_refuse_a_rehearsal_refuses(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 lanes cannot be shared equally by 3 ranks"):
        rehearse(request_for(shards, tmp_path), place_of(3))
    with pytest.raises(ConfigError, match="'local' trains on one process, not on 2"):
        rehearse(request_for(shards, tmp_path, "engine.kind=local"), place_of(2))


@pytest.mark.distributed
def test_deepspeed_rehearses_its_share_with_the_real_loader(shards: Path, tmp_path: Path) -> None:
    request = request_for(shards, tmp_path, "data.decode_threads=1", "schedule.steps=1")
    found = rehearse(request, place_of(4))
    assert found.inspected.sizes.micro_batch == 2
    assert found.loader_bytes > 2**20
    assert not torch.distributed.is_initialized()
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"]
