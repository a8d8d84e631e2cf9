"""What a result says of how and where it was measured, and the file of a slice."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gpu.setting import ROOT, Measured, Setting
from pretrain.errors import UserError

PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "timm", "numpy", "kornia", "lightly")
# of nvidia-smi; reading them changes nothing
SMI_FIELDS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "power.draw",
    "temperature.gpu",
)  # fmt: skip


def place(setting: Setting) -> dict[str, Any]:
    """The machine and the libraries; the same for all variants of a slice."""
    found: dict[str, Any] = {
        "device": setting.device.type,
        "machine": platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if setting.is_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def gpu_state(setting: Setting) -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi tells them now; nothing where it is absent."""
    if not setting.is_gpu:
        return {}
    asked = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = told.strip().splitlines()
    cells = [cell.strip() for cell in lines[0].split(",")] if lines else []
    return dict(zip(SMI_FIELDS, cells, strict=True)) if len(cells) == len(SMI_FIELDS) else {}


def commit() -> str:
    """Of the code; `GIT_COMMIT` says it where the repository was copied without its history."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        told = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    return told.strip() or os.environ.get("GIT_COMMIT", "unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass
class SliceFile:
    """Results of one slice; written whole after every change."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> dict[str, Measured]:
        found: dict[str, Measured] = self.content["variants"]
        return found

    @property
    def is_complete(self) -> bool:
        return bool(self.content.get("is_complete"))

    @property
    def good(self) -> dict[str, Measured]:
        return {name: result for name, result in self.variants.items() if "problem" not in result}

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)


def open_file(name: str, what: str, setting: Setting) -> SliceFile:
    """The file of a slice, or an empty one. UserError if what is there was measured elsewhere."""
    path = setting.out / f"{name}.json"
    here = place(setting)
    if not path.exists():
        content = {"slice": name, "what": what, "is_toy": setting.is_toy, "place": here, "variants": {}}
        return SliceFile(path, content)
    try:
        content = json.loads(path.read_text())
        there, is_toy = content["place"], content["is_toy"]
        assert isinstance(content["variants"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path}: is no result of this benchmark; remove it, or choose another --out"
        ) from error
    differing = [key for key in ("device", "gpu", "cuda") if there.get(key) != here.get(key)]
    differing += [
        package
        for package in ("torch", "triton")
        if there.get("versions", {}).get(package) != here["versions"].get(package)
    ]
    if is_toy != setting.is_toy:
        differing.insert(0, "size")
    if differing:
        raise UserError(
            f"{path}: was begun with another {differing[0]}; give --redo to measure it anew, or another --out"
        )
    return SliceFile(path, content)
