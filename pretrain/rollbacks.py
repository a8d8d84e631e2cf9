"""How often a run went back, and which data it passes over since: a file beside its checkpoints.

The checkpoint that a run goes back to knows nothing of it.
"""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.checkpoint import Checkpoint
from pretrain.errors import CheckpointError
from pretrain.passed_over import PassedOver, passed_over_from_json

FILE = "rollbacks.json"


def read_rollbacks(run_dir: Path, saved: Checkpoint | None, data_start_step: int) -> tuple[int, PassedOver]:
    """How often this run went back, and the data it passes over since; those of other data do not count."""
    num_rollbacks, passed_over = 0, PassedOver()
    if saved is not None and saved.state.get("data_start_step", 0) == data_start_step:
        passed_over = passed_over_from_json(saved.state.get("passed_over"))
    path = run_dir / FILE
    if not path.exists():
        return num_rollbacks, passed_over
    try:
        noted = json.loads(path.read_text())
        num_rollbacks = int(noted["rollbacks"])
        if noted["data_start_step"] == data_start_step:
            passed_over = passed_over_from_json(noted["passed_over"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: is damaged; remove it to pass over nothing") from None
    return num_rollbacks, passed_over


def write_rollbacks(run_dir: Path, num: int, passed_over: PassedOver, data_start_step: int) -> None:
    """Raises OSError where the run folder cannot be written."""
    noted = {"rollbacks": num, "passed_over": passed_over.to_json(), "data_start_step": data_start_step}
    path = run_dir / FILE
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(noted))
    new.replace(path)
