"""What every benchmark's result says of how and where it was measured."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, and how busy they were in the last minute."""
    cores = len(os.sched_getaffinity(0))
    return {"cpu": cpu_model(), "cores": cores, "load": round(os.getloadavg()[0], 2)}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(result: Mapping[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def tell(measured: Mapping[str, Any], out: Path | None) -> None:
    """Print the result as JSON, and write it to a file if one is wanted."""
    result = {
        "command": " ".join(["python", *sys.argv]),
        **measured,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if out:
        write(result, out)
