"""Checkpoints: one folder each, complete or absent, every file hashed, no pickles.

checkpoints/step-00001000/         step-00001000.2 from the second attempt of the run, and so on
    engine/optimizer.safetensors   optimizer state by parameter name, in the layout of the whole model
    weights/student.safetensors    fp32; timm's names below `backbone.`
    weights/teacher.safetensors    if the run has a teacher
    state.json  config.yaml        where the run stood, and its settings
    MANIFEST.json                  step, attempt, and the sha256 of every other file

What an attempt writes carries its number, so that none can overwrite what another wrote; those of a stale
attempt, which wrote on after another had taken over, are not listed (attempts.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain import attempts
from pretrain.errors import CheckpointError

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
OPTIMIZER = "engine/optimizer.safetensors"
STUDENT = "weights/student.safetensors"
TEACHER = "weights/teacher.safetensors"
STATE = "state.json"
CONFIG = "config.yaml"
ASIDE = "aside-"  # before the name of a checkpoint that does not lead to where the run stands

_POSITION = r"step-(?P<step>[0-9]+)(?:\.(?P<attempt>[2-9]|[1-9][0-9]+))?"
_NAME = re.compile(_POSITION)
_IN_NAME = re.compile(_POSITION + r"(?![0-9.])")  # of .writing-step-00001000.2-4711, aside-step-00001000


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, read back."""

    folder: Path
    state: dict[str, Any]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]


def step_folder(run: Path, step: int, attempt: int = 1) -> Path:
    return run / FOLDER / (f"step-{step:08d}" + (f".{attempt}" if attempt > 1 else ""))


def step_of(folder: Path) -> int:
    return _position(folder.name)[0]


def attempt_of(folder: Path) -> int:
    return _position(folder.name)[1]


def _position(name: str) -> tuple[int, int]:
    """Step and attempt of a checkpoint by its folder's name; they sort in the order they were reached."""
    found = _NAME.fullmatch(name)
    if not found:
        raise ValueError(f"{name}: is not the name of a checkpoint")
    return int(found["step"]), int(found["attempt"] or 1)


def _is_step_folder(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None and path.is_dir()


def list_checkpoints(run: Path, all_attempts: bool = False) -> list[Path]:
    """Complete checkpoints that the newest attempt of a run may go on from, newest first. Not yet verified.

    all_attempts: also those that stale attempts left.
    """
    lineage = attempts.lineage(run)
    found = [path for path in (run / FOLDER).glob("step-*") if _is_step_folder(path)]
    allowed = [path for path in found if all_attempts or lineage.allows(attempt_of(path), step_of(path))]
    return sorted(allowed, key=lambda path: _position(path.name), reverse=True)


def newest_attempt(run: Path) -> int:
    """The highest number of an attempt that any folder here carries, whole or not; 0 if there is none."""
    found = [_IN_NAME.search(path.name) for path in (run / FOLDER).glob("*step-*")]
    return max((int(name["attempt"] or 1) for name in found if name), default=0)


def sweep(run: Path) -> list[Path]:
    """Remove what a killed writer left half-made; returns what was removed.

    A folder that the newest attempt may still be writing or removing is left to it.
    """
    removed = []
    for path in (*(run / FOLDER).glob(".writing-*"), *(run / FOLDER).glob(".removing-*")):
        found = _IN_NAME.search(path.name)
        number = int(found["attempt"] or 1) if found else 1
        if (run / attempts.FOLDER).exists() and not attempts.is_over(run, number):
            continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def write_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config_yaml: str,
    attempt: int = 1,
) -> Path:
    """Write all files into a temporary folder, make them durable, then rename it into place.

    tensors: file name inside the checkpoint -> named tensors. Called on one rank. Raises FencedError, and
    leaves nothing, if a newer attempt of the run has begun.
    """
    attempts.refuse_stale(run, attempt)
    final = step_folder(run, step, attempt)
    # nowhere `parents=True`: where the run folder is away, so is its disk, and it must not be made anew below
    final.parent.mkdir(exist_ok=True)
    writing = final.parent / f".writing-{final.name}-{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir()
        hashes = {}
        for name, values in tensors.items():
            path = writing / name
            path.parent.mkdir(exist_ok=True)
            try:
                save_file({key: value.contiguous() for key, value in values.items()}, path)
            except SafetensorError as error:  # what the library makes of a full disk
                raise OSError(f"{path}: {error}") from error
            hashes[name] = _make_durable(path)
        for name, text in ((STATE, json.dumps(state, indent=1, sort_keys=True)), (CONFIG, config_yaml)):
            (writing / name).write_text(text)
            hashes[name] = _make_durable(writing / name)
        (writing / MANIFEST).write_text(
            json.dumps({"step": step, "attempt": attempt, "files": hashes}, indent=1)
        )
        _make_durable(writing / MANIFEST)
        for folder in (*{(writing / name).parent for name in tensors}, writing):
            _sync_folder(folder)
        attempts.refuse_stale(run, attempt)  # once more: writing may have taken minutes
        if final.exists():  # this attempt went back and came to the step again; replaced as a whole
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
    with suppress(FileNotFoundError):  # a newer attempt sweeps it at the same time
        shutil.rmtree(doomed)


def prune(run: Path, keep_last: int, keep_every_steps: int | None, keep: Collection[Path] = ()) -> list[Path]:
    """Remove all but the newest `keep_last`, the milestones and those in `keep`; returns what was removed.

    The newest that verifies always stays: the disk may have spoilt those after it. What was put aside goes
    once the run has come further than that.
    """
    listed = list_checkpoints(run)
    kept = {folder.resolve() for folder in keep}
    doomed = []
    for place, folder in enumerate(listed):
        is_milestone = bool(keep_every_steps) and step_of(folder) % (keep_every_steps or 1) == 0
        if place >= max(1, keep_last) and not is_milestone and folder.resolve() not in kept:
            doomed.append(folder)
    aside = list((run / FOLDER).glob(f"{ASIDE}step-*"))
    if doomed or aside:
        last_valid = next((folder for folder in listed if not verify(folder)), None)
        doomed = [folder for folder in doomed if folder != last_valid]
        if last_valid:
            reached = step_of(last_valid)
            doomed += [folder for folder in aside if _step_of_aside(folder) < reached]
    for folder in doomed:
        remove_checkpoint(folder)
    return doomed


def _step_of_aside(folder: Path) -> float:
    """Infinite where the name is of someone else's making."""
    found = _NAME.fullmatch(folder.name.removeprefix(ASIDE))
    return int(found["step"]) if found else math.inf


def set_aside(run: Path, after_step: int) -> list[Path]:
    """Rename the checkpoints beyond a step that a run goes back to, so that none is taken for its own.

    So are those that a stale attempt left at any step: who looks by name alone, finds what counts.
    """
    lineage = attempts.lineage(run)
    moved = []
    for folder in list_checkpoints(run, all_attempts=True):
        if step_of(folder) > after_step or not lineage.allows(attempt_of(folder), step_of(folder)):
            aside = folder.with_name(f"{ASIDE}{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(folder.rename(aside))
    return moved


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: nothing, if it is whole. Hashes come before any parsing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, str] = dict(manifest["files"].items())
        step, attempt = int(manifest["step"]), int(manifest.get("attempt", 1))
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
    if not problems and TEACHER not in files and _has_teacher(folder):
        problems.append(f"{TEACHER} is missing, and its run has a teacher")
    if _is_step_folder(folder) and step_of(folder) != step:
        problems.append(f"holds step {step}")
    if _is_step_folder(folder) and attempt_of(folder) != attempt:
        problems.append(f"was written by attempt {attempt}")
    return problems


def _has_teacher(folder: Path) -> bool:
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text())
    except yaml.YAMLError:  # of some other run's making; who resumes reads it again
        return False
    return isinstance(settings, dict) and settings.get("teacher") is not None


def origin(folder: Path) -> tuple[int, int]:
    """Attempt and step of a checkpoint that was verified just before, whatever its folder is called."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return int(manifest.get("attempt", 1)), int(manifest["step"])


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
    try:
        return Checkpoint(
            folder,
            json.loads((folder / STATE).read_text()),
            load_file(folder / STUDENT),
            load_file(teacher) if teacher.exists() else None,
            load_file(folder / OPTIMIZER),
        )
    except SafetensorError as error:
        raise not_safetensors(folder, error) from None


def not_safetensors(where: Path, error: SafetensorError) -> CheckpointError:
    """For a file that its manifest vouches for: someone has made it so."""
    return CheckpointError(f"{where}: is not in the format safetensors ({error}); use another checkpoint")


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
