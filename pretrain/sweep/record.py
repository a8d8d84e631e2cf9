"""Results of a study to keep: a file for each finished run, complete, small, without paths of the machine."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from pretrain.sweep.runs import (
    COST,
    DONE,
    PROGRESS,
    Run,
    Sweep,
    asked,
    counted_costs,
    differences,
    is_done,
    read_json,
    told_in_short,
    write_json,
    write_text,
)

logger = logging.getLogger("pretrain")

MAX_POINTS = 60  # of a curve
MAX_ITEMS = 8  # of a list in a result: a table reads numbers by their names, so longer ones are left out
DIGITS = 6
WHOLE_CURVES = ("total", "knn_top1_ratio")
CURVES = ("loss/", "weight/", "gradient_cosine/", "gradient_norm/")  # and those of each task

# /a/b in a text, where a path can begin; not what follows a host or a bucket
_ABSOLUTE = re.compile(r"(?<![\w/.~-])(?:file://)?/(?:[^/\s:,'\"=\]}]+/)*([^/\s:,'\"=\]}]+)/?")


def about_run(run: Run) -> dict[str, Any]:
    """What a run's folder says of how it went; `uncommitted`: the code had changes that are in no commit."""
    environment = read_json(run.folder / "environment.json") or {}
    python = {"python": environment["python"]} if "python" in environment else {}
    return {
        "uncommitted": environment.get("uncommitted"),
        "versions": {**python, **environment.get("packages", {})},
        "threads": environment.get("threads"),
        "curves": curves_of(metric_records(run.folder), list(run.config.tasks.enabled())),
    }


def metric_records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curves_of(records: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Losses, weights, agreement of gradients and metrics of the tasks over the steps, thinned.

    records: of metrics.jsonl, in their order. What was not logged or not finite at a step is left out there.
    """
    series: dict[str, dict[int, float]] = {}
    prefixes = (*CURVES, *(f"{task}/" for task in tasks))
    for record in records:
        for name, value in record.items():
            is_wanted = name in WHOLE_CURVES or name.startswith(prefixes)
            if is_wanted and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, {})[record["step"]] = rounded(value)
    found: dict[str, dict[str, list[Any]]] = {}
    for name, values in series.items():
        steps = thinned(list(values))
        if len(set(values.values())) == 1:  # a straight line
            steps = [steps[0], *steps[1:][-1:]]
        found[name] = {"steps": steps, "values": [values[step] for step in steps]}
    return found


def thinned(steps: Sequence[int]) -> list[int]:
    """At most MAX_POINTS of them, evenly spread, the first and the last always."""
    if len(steps) <= MAX_POINTS:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (MAX_POINTS - 1))] for place in range(MAX_POINTS)]


def rounded(value: float) -> float:
    """To DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def portable(value: Any, here: Path | None = None) -> Any:
    """The same without absolute paths: relative to `here` (the working directory), else the bare name."""
    root = f"{here or Path.cwd()}/"
    if isinstance(value, Mapping):
        return {portable(name, here): portable(one, here) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(one, here) for one in value]
    if not isinstance(value, str):
        return value
    text = value.replace(root, "")
    if text == root[:-1]:
        return "."
    if text.startswith("/") and "\n" not in text:
        return PurePath(text).name
    return _ABSOLUTE.sub(r"\1", text)


def command_of(sweep: Sweep) -> str:
    """What was typed, but for where its output went."""
    ranks = [] if sweep.num_processes is None else ["--nproc", str(sweep.num_processes)]
    skipped = [word for name in sweep.skip for word in ("--skip", name)]
    return shlex.join(portable(["pretrain", "sweep", str(sweep.path), *sweep.overrides, *skipped, *ranks]))


def record_of(sweep: Sweep, run: Run, done: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the record of a finished run. done: its done.json, also one of an earlier version."""
    if "curves" not in done:
        done = {**about_run(run), **done}
    read_outs = {
        name: {**left, "result": _without_long_lists(left["result"])}
        for name, left in done["read_outs"].items()
    }
    metrics = {
        name: rounded(value) if isinstance(value, float) and abs(value) < 10**DIGITS else value
        for name, value in done["metrics"].items()
        if not name.endswith("unix_time")
    }
    base = os.path.normpath(sweep.base_of(run.variant))
    about = {
        "study": sweep.path.stem,
        "budget": "flops" if sweep.study.cost == "flops" else sweep.study.budget,
        "command": command_of(sweep),
        "base": base,
    }
    ended = done.get("unix_time")
    date = None if ended is None else datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    left = {name: value for name, value in done.items() if name != "unix_time"}
    curves = left.pop("curves")  # the longest comes last
    found = {**about, "date": date, **left, "metrics": metrics, "read_outs": read_outs, "curves": curves}
    return {name: portable(value) for name, value in found.items()}


def _without_long_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: _without_long_lists(one) for name, one in value.items()}
        return {name: one for name, one in kept.items() if not (isinstance(one, list) and _is_long(one))}
    if isinstance(value, list) and not _is_long(value):
        return [_without_long_lists(one) for one in value]
    return value


def _is_long(value: Sequence[Any]) -> bool:
    return len(value) > MAX_ITEMS


def write_records(sweep: Sweep, runs: Sequence[Run]) -> None:
    """The study and the record of every finished run, under `sweep.results`, each complete or not at all."""
    if sweep.results is None:
        return
    folder = sweep.results / sweep.path.stem
    study = portable(sweep.path.read_text())
    _write(folder / "study.yaml", f"# As run: {command_of(sweep)}\n{study}")
    costs = _costs(sweep)
    if costs:
        _write(folder / COST, _as_text(portable(costs)))
    for run in runs:
        done = read_json(run.folder / DONE) if is_done(run) else None
        if done is None or "date" in done:  # which one that was taken over has
            continue
        path = _path_of(sweep.results, sweep, run)
        kept = _read_record(path)
        if kept is None or not _says_more(kept, run, done):
            _write(path, _as_text(record_of(sweep, run, done)))


def take_over(sweep: Sweep, runs: Sequence[Run]) -> None:
    """Runs that `sweep.results` has a record of, made elsewhere with the same settings, are not run again.

    A record that cannot take the place of its run is told: the run that is to come replaces it.
    """
    if sweep.results is None:
        return
    taken = []
    for run in runs:
        path = _path_of(sweep.results, sweep, run)
        if (run.folder / PROGRESS).exists() or is_done(run):
            continue
        known = read_json(run.folder / DONE)
        record = _read_record(path)
        if record is None or record == known or (known is not None and "date" not in known):  # ran here
            continue
        if record.get("config_hash") != run.config_hash:
            found = differences(record.get("config", {}), portable(run.settings))
            logger.warning(
                "%s: was made with other settings (%s); %s is run again, and replaces it",
                path,
                told_in_short(found) or "folders of other names",
                run.name,
            )
            continue
        write_json(run.folder / DONE, record)
        if is_done(run):
            taken.append(run.name)
        else:
            lacking = _lacking(record, run)
            logger.warning(
                "%s: has no read-out %s as the study asks for it; for that %s is run again, and replaces it "
                "(--skip does without a read-out)",
                path,
                ", ".join(lacking),
                run.name,
            )
    if taken:
        logger.info("%d runs taken over from %s", len(taken), sweep.results / sweep.path.stem)


def has_record(sweep: Sweep, run: Run) -> bool:
    """Whether `take_over` would let a record take the place of this run."""
    if sweep.results is None:
        return False
    record = _read_record(_path_of(sweep.results, sweep, run))
    return record is not None and record.get("config_hash") == run.config_hash and not _lacking(record, run)


def _path_of(results: Path, sweep: Sweep, run: Run) -> Path:
    return results / sweep.path.stem / run.variant / f"seed-{run.seed}.json"


def _read_record(path: Path) -> dict[str, Any] | None:
    return read_json(path, f"remove {path} to run it again")


def _lacking(record: Mapping[str, Any], run: Run) -> list[str]:
    """Read-outs that a record does not have as the study asks for them."""
    found = record["read_outs"]
    return [one.name for one in run.read_outs if found.get(one.name, {}).get("asked") != asked(run, one)]


def _says_more(record: Mapping[str, Any], run: Run, done: Mapping[str, Any]) -> bool:
    """Whether a record of the same run, as of another machine, has read-outs that were skipped here."""
    is_same = record.get("config_hash") == run.config_hash and not _lacking(record, run)
    return is_same and set(record["read_outs"]) > set(done["read_outs"])


def _costs(sweep: Sweep) -> dict[str, Any]:
    """What a step of each variant costs, as counted, given or measured."""
    given = sweep.study.cost
    if given == "flops":
        return {name: {"flops_per_image": flops} for name, flops in counted_costs(sweep).items()}
    if given:
        return {name: {"seconds_per_step": seconds, "is_given": True} for name, seconds in given.items()}
    return (read_json(sweep.folder / COST) or {}) if sweep.study.budget == "compute" else {}


def _as_text(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, and for each curve: small, and differences can be read."""
    lines = []
    for name, value in content.items():
        if name == "curves" and value:
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
            lines.append(f' "curves": {{\n{inner}\n }}')
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write(path: Path, text: str) -> None:
    """Complete or not at all; a file that holds the same already is left alone."""
    if path.exists() and path.read_text() == text:
        return
    write_text(path, text)
