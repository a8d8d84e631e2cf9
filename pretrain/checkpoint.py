"""Checkpoints: one folder each, complete or absent, every file hashed, no pickles.

checkpoints/step-00001000/
    engine/optimizer.safetensors   optimizer state by parameter name, in the layout of the whole model
    weights/student.safetensors    fp32; timm's names below `backbone.`
    weights/teacher.safetensors    if the run has a teacher
    state.json  config.yaml        where the run stood, and its settings
    MANIFEST.json                  sha256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.errors import CheckpointError

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
OPTIMIZER = "engine/optimizer.safetensors"
STUDENT = "weights/student.safetensors"
TEACHER = "weights/teacher.safetensors"
STATE = "state.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, read back."""

    folder: Path
    state: dict[str, Any]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]


def step_folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _is_step_folder(path: Path) -> bool:
    return path.name.startswith("step-") and path.name[5:].isdecimal() and path.is_dir()


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, newest first. Not yet verified."""
    found = [path for path in (run / FOLDER).glob("step-*") if _is_step_folder(path)]
    return sorted(found, key=step_of, reverse=True)


def sweep(run: Path) -> list[Path]:
    """Remove what a killed writer left half-made; returns what was removed."""
    left = [*(run / FOLDER).glob(".writing-*"), *(run / FOLDER).glob(".removing-*")]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def write_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config_yaml: str,
) -> Path:
    """Write all files into a temporary folder, make them durable, then rename it into place.

    tensors: file name inside the checkpoint -> named tensors. Called on one rank.
    """
    final = step_folder(run, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    writing = final.parent / f".writing-{final.name}-{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        hashes = {}
        for name, values in tensors.items():
            path = writing / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file({key: value.contiguous() for key, value in values.items()}, path)
            except SafetensorError as error:  # what the library makes of a full disk
                raise OSError(f"{path}: {error}") from error
            hashes[name] = _make_durable(path)
        for name, text in ((STATE, json.dumps(state, indent=1, sort_keys=True)), (CONFIG, config_yaml)):
            (writing / name).write_text(text)
            hashes[name] = _make_durable(writing / name)
        (writing / MANIFEST).write_text(json.dumps({"step": step, "files": hashes}, indent=1))
        _make_durable(writing / MANIFEST)
        for folder in (*{(writing / name).parent for name in tensors}, writing):
            _sync_folder(folder)
        if final.exists():  # an earlier attempt at the same step, replaced as a whole
            remove_checkpoint(final)
        writing.rename(final)
        _sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    return final


def remove_checkpoint(folder: Path) -> None:
    """Rename first, so that a kill in between leaves no half of a checkpoint under its name."""
    doomed = folder.parent / f".removing-{folder.name}-{os.getpid()}"
    folder.rename(doomed)
    shutil.rmtree(doomed)


def prune(run: Path, keep_last: int, keep_every_steps: int | None) -> None:
    """Remove all but the newest `keep_last` and, if given, the milestones; the newest always stays."""
    for folder in list_checkpoints(run)[max(1, keep_last) :]:
        if keep_every_steps and step_of(folder) % keep_every_steps == 0:
            continue
        remove_checkpoint(folder)


def set_aside(run: Path, after_step: int) -> list[Path]:
    """Rename the checkpoints beyond a step that a run goes back to, so that none is taken for its own."""
    moved = []
    for folder in list_checkpoints(run):
        if step_of(folder) > after_step:
            aside = folder.with_name(f"aside-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(folder.rename(aside))
    return moved


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: nothing, if it is whole. Hashes come before any parsing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, str] = dict(manifest["files"].items())
        step = int(manifest["step"])
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is not readable"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif _sha256(path) != expected:
                problems.append(f"{name} is damaged (sha256 differs)")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    for name in (STUDENT, TEACHER, OPTIMIZER, STATE, CONFIG):
        if name not in files and (name != TEACHER or (folder / name).exists()):
            problems.append(f"{name} is not listed")
    if _is_step_folder(folder) and step_of(folder) != step:
        problems.append(f"holds step {step}")
    return problems


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    rejected: list[str] = []
    for folder in list_checkpoints(run):
        problems = verify(folder)
        if not problems:
            return folder, rejected
        rejected.append(f"{folder}: {'; '.join(problems)}")
    return None, rejected


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint that was verified just before."""
    teacher = folder / TEACHER
    return Checkpoint(
        folder,
        json.loads((folder / STATE).read_text()),
        load_file(folder / STUDENT),
        load_file(teacher) if teacher.exists() else None,
        load_file(folder / OPTIMIZER),
    )


def check_identity(
    folder: Path,
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    data_keys: Collection[str] = (),
    may_differ: bool = False,
) -> bool:
    """Refuse to continue a run whose data or model settings have changed; names what differs.

    Those under `data_keys` alone may differ if the user has said so; tells whether they do.
    """
    of_data = _differences(
        {key: found.get(key) for key in data_keys}, {key: wanted.get(key) for key in data_keys}
    )
    differing = [line for line in _differences(found, wanted) if not may_differ or line not in of_data]
    if differing:
        shown = "; ".join(differing)
        if len(shown) > 400:
            shown = shown[:400] + " ..."
        raise CheckpointError(
            f"{folder}: written by a run with other settings ({shown}); "
            + ("" if len(of_data) < len(differing) else "--allow-new-data goes on with the new data; ")
            + "restore them, or start anew with another --output-dir"
        )
    return bool(of_data)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    """`key: was x, now y` for every setting that differs, down to the innermost."""
    lines = []
    for key in dict.fromkeys((*wanted, *(found if where else ()))):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += _differences(old, new, f"{where}{key}.")
        elif old != new:
            lines.append(f"{where}{key}: was {old!r}, now {new!r}")
    return lines


def _make_durable(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
