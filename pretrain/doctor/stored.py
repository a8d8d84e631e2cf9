"""The checkpoints of a run folder, looked at without torch: what is there, and is it whole?

`pretrain.checkpoint` writes and reads them; importing it takes seconds, which this must not.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain import attempts

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
CONFIG = "config.yaml"
TEACHER = "weights/teacher.safetensors"
PARTS = ("weights/student.safetensors", TEACHER, "engine/optimizer.safetensors", STATE, CONFIG)
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the format allows no more

_NAME = re.compile(r"step-([0-9]+)(?:\.([2-9]|[1-9][0-9]+))?")


@dataclass(frozen=True)
class Stored:
    """A checkpoint. hashed: its content was compared with its manifest, not its files' lengths alone."""

    name: str
    step: int
    attempt: int
    num_bytes: int
    problems: tuple[str, ...]
    hashed: bool
    num_samples: int | None  # of the data it was trained on


def stored_checkpoints(run: Path, hash_bytes: float, hash_all: bool) -> list[Stored]:
    """Those that the run may go on from, newest first. The newest is hashed up to so many bytes."""
    lineage = attempts.lineage(run)
    found = []
    for path in _folders(run / FOLDER):
        name = _NAME.fullmatch(path.name)
        if name and lineage.allows(int(name[2] or 1), int(name[1])):
            found.append((int(name[1]), int(name[2] or 1), path))
    found.sort(reverse=True)
    return [
        _look_at(path, step, attempt, hash_all or (place == 0 and _size(path) <= hash_bytes))
        for place, (step, attempt, path) in enumerate(found)
    ]


def half_written(run: Path) -> list[str]:
    """Names of what a writer has not finished, or did not live to finish."""
    return sorted(path.name for path in _folders(run / FOLDER) if path.name.startswith(".writing-"))


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0


def _look_at(folder: Path, step: int, attempt: int, hashes: bool) -> Stored:
    return Stored(
        folder.name,
        step,
        attempt,
        _size(folder),
        tuple(_problems(folder, step, attempt, hashes)),
        hashes,
        _num_samples(folder),
    )


def _problems(folder: Path, step: int, attempt: int, hashes: bool) -> list[str]:
    """In the words of `pretrain.checkpoint.verify`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = {str(name): str(digest) for name, digest in manifest["files"].items()}
        held = int(manifest["step"]), int(manifest.get("attempt", 1))
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is not readable"]
    problems = []
    for name, digest in files.items():
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif not _has_its_length(path):
                problems.append(f"{name} is cut short")
            elif hashes and _sha256(path) != digest:
                problems.append(f"{name} is damaged (sha256 differs)")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    for name in PARTS:
        if name not in files and (name != TEACHER or (folder / name).exists()):
            problems.append(f"{name} is not listed")
    if not problems and TEACHER not in files and _has_teacher(folder):
        problems.append(f"{TEACHER} is missing, and its run has a teacher")
    if held[0] != step:
        problems.append(f"holds step {held[0]}")
    if held[1] != attempt:
        problems.append(f"was written by attempt {held[1]}")
    return problems


def _has_teacher(folder: Path) -> bool:
    try:
        settings = yaml.safe_load((folder / CONFIG).read_bytes())
    except (OSError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and settings.get("teacher") is not None


def _has_its_length(path: Path) -> bool:
    """Whether a file of tensors is as long as its own header says; others are not asked."""
    if path.suffix != ".safetensors":
        return True
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            return False
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
            return bool(size == 8 + length + max(ends, default=0))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _num_samples(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / STATE).read_bytes())["num_samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
