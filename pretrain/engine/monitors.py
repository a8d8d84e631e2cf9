"""TensorBoard and Weights & Biases, through DeepSpeed's monitors: rank 0 writes, in a thread of its own.

Whatever goes wrong there, from a full disk to a service that does not answer, is told once and stops nothing.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pretrain.errors import ConfigError

FOLDER = "tensorboard"
MAX_WAITING = 1000  # records; a service that is slower than that loses some, and the log says so
CLOSE_SECONDS = 20.0
# names that people search for, where ours differ; everything else keeps its own
RENAMED = {
    "total": "loss",
    "images_per_second": "samples_per_second",
    "step_seconds": "batch_time",
    "data_wait_seconds": "data_time",
}
LEFT_OUT = {"step", "attempt", "unix_time", "began_unix_time", "samples"}

logger = logging.getLogger("pretrain")

Write = Callable[[list[tuple[str, float, int]]], None]


class WandbConfig(BaseModel):
    """Where Weights & Biases keeps a run; key and address come from its own environment variables."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    project: str = "pretrain"
    team: str | None = None  # entity
    group: str | None = None  # null: the name of the run folder, so that restarts stand together


def check_monitors(tensorboard: bool, wandb: WandbConfig | None, engine_kind: str) -> None:
    """Refuse what cannot be written, before anything starts."""
    for setting, package, is_on in (
        ("log.tensorboard", "tensorboard", tensorboard),
        ("log.wandb", "wandb", wandb is not None),
    ):
        if is_on and engine_kind != "deepspeed":
            raise ConfigError(f"{setting}: is written by DeepSpeed's monitor; set engine.kind: deepspeed")
        if is_on and find_spec(package) is None:
            raise ConfigError(f"{setting}: {package} is not installed; run pip install 'pretrain[{package}]'")


class Monitors:
    """Hands records to whoever draws them.

    connect makes the writer and finish ends it; both are called in the thread, as a service may be slow.
    """

    def __init__(self, connect: Callable[[], Write], finish: Callable[[], object] = lambda: None) -> None:
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._connect, self._finish = connect, finish
        self._has_told = False
        self._thread = threading.Thread(target=self._run, name="monitors", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, object]) -> None:
        """Take in a record of metrics.jsonl, without waiting."""
        step = record.get("step")
        if not isinstance(step, int):
            return
        try:
            self._waiting.put_nowait((step, scalars(record)))
        except queue.Full:
            self._tell("more records wait than can be written; some are left out")

    def close(self) -> None:
        """Give what waits a while to be written."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._tell(f"not all was written after {CLOSE_SECONDS:g} s")

    def _run(self) -> None:
        try:
            write = self._connect()
            while (item := self._waiting.get()) is not None:
                step, values = item
                write([(name, value, step) for name, value in values.items()])
            self._finish()
        except BaseException as error:  # SystemExit too, which a service's client may raise
            self._tell(f"{type(error).__name__}: {error}")
            while self._waiting.get() is not None:
                pass

    def _tell(self, problem: str) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning("TensorBoard or W&B: %s; training goes on without it", problem)


def scalars(record: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a record under the names that people search for, such as train/loss and train/lr."""
    return {
        f"train/{RENAMED.get(name, name)}": float(value)
        for name, value in record.items()
        if name not in LEFT_OUT and isinstance(value, int | float) and not isinstance(value, bool)
    }


def open_monitors(
    tensorboard: bool, wandb: WandbConfig | None, run_dir: Path, attempt: int
) -> Monitors | None:
    """On rank 0, after the engine is built; None if nothing is to be written."""
    if not tensorboard and wandb is None:
        return None
    run, start = run_dir.resolve().name, f"attempt-{attempt:04d}"
    settings: dict[str, Any] = {}
    if tensorboard:  # each start is a line of its own: what is taken again would stand twice in one
        settings["tensorboard"] = {"enabled": True, "output_path": str(run_dir / FOLDER), "job_name": start}
    if wandb is not None:
        group = wandb.group or run
        settings["wandb"] = {"enabled": True, "project": wandb.project, "team": wandb.team, "group": group}

    def connect() -> Write:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        os.environ.setdefault("WANDB_DIR", str(run_dir))
        os.environ.setdefault("WANDB_NAME", f"{run}-{start}")
        os.environ.setdefault("WANDB_SILENT", "true")
        write: Write = MonitorMaster(get_monitor_config(settings)).write_events
        return write

    return Monitors(connect, _finish_wandb if wandb is not None else lambda: None)


def _finish_wandb() -> None:
    import wandb

    wandb.finish()
