"""The folder of a run: made, swept and described when a run opens it."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pretrain import attempts, checkpoint
from pretrain.attempts import Attempt, Owner
from pretrain.errors import cannot_write
from pretrain.preflight import Inspected, Request

logger = logging.getLogger("pretrain")


class _RunLog(logging.FileHandler):
    """A full disk is told once, without tracebacks; the log is written again when there is room."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            logger.warning(
                "%s cannot be written (%s); training goes on without it", self.baseFilename, error.strerror
            )

    def close(self) -> None:
        with suppress(OSError):  # of what was never written
            super().close()


def begin_attempt(run_dir: Path, owner: Owner, lease_seconds: float = 60.0) -> Attempt:
    """Take the run folder for a new attempt, which a UserError refuses while another one lives."""
    above = checkpoint.newest_attempt(run_dir)
    return attempts.begin(run_dir, owner, lease_seconds, above=above, about=environment())


def open_folder(request: Request, inspected: Inspected, attempt: Attempt | None = None) -> logging.Handler:
    """Make the run folder, sweep what a killed run left, write down what will run, and open its log.

    attempt: which holds the folder; it learns here from which checkpoint it goes on.
    """
    run_dir = request.output_dir
    try:
        (run_dir / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(run_dir)
        (run_dir / "config.yaml").write_text(request.config.to_yaml())
        (run_dir / "environment.json").write_text(json.dumps(environment(), indent=1))
        handler = _RunLog(run_dir / "train.log")
    except OSError as error:
        raise cannot_write(run_dir, error) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        _go_on_from(run_dir, inspected.resume_from, attempt)
    except BaseException:
        logger.removeHandler(handler)
        handler.close()
        raise
    return handler


def _go_on_from(run_dir: Path, resume_from: Path | None, attempt: Attempt | None) -> None:
    """Record where the attempt begins, then put aside what it will write again and what is stale."""
    is_own = resume_from is not None and run_dir.resolve() in resume_from.resolve().parents
    writer, step = checkpoint.origin(resume_from) if resume_from else (None, 0)
    if attempt:  # first: what is stale follows from it
        attempt.began_from(writer if is_own else None, step)
    for folder in checkpoint.set_aside(run_dir, step if is_own else 0):
        logger.warning("a checkpoint that does not lead to where the run goes on was renamed to %s", folder)


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever wants to repeat the run."""
    packages = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy", "safetensors", "pydantic")
    commit = _git("rev-parse", "HEAD")
    return {
        "command": [word.encode("utf-8", "backslashreplace").decode() for word in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "commit": commit or None,
        # of the package: its settings stand in config.yaml
        "uncommitted": bool(_git("status", "--porcelain", "--", ".")) if commit else None,
    }


def _git(*arguments: str) -> str:
    """What git says in the package's folder; nothing where it is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
