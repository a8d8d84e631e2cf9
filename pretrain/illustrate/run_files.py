"""What a run folder holds, read so that it does no harm if the run still goes or was killed at any moment."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from pretrain import checkpoint
from pretrain.attempts import FOLDER as ATTEMPTS
from pretrain.checkpoint import Checkpoint
from pretrain.config import RunConfig, load_config
from pretrain.errors import UserError
from pretrain.oversight import ANOMALIES
from pretrain.report.curves import Record, parse_records
from pretrain.report.training import Attempt

TRIES = 3  # to read a checkpoint that a run may remove just then

logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class RunFiles:
    """A run, as far as it got."""

    folder: Path
    config: RunConfig  # of the newest checkpoint; without one, of the run folder
    records: tuple[Record, ...]
    attempts: tuple[Attempt, ...]
    command: tuple[str, ...]  # of the newest attempt
    environment: Mapping[str, Any]
    anomalies: tuple[Mapping[str, Any], ...]
    bad_samples: tuple[Mapping[str, Any], ...]
    results: Mapping[str, Mapping[str, Any]]  # of eval/ by file, of transfer/ by folder
    exports: Mapping[str, Mapping[str, Any]]  # export_report.json, by folder
    saved: Checkpoint | None
    why_not_saved: str = ""


def config_of_run(folder: Path) -> RunConfig:
    """Quick, so that wrong input is told before anything is read; a UserError says why a folder is no run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the folder of a run")
    if (folder / checkpoint.MANIFEST).is_file():
        raise UserError(
            f"{folder}: is one checkpoint; give the folder of its run, {folder.resolve().parent.parent}"
        )
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is not the folder of a run, for it has no config.yaml; give one that has")
    return load_config(folder / "config.yaml")


def open_run(folder: Path, config: RunConfig) -> RunFiles:
    """config: of `config_of_run`."""
    saved, why_not = _newest_checkpoint(folder)
    attempts, command = _attempts(folder)
    return RunFiles(
        folder=folder,
        config=load_config(saved.folder / checkpoint.CONFIG) if saved else config,
        records=tuple(parse_records(_lines(folder / "metrics.jsonl"))),
        attempts=attempts,
        command=command,
        environment=_object(folder / "environment.json") or {},
        anomalies=_objects(folder / ANOMALIES),
        bad_samples=_objects(folder / "quarantine.jsonl"),
        results=_results(folder),
        exports=_exports(folder),
        saved=saved,
        why_not_saved=why_not,
    )


def _newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, str]:
    """The newest that is whole, or None and the reason."""
    why = "the run has not written a checkpoint yet"
    for _ in range(TRIES):
        try:
            found, rejected = checkpoint.newest_valid(folder)
            for line in rejected:
                logger.warning("passed over: %s", line)
            if found is None:
                return None, f"no checkpoint of the run is whole ({'; '.join(rejected)})" if rejected else why
            return read_weights(found), ""
        except (OSError, SafetensorError) as error:  # the run prunes as it goes
            why = f"the newest checkpoint could not be read ({error})"
    return None, why


def read_weights(folder: Path) -> Checkpoint:
    """A checkpoint that was verified just before, without the optimizer's state, which is most of it."""
    teacher = folder / checkpoint.TEACHER
    return Checkpoint(
        folder,
        json.loads((folder / checkpoint.STATE).read_text()),
        load_file(folder / checkpoint.STUDENT),
        load_file(teacher) if teacher.exists() else None,
        optimizer={},
    )


def _attempts(folder: Path) -> tuple[tuple[Attempt, ...], tuple[str, ...]]:
    """Every start, in order, and the command of the last."""
    found: list[Attempt] = []
    command: tuple[str, ...] = ()
    for path in sorted((folder / ATTEMPTS).glob("[0-9]*.json")):
        record = _object(path)
        number = record.get("attempt") if record else None
        if record is None or not isinstance(number, int):
            continue
        began, about = record.get("began_from"), record.get("about")
        found.append(
            Attempt(
                number,
                str(record.get("since", "")),
                _whole(began.get("step")) if isinstance(began, dict) else None,
                str(record["outcome"]) if record.get("outcome") else None,
                _whole(record.get("step")),
            )
        )
        words = about.get("command") if isinstance(about, dict) else None
        if isinstance(words, list):
            command = tuple(str(word) for word in words)
    return tuple(sorted(found, key=lambda one: one.number)), command


def _results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Of eval/, by file, and what detectors and segmenters made of the weights, by their folder."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted((folder / "eval").glob("**/*.json")):
        result = _object(path)
        if result is not None:
            found[path.relative_to(folder / "eval").with_suffix("").as_posix()] = result
    for path in sorted((folder / "transfer").glob("**/result.json")):
        result = _object(path)
        if result is not None:
            found[path.parent.relative_to(folder).as_posix()] = result
    return found


def _exports(folder: Path) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(folder.glob("exported*/**/export_report.json")):
        report = _object(path)
        if report is not None:
            found[path.parent.relative_to(folder).as_posix()] = report
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is absent, damaged or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _objects(path: Path) -> tuple[dict[str, Any], ...]:
    """One JSON object a line; half lines are passed over."""
    found = []
    for line in _lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return tuple(found)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
