"""TensorBoard and W&B: what arrives there, and that nothing there can hold up or end a run."""

from __future__ import annotations

import json
import logging
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fault_runs
import pytest
from small_shards import make_shards

from pretrain.engine import monitors as monitors_module
from pretrain.engine.monitors import Monitors, WandbConfig, check_monitors, scalars
from pretrain.errors import ConfigError

RECORD: dict[str, object] = {
    "step": 7,
    "attempt": 1,
    "total": 2.5,
    "loss/rotation": 1.0,
    "rotation/accuracy": None,
    "lr": 0.1,
    "images_per_second": 90,
    "unix_time": 5.0,
}


def test_names_are_those_that_people_search_for() -> None:
    assert scalars(RECORD) == {
        "train/loss": 2.5,
        "train/loss/rotation": 1.0,
        "train/lr": 0.1,
        "train/samples_per_second": 90.0,
    }


def test_every_record_arrives_in_order() -> None:
    events: list[Any] = []
    monitors = Monitors(lambda: events.extend)
    for step in range(50):
        monitors.write({**RECORD, "step": step})
    monitors.close()
    assert [event[2] for event in events if event[0] == "train/lr"] == list(range(50))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    return caplog


def refuse(*_: Any) -> Any:
    raise SystemExit("no such host")


@pytest.mark.parametrize("where", ["connecting", "writing"])
def test_what_fails_is_told_once_and_stops_nothing(where: str, told: pytest.LogCaptureFixture) -> None:
    monitors = Monitors(refuse if where == "connecting" else lambda: refuse)
    for step in range(5):
        monitors.write({**RECORD, "step": step})
    monitors.close()
    assert [record.levelname for record in told.records] == ["WARNING"]
    assert "SystemExit: no such host; training goes on" in told.text


def test_a_service_that_never_answers_holds_nothing_up(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitors_module, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(monitors_module, "MAX_WAITING", 10)
    forever = threading.Event()
    monitors = Monitors(lambda: lambda events: forever.wait() and None)  # type: ignore[func-returns-value]
    began = time.perf_counter()
    for step in range(30):
        monitors.write({**RECORD, "step": step})
    monitors.close()
    assert time.perf_counter() - began < 2.0
    assert "more records wait than can be written" in told.text
    forever.set()


def test_what_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_monitors(True, None, "deepspeed")
    with pytest.raises(ConfigError, match=r"log\.tensorboard: .* set engine\.kind: deepspeed"):
        check_monitors(True, None, "local")
    monkeypatch.setattr(monitors_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.wandb: wandb is not installed; run pip install"):
        check_monitors(False, WandbConfig(), "deepspeed")
    check_monitors(False, None, "local")


CONFIG = """
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 4, args: {depth: 1, embed_dim: 24, num_heads: 2}}
data: {shards: SHARDS, lanes: 2, shuffle_block: 4, decode_threads: 0}
views: {one: {size_px: 32, turn: true}, two: {size_px: 32, turn: true}}
tasks: {contrastive: {hidden_dim: 16, out_dim: 8}, rotation: {}}
optim: {base_lr: 0.01}
schedule: {steps: 4, warmup_steps: 1}
batch: {global_size: 8}
engine: {precision: fp32}
export: {at_end: false}
log: {every_steps: 1, prometheus: {enabled: false}}
"""


def train(folder: Path, *overrides: str) -> Path:
    make_shards(folder / "shards", [16, 16])
    config, run = folder / "run.yaml", folder / "run"
    config.write_text(CONFIG.replace("SHARDS", str(folder / "shards")))
    arguments = ["train", str(config), *overrides, "--output-dir", str(run)]
    variables = {"WANDB_MODE": "offline", "HOME": str(folder)}
    fault_runs.start(arguments, folder, variables=variables).ends(0)
    return run


@pytest.mark.distributed
def test_a_run_draws_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tmp_path, "log.tensorboard=true")
    written = EventAccumulator(str(run / "tensorboard" / "attempt-0001"))
    written.Reload()
    tags = set(written.Tags()["scalars"])
    assert {"train/loss", "train/loss/rotation", "train/lr", "train/batch_time"} <= tags
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drawn = [(event.step, event.value) for event in written.Scalars("train/loss")]
    assert drawn == [(record["step"], pytest.approx(record["total"])) for record in records]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_is_kept_by_wandb_without_a_network(tmp_path: Path) -> None:
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed (it slows the import of timm): pip install 'pretrain[wandb]'")
    run = train(tmp_path, "log.wandb.project=trial")
    (offline,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss/rotation" in offline.read_bytes()
