"""The folder of a run: made, swept and described when a run opens it."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint
from pretrain.errors import UserError
from pretrain.preflight import Inspected, Request

logger = logging.getLogger("pretrain")


def open_folder(request: Request, inspected: Inspected) -> logging.Handler:
    """Make the run folder, sweep what a killed run left, write down what will run, and open its log."""
    run_dir = request.output_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(run_dir)
        (run_dir / "config.yaml").write_text(request.config.to_yaml())
        (run_dir / "environment.json").write_text(json.dumps(environment(), indent=1))
        handler = logging.FileHandler(run_dir / "train.log")
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be written ({error.strerror}); choose another --output-dir"
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    if inspected.resume_from and run_dir.resolve() in inspected.resume_from.resolve().parents:
        step = json.loads((inspected.resume_from / checkpoint.STATE).read_text())["step"]
        for folder in checkpoint.set_aside(run_dir, int(step)):
            logger.warning("a checkpoint beyond the one resumed from was renamed to %s", folder)
    return handler


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever wants to repeat the run."""
    packages = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy", "safetensors", "pydantic")
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": commit or None,
    }
