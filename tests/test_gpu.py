"""What only a GPU can show: engines, both kinds of data, and a resume, on CUDA. Run by `make gpu-check`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_shards import samples, write_shard
from test_train import CONFIG, records, samples_seen, train

from pretrain.cli import main
from pretrain.data.indexing import index_folder
from pretrain.data.loader import DataConfig, open_batches, open_splits
from pretrain.data.transfer import DeviceBatches, _pin
from pretrain.views.plan import ViewConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("resident", ["true", "false"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "engine", ["engine.kind=local", *(f"engine.deepspeed.zero_optimization.stage={n}" for n in range(4))]
)
def test_a_run_trains_resumes_and_exports_on_the_device(
    engine: str, precision: str, resident: str, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "images.tar", samples(0, 60, height=32, width=32))
    index_folder(shards)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("SHARDS", str(shards)))
    settings = [engine, f"engine.precision={precision}", f"data.resident={resident}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config, whole, *settings)
    assert all(math.isfinite(record["total"]) for record in records(whole))
    assert records(whole)[-1]["skipped_steps"] == 0
    last_kept = whole / "checkpoints" / "step-00000008"
    train(config, broken, *settings, "--resume", str(last_kept))
    assert samples_seen(broken) == samples_seen(whole)[8:]
    for found, expected in zip(records(broken), records(whole)[8:], strict=True):
        assert found["total"] == pytest.approx(expected["total"], rel=0.02)
    assert main(["export", str(whole), "--out", str(tmp_path / "exported")]) == 0


def test_streamed_batches_arrive_whole_while_the_device_computes(tmp_path: Path) -> None:
    """What is copied beside the computation is what was written, also when the ring is as small as can be."""
    write_shard(tmp_path / "images.tar", samples(0, 60, height=40, width=48))
    index_folder(tmp_path)
    config = DataConfig(shards=str(tmp_path), lanes=4, shuffle_block=4, prefetch_batches=1)
    views, splits = [ViewConfig(size_px=224)] * 2, open_splits(config)
    on_device, on_host = (
        open_batches(config, splits, views, seed=3, batch_size=32, device=device)
        for device in ("cuda", "cpu")
    )
    assert isinstance(on_device, DeviceBatches)
    assert all(tensor.is_pinned() for tensor in on_device.batches.shared_tensors)
    busy = torch.rand(4096, 4096, device="cuda")
    try:
        for _ in range(20):
            found, expected = next(on_device), next(on_host)
            busy = (busy @ busy).clamp(0, 1)  # the device is behind while the next batch is asked for
            assert torch.equal(found.crops[0].cpu(), expected.crops[0])
            for name in ("sample_ids", "epochs", "labels"):
                assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))
    finally:
        on_device.close()
        on_host.close()


def test_memory_that_cannot_be_pinned_does_not_break_what_follows() -> None:
    tensor = torch.zeros(1 << 20, dtype=torch.uint8)
    device = torch.device("cuda")
    assert _pin(tensor, device)
    assert not _pin(tensor, device)  # a second time CUDA refuses
    assert torch.ones(8, device=device).sum().item() == 8
