"""Everything a run folder says, read once and read leniently: any part may be missing or half-written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter

from pretrain import attempts
from pretrain.attempts import Record
from pretrain.doctor import thresholds
from pretrain.doctor.stored import FOLDER as CHECKPOINTS
from pretrain.doctor.stored import Stored, half_written, stored_checkpoints
from pretrain.errors import UserError

State = Literal["running", "done", "preempted", "failed", "killed", "silent", "unknown"]

CONFIG, METRICS, LOG = "config.yaml", "metrics.jsonl", "train.log"
ANOMALIES, QUARANTINE, ROLLBACKS = "anomalies.jsonl", "quarantine.jsonl", "rollbacks.json"
HEALTH, EXPORTED = "health", "exported"
MAX_BYTES = 64 << 20  # of one file: of a longer one the first and the last part are read
HEAD_BYTES = 2 << 20

_RECORD = TypeAdapter(Record)
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (.*)")
_FIRST_LINE = re.compile(r"\d+ nodes? x \d+ ranks on ")  # of what each start says of itself
_STEP_LINE = re.compile(r"step \d+/(\d+) \|")


@dataclass(frozen=True)
class Start:
    """An attempt of the run; record is None where its file is damaged."""

    number: int
    record: Record | None


@dataclass(frozen=True)
class RunFiles:
    """What was read.

    records: of metrics.jsonl. log: the messages of the newest start. hangs: start -> the watchdog's verdict.
    silent_seconds: since the last sign of life. pause_seconds: between the last log line and the last sign of
    life, both by the clock of the folder's storage. unreadable: parts that are there and say nothing.
    """

    run: Path
    state: State
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    anomalies: Sequence[Mapping[str, Any]]
    quarantined: Sequence[Mapping[str, Any]]
    log: Sequence[str]
    whole_log: Sequence[str]
    starts: Sequence[Start]
    hangs: Mapping[int, str]
    checkpoints: Sequence[Stored]
    half_written: Sequence[str]
    num_rollbacks: int
    has_export: bool
    free_bytes: int | None
    silent_seconds: float | None
    pause_seconds: float | None
    missing: Sequence[str]
    unreadable: Sequence[str]

    def setting(self, name: str, default: Any = None) -> Any:
        """One setting of config.yaml by its dotted name."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, Mapping) or value.get(part) is None:
                return default
            value = value[part]
        return value

    @property
    def newest(self) -> Start | None:
        return self.starts[-1] if self.starts else None

    @property
    def step(self) -> int:
        """The last step that anything here tells of."""
        ended = [start.record.step for start in self.starts[-1:] if start.record and start.record.step]
        logged = [int(record["step"]) for record in self.records[-1:]]
        return max([*ended, *logged, *(stored.step for stored in self.checkpoints[:1])], default=0)

    @property
    def num_steps(self) -> int | None:
        """Of the whole run, as far as it is known."""
        for line in reversed(self.log):
            found = _STEP_LINE.match(line)
            if found:
                return int(found[1])
        steps = self.setting("schedule.steps")
        return int(steps) if steps else None


def read_run(run: Path, hash_all: bool = False) -> RunFiles:
    """Read a run folder; a UserError says why it is none."""
    _check_is_run(run)
    unreadable: list[str] = []
    config = _settings(run / CONFIG, unreadable)
    records = [record for record in _json_lines(run / METRICS, unreadable) if _is_number(record.get("step"))]
    whole_log = _messages(run / LOG, unreadable)
    starts = _starts(run, unreadable)
    first = max((place for place, line in enumerate(whole_log) if _FIRST_LINE.match(line)), default=0)
    state, silent_seconds = _state(run, starts)
    names = (CONFIG, METRICS, LOG, attempts.FOLDER, CHECKPOINTS)
    return RunFiles(
        run,
        state,
        config,
        records,
        list(_json_lines(run / ANOMALIES, unreadable)),
        list(_json_lines(run / QUARANTINE, unreadable)),
        whole_log[first:],
        whole_log,
        starts,
        _hangs(run),
        stored_checkpoints(run, thresholds.HASHED_BYTES, hash_all),
        half_written(run),
        _num_rollbacks(run / ROLLBACKS),
        (run / EXPORTED).is_dir() and any((run / EXPORTED).iterdir()),
        _free_bytes(run),
        silent_seconds,
        _pause_seconds(run, starts),
        [name for name in names if not (run / name).exists()],
        unreadable,
    )


def _check_is_run(run: Path) -> None:
    if not run.exists():
        raise UserError(f"{run}: is not there; give the folder of a run (--output-dir of `pretrain train`)")
    if not run.is_dir():
        raise UserError(f"{run}: is a file; give the folder of the run that it belongs to")
    if _looks_like_run(run):
        return
    inside = sorted(path.name for path in run.iterdir() if path.is_dir() and _looks_like_run(path))
    if inside:
        such = f"it holds {len(inside)} run{'s' * (len(inside) > 1)}, such as {run / inside[0]}"
    else:
        such = f"it has none of {METRICS}, {LOG} and {attempts.FOLDER}/"
    raise UserError(f"{run}: is no run folder: {such}; give the folder of one run")


def _looks_like_run(folder: Path) -> bool:
    try:
        return any((folder / name).exists() for name in (METRICS, LOG, attempts.FOLDER))
    except PermissionError:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _content(path: Path, unreadable: list[str]) -> str:
    """A file's text, without the middle of a very long one; "" where there is none."""
    try:
        if not path.exists():
            return ""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= MAX_BYTES:
                return file.read().decode(errors="replace")
            head = file.read(HEAD_BYTES)
            file.seek(size - (MAX_BYTES - HEAD_BYTES))
            return (head + b"\n" + file.read()).decode(errors="replace")
    except OSError as error:
        unreadable.append(f"{path.name}: {error.strerror}")
        return ""


def _settings(path: Path, unreadable: list[str]) -> Mapping[str, Any]:
    text = _content(path, unreadable)
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        found = "damaged"
    if isinstance(found, Mapping):
        return found
    if text:
        unreadable.append(f"{path.name}: holds no settings")
    return {}


def _json_lines(path: Path, unreadable: list[str]) -> list[Mapping[str, Any]]:
    """The objects of a file. A last line that is cut short is, or was, being written."""
    lines = _content(path, unreadable).split("\n")
    found, num_bad = [], 0
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, Mapping):
                found.append(value)
                continue
        num_bad += number < len(lines) - 1
    if num_bad:
        unreadable.append(f"{path.name}: {num_bad} of {len(found) + num_bad} lines are no JSON")
    return found


def _messages(path: Path, unreadable: list[str]) -> list[str]:
    """The lines of train.log without their times."""
    lines = _content(path, unreadable).splitlines()
    return [found[1] if (found := _LOG_LINE.fullmatch(line)) else line for line in lines]


def _starts(run: Path, unreadable: list[str]) -> list[Start]:
    """Every attempt, in the order of their numbers."""
    starts = []
    with contextlib.suppress(OSError):
        for path in (run / attempts.FOLDER).iterdir():
            if not path.stem.isdecimal() or path.suffix != ".json":
                continue
            record = None
            with contextlib.suppress(OSError, ValueError):
                record = _RECORD.validate_json(path.read_bytes(), strict=True)
            if record is None:
                unreadable.append(f"{attempts.FOLDER}/{path.name}: is damaged")
            starts.append(Start(int(path.stem), record))
    return sorted(starts, key=lambda start: start.number)


def _state(run: Path, starts: Sequence[Start]) -> tuple[State, float | None]:
    """What the newest start does or how it ended, and the seconds since its last sign of life."""
    if not starts or starts[-1].record is None:
        return "unknown", None
    record = starts[-1].record
    silent = _seconds_since(run / attempts.FOLDER / f"{starts[-1].number:04d}.beat")
    if record.outcome is not None:
        return record.outcome, silent
    if attempts.is_over(run, starts[-1].number):
        return "killed", silent
    if _is_here(record) or (silent is not None and silent <= thresholds.BEAT_SECONDS):
        return "running", silent
    return "silent", silent


def _is_here(record: Record) -> bool:
    """Whether it runs, or ran, on this machine since its last boot."""
    own, owner = attempts.this_process(), record.owner
    here = (own.host, own.boot_id, own.pid_namespace)
    return bool(own.boot_id) and (owner.host, owner.boot_id, owner.pid_namespace) == here


def _seconds_since(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _pause_seconds(run: Path, starts: Sequence[Start]) -> float | None:
    if not starts:
        return None
    beat = run / attempts.FOLDER / f"{starts[-1].number:04d}.beat"
    try:
        return beat.stat().st_mtime - max((run / name).stat().st_mtime for name in (METRICS, LOG))
    except OSError:
        return None


def _hangs(run: Path) -> dict[int, str]:
    found = {}
    for path in (run / HEALTH).glob("attempt-*/verdict.txt"):
        with contextlib.suppress(OSError, ValueError):
            found[int(path.parent.name.removeprefix("attempt-"))] = path.read_text(errors="replace").strip()
    return found


def _num_rollbacks(path: Path) -> int:
    try:
        return int(json.loads(path.read_bytes())["rollbacks"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _free_bytes(run: Path) -> int | None:
    try:
        disk = os.statvfs(run)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize
