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
