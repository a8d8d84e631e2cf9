"""What a finished run leaves besides its checkpoints: its weights, ready for timm.

Rank 0 exports from the checkpoint on the disk; the others stay for that long, for a launcher may kill what
outlives the first rank that ends. Whatever goes wrong here is a warning: the checkpoint is safe, and the
export can be made from it at any time.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pretrain import cluster

FOLDER = "exported"
SLICE_SECONDS = 5.0  # in which the other ranks wait, so that no time-out notices

logger = logging.getLogger("pretrain")


class FinalExportConfig(BaseModel):
    """Whether the weights are exported when the run is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_end: bool = True


def export_at_end(run_dir: Path, is_first: bool, limit_seconds: float) -> None:
    """Write the weights of the newest checkpoint to `exported` in the run folder, unless they are there.

    Every rank calls this. Where another checkpoint of the run was exported there before, what was asked for
    then holds again.
    """
    thread = _Export(run_dir) if is_first else None
    deadline = time.monotonic() + limit_seconds
    if thread:
        thread.start()
    while cluster.from_first(thread is not None and thread.is_at_it_until(deadline)):
        pass
    if thread:
        thread.tell(limit_seconds)


class _Export(threading.Thread):
    """A thread, so that a disk that hangs holds nobody up for ever."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(name="export", daemon=True)
        self.run_dir = run_dir
        self.said: str | None = None
        self.problem: str | None = None

    def run(self) -> None:
        try:
            self.said = _export(self.run_dir)
        except Exception as error:
            self.problem = " ".join(str(error).split()) or type(error).__name__

    def is_at_it_until(self, deadline: float) -> bool:
        """Wait for a slice; False once it has ended, or is out of time."""
        left = deadline - time.monotonic()
        self.join(max(0.0, min(SLICE_SECONDS, left)))
        return self.is_alive() and left > 0

    def tell(self, limit_seconds: float) -> None:
        if self.said:
            logger.info("%s", self.said)
            return
        why = self.problem or f"not done within {limit_seconds:g} s; the disk may hang"
        again = f"pretrain export {shlex.quote(str(self.run_dir))}"
        logger.warning("the run is done, but its weights were not exported (%s): %s", why, again)


def _export(run_dir: Path) -> str:
    from pretrain.export.export_report import read_report
    from pretrain.export.exporting import Exported, Target, export_run
    from pretrain.export.options import ExportOptions

    folder = run_dir / FOLDER
    before = read_report(folder)  # of an earlier end of the run, that went on afterwards
    options = ExportOptions.of(before) if before else None
    (done,) = export_run(run_dir, [Target("timm", folder)], options)
    assert isinstance(done, Exported)
    if done.state in ("up to date", "new results"):
        return f"the weights of step {done.report.source_step} are in {folder} already"
    kept = f"; the older export had been changed, and was kept as {done.kept}" if done.kept else ""
    return f"exported: {done.report}{kept}"
