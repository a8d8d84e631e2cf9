"""What the ranks of a run learn of checkpoints that rank 0 cannot write; the writer has tests of its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_config import small_config

from pretrain import checkpoint, saving
from pretrain.checkpoint_writer import Snapshot
from pretrain.errors import TrainingError
from pretrain.saving import Saver


def snapshot(step: int) -> Snapshot:
    tensors = {
        name: {"w": torch.full((3,), float(step))} for name in (checkpoint.STUDENT, checkpoint.OPTIMIZER)
    }
    return Snapshot(step, tensors, {"step": step}, {})


def saver_of(run_dir: Path, *overrides: str) -> Saver:
    run_dir.mkdir(exist_ok=True)
    return Saver(run_dir, small_config(run_dir, *overrides), 1, True, None)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing until this is set."""
    free, write = threading.Event(), checkpoint.write_checkpoint

    def waiting(*arguments: Any, **named: Any) -> Path:
        assert free.wait(60)
        return write(*arguments, **named)

    monkeypatch.setattr(checkpoint, "write_checkpoint", waiting)
    monkeypatch.setattr(saving, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(saving, "SLICE_SECONDS", 0.05)
    return free


def test_a_run_whose_last_write_hangs_has_failed(tmp_path: Path, hanging: threading.Event) -> None:
    saver = saver_of(tmp_path / "run")
    assert saver._writer is not None
    saver._writer.submit(snapshot(3))
    began = time.perf_counter()
    with pytest.raises(TrainingError, match=r"could not be written: not finished within 0\.3 s"):
        saver.finish()
    assert time.perf_counter() - began < 10.0  # it waits once, and not again when it closes
    hanging.set()


def test_a_run_does_not_go_back_beside_a_write_that_hangs(tmp_path: Path, hanging: threading.Event) -> None:
    """It might end after the later checkpoints have been put aside, and be taken for what counts."""
    saver = saver_of(tmp_path / "run")
    assert saver._writer is not None
    saver._writer.submit(snapshot(3))
    with pytest.raises(TrainingError, match=r"a checkpoint is not written within 0\.3 s"):
        saver.newest_up_to(9)
    hanging.set()
    while saver._writer.is_busy:
        time.sleep(0.01)
    assert saver.newest_up_to(9) == checkpoint.step_folder(tmp_path / "run", 3)
    assert saver.newest_up_to(2) is None


def test_a_run_that_is_to_leave_does_not_wait_for_its_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm kills it soon, and it has to be requeued; the next start brings the mirror what it lacks."""
    monkeypatch.setattr(saving, "SETTLE_SECONDS", 30.0)
    sending = threading.Event()
    monkeypatch.setattr("pretrain.mirror.push", lambda folder, address: sending.wait(60))
    saver = saver_of(tmp_path / "run", f"checkpoint.mirror={tmp_path / 'mirror'}")
    assert saver._writer is not None
    saver._writer.submit(snapshot(3))
    started = time.monotonic()
    saver.finish(wait_for_mirror=False)
    assert time.monotonic() - started < 10
    assert checkpoint.newest_valid(tmp_path / "run") == (checkpoint.step_folder(tmp_path / "run", 3), [])
    sending.set()
