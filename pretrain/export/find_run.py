"""The run that is meant when none is named: the newest finished one, else the newest."""

from __future__ import annotations

from pathlib import Path

from pretrain.attempts import last_outcome
from pretrain.checkpoint import list_checkpoints
from pretrain.errors import UserError
from pretrain.export.source import is_checkpoint

RUNS = Path("runs")
DEPTH = 3  # folders below RUNS that are looked at: a study's runs lie two deep


def newest_run(runs: Path = RUNS) -> tuple[Path, str]:
    """A run with a checkpoint, and in a few words why it was chosen."""
    found = [(last_outcome(run) == "done", _age(run), run) for run in _below(runs, DEPTH)]
    if not found:
        raise UserError(f"{runs}: no run with a checkpoint below it; name one: pretrain export RUN")
    finished, _, run = max(found)
    kind = "finished one" if finished else "one, none has finished"
    return run, f"the newest {kind} of {len(found)} below {runs}" if len(found) > 1 else f"below {runs}"


def _below(folder: Path, depth: int) -> list[Path]:
    if not folder.is_dir() or depth < 0 or is_checkpoint(folder):
        return []
    if (folder / "checkpoints").is_dir():
        return [folder] if list_checkpoints(folder) else []
    return [run for inner in sorted(folder.iterdir()) for run in _below(inner, depth - 1)]


def _age(run: Path) -> float:
    """When its newest checkpoint was written, by the clock of the file system."""
    return list_checkpoints(run)[0].stat().st_mtime
