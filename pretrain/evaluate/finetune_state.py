"""Where a fine-tuning stands: one folder, complete or absent, every file hashed, no pickles.

FOLDER/epoch-00003/         or step-00003, by the unit that is counted
    model.safetensors       the network, in its own names
    optimizer.safetensors   what the optimizer keeps for each parameter, by name
    state.json              epoch, history, what the run is (`identity`), sha256 of the other files
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.errors import CheckpointError, UserError
from pretrain.export.source import sha256_of
from pretrain.optim import Optimizer

Unit = Literal["epoch", "step"]

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class FinetuneState:
    """What a folder holds, read back."""

    epoch: int  # epochs, or steps, done
    history: list[dict[str, Any]]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def write_state(
    folder: Path,
    epoch: int,
    history: list[dict[str, Any]],
    identity: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    unit: Unit = "epoch",
) -> None:
    """Write, make durable, rename into place; then remove the state before. Called by one process."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{unit}-{epoch:05d}"
    writing = folder / f".writing-{final.name}-{os.getpid()}"
    writing.mkdir()
    try:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, writing / MODEL)
        save_file(_moments(model, optimizer), writing / OPTIMIZER)
        state = {
            unit: epoch,
            "history": history,
            "identity": identity,
            "files": {name: sha256_of(writing / name) for name in (MODEL, OPTIMIZER)},
        }
        (writing / STATE).write_text(json.dumps(state, indent=1) + "\n")
        for name in (MODEL, OPTIMIZER, STATE):
            with (writing / name).open("rb") as file:
                os.fsync(file.fileno())
        writing.rename(final)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    for older in _states(folder, unit):
        if older != final:
            shutil.rmtree(older)


def read_state(
    folder: Path, identity: Mapping[str, Any], resume: bool, unit: Unit = "epoch"
) -> FinetuneState | None:
    """The newest state of a folder, None if it has none; an error if it may not be continued."""
    states = _states(folder, unit)
    if not states:
        return None
    if not resume:
        raise UserError(f"{folder}: holds a fine-tuning; continue it with --resume, or remove the folder")
    newest = states[-1]
    try:
        state = json.loads((newest / STATE).read_text())
        damaged = [name for name, sha256 in state["files"].items() if sha256_of(newest / name) != sha256]
        found = state["identity"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{newest}: cannot be read ({error}); remove it to start anew") from error
    if damaged:
        raise CheckpointError(
            f"{newest / damaged[0]}: damaged (sha256 differs); remove its folder to start anew"
        )
    wanted = json.loads(json.dumps(identity))
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        key = changed[0]
        told = _first_difference(found.get(key), wanted[key], key)
        raise CheckpointError(f"{newest}: of a fine-tuning with other settings ({told}); use another --out")
    return FinetuneState(
        state[unit], state["history"], load_file(newest / MODEL), load_file(newest / OPTIMIZER)
    )


def restore(state: FinetuneState, model: nn.Module, optimizer: Optimizer, num_steps: int) -> None:
    """Put weights and moments where they were. num_steps: optimizer steps taken so far."""
    model.load_state_dict(state.model)
    for name, parameter in _stepped(model):
        moments = optimizer.state_for(parameter)
        if "step" in moments:  # of AdamW
            moments["step"].fill_(num_steps)
        for key in optimizer.state_keys:
            moments[key].copy_(state.optimizer[f"{name}/{key}"])


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": optimizer.state_for(parameter)[key].contiguous()
        for name, parameter in _stepped(model)
        for key in optimizer.state_keys
    }


def _stepped(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def _states(folder: Path, unit: Unit) -> list[Path]:
    return sorted(
        (path for path in folder.glob(f"{unit}-*") if path.is_dir()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )


def _first_difference(found: Any, wanted: Any, where: str) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in wanted:
            if found.get(key) != wanted[key]:
                return _first_difference(found.get(key), wanted[key], f"{where}.{key}")
    return f"{where}: was {found!r}, now {wanted!r}"
