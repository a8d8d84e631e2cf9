"""What differs between the run that wrote a checkpoint and the one that continues it, and what may.

A checkpoint's state holds the *identity* of its run (`preflight.identity`): the settings that its numbers
depend on. Any other setting is safe to change, and is only told. `SETTINGS` says which each setting is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain import build, checkpoint
from pretrain.config import RunConfig
from pretrain.errors import CheckpointError, ConfigError, nearest
from pretrain.optim import build_optimizer
from pretrain.peers import ALONE

MAX_TOLD = 400  # characters of what differs
CPU = torch.device("cpu")
META = torch.device("meta")


@dataclass(frozen=True)
class Setting:
    """How a setting, and what is below it, is bound to a checkpoint."""

    seen_as: tuple[str, ...]  # keys of the identity that a change shows in; none: it is safe
    why: str  # a change that shows in none of them is safe


def _bound(*keys: str) -> Setting:
    return Setting(keys, "")


def _safe(why: str) -> Setting:
    return Setting((), why)


# every setting of a run, by the longest path that fits
SETTINGS = {
    "seed": _bound("seed"),
    "model": _bound("model"),
    "normalization": _bound("normalization"),
    "views": _bound("views", "order_of_views"),
    "tasks": _bound("tasks"),
    "balance": _bound("balance"),
    "teacher": _bound("teacher"),
    "batch.global_size": _bound("global_batch"),
    "batch.accumulation_steps": _bound("accumulation_steps"),
    "data.shards": Setting(("manifest_hash",), "a copy elsewhere is the same data if its hash is"),
    "data.sources": Setting(("manifest_hash", "weights", "split"), "a copy elsewhere is the same data"),
    "data.split": _bound("split"),
    "data.lanes": _bound("lanes"),
    "data.shuffle_block": _bound("shuffle_block"),
    "data.resident": _bound("resident"),
    "data.max_pixels": _bound("max_pixels"),
    "data.decode_threads": _safe("the order of the samples does not depend on it"),
    "data.prefetch_batches": _safe("the order of the samples does not depend on it"),
    "data.max_bad_ratio": _safe("only says when to stop"),
    "data.timeout_seconds": _safe("only says how long to wait"),
    "data.cache": _safe("the same bytes, from nearer"),
    "optim.name": _bound("optimizer"),
    "optim": _safe("the optimizer's tensors keep their meaning; rates are often lowered midway"),
    "schedule": _safe("runs are made longer or shorter; a step keeps its number"),
    "engine": _safe("precision, ZeRO stage and engine may change with the machine"),
    "checkpoint": _safe("when and where checkpoints are written"),
    "export": _safe("what follows the last checkpoint"),
    "log": _safe("what is told"),
    "online_knn": _safe("only measures"),
    "guard": _safe("when a run stops or goes back, which it tells"),
    "preempt": _safe("when a run is interrupted"),
    "watchdog": _safe("when a run counts as hanging"),
    "cluster": _safe("how long ranks wait for each other"),
}

DATA_KEYS = ("manifest_hash", "weights", "split", "lanes", "shuffle_block", "resident")

# what --allow-change may name, and the keys of an identity that it stands for
ALLOWED_KEYS: dict[str, tuple[str, ...]] = {
    "tasks": ("tasks",),
    "views": ("views", "order_of_views"),
    "balance": ("balance",),
    "teacher": ("teacher",),
    "batch": ("global_batch", "accumulation_steps"),
    "normalization": ("normalization",),
    "max_pixels": ("max_pixels",),
    "seed": ("seed",),
    "model": ("model",),
    "optimizer": ("optimizer",),
}
# a place in the data is a number of micro batches, so it has another meaning where one of these differs
PLACE_KEYS = (*DATA_KEYS, "global_batch", "seed")


@dataclass(frozen=True)
class Changes:
    """Lines such as "optim.base_lr: was 0.001, now 0.0005"."""

    safe: list[str]
    unsafe: list[str]
    keys: tuple[str, ...]  # of the identity, that differ

    @property
    def moves_data(self) -> bool:
        """Whether the data are to be read from their beginning."""
        return any(key in PLACE_KEYS for key in self.keys)


def setting_of(path: str) -> Setting | None:
    """How the setting at a path such as "optim.base_lr" is bound to a checkpoint; None if there is none."""
    while path and path not in SETTINGS:
        path = path.rpartition(".")[0]
    return SETTINGS.get(path)


def compare(
    saved_config: Mapping[str, Any],
    saved_identity: Mapping[str, Any],
    config: RunConfig,
    identity: Mapping[str, Any],
) -> Changes:
    """saved_config: of the checkpoint's config.yaml; saved_identity: of its state."""
    unsafe: dict[str, list[str]] = {}
    for key, now in identity.items():
        lines = [told for _, told in _differences(saved_identity.get(key), now, key)]
        if lines:
            unsafe[key] = lines
    safe = []
    for path, line in _differences(_complete(saved_config), config.model_dump(mode="json"), ""):
        setting = setting_of(path) or _safe("there is no such setting any more")
        is_told = not unsafe.keys().isdisjoint(setting.seen_as)
        if setting.why and not is_told:
            safe.append(line)
    return Changes(safe, [line for lines in unsafe.values() for line in lines], tuple(unsafe))


def _complete(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the defaults of settings that are newer than the checkpoint."""
    try:
        return RunConfig.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, "path: was x, now y") of every setting that differs, down to the innermost."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*new, *old)):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".removeprefix("."))
    elif old != new:
        yield path, f"{path}: was {old!r}, now {new!r}"


def check_allowed(
    folder: Path, changes: Changes, allow_changes: Sequence[str] = (), allow_new_data: bool = False
) -> None:
    """Refuse to continue from the checkpoint `folder` where more has changed than the user allows."""
    check_names(allow_changes)
    allowed = {key for name in allow_changes for key in ALLOWED_KEYS[name]}
    if allow_new_data:
        allowed |= set(DATA_KEYS)
    refused = [key for key in changes.keys if key not in allowed]
    if not refused:
        return
    lines = [line for line in changes.unsafe if _key_of(line) in refused]
    shown = "; ".join(lines)
    shown = shown if len(shown) <= MAX_TOLD else shown[:MAX_TOLD] + " ..."
    remedies = []
    if not set(DATA_KEYS).isdisjoint(refused):
        remedies.append("--allow-new-data goes on with the new data")
    of_settings = _flags([key for key in refused if key not in DATA_KEYS])
    if of_settings:
        remedies.append(f"{' '.join(of_settings)} with the new settings")
    raise CheckpointError(
        f"{folder}: written by a run with other settings ({shown}); "
        + "; ".join([*remedies, "restore them, or start anew with another --output-dir"])
    )


def _flags(keys: Collection[str]) -> list[str]:
    """What allows these keys of an identity to differ."""
    flags = [f"--allow-change {name}" for name, own in ALLOWED_KEYS.items() if not set(own).isdisjoint(keys)]
    return flags + ["--allow-new-data"] * (not set(DATA_KEYS).isdisjoint(keys))


def _key_of(line: str) -> str:
    return line.partition(":")[0].partition(".")[0]


def check_names(allow_changes: Sequence[str]) -> None:
    for name in allow_changes:
        if name in DATA_KEYS:
            raise ConfigError(f"--allow-change {name}: changed data are let through by --allow-new-data")
        if name not in ALLOWED_KEYS:
            raise ConfigError(
                f"--allow-change {name}: no checkpoint depends on a setting called so; "
                f"{nearest(name, ALLOWED_KEYS)}"
            )


def outline(config: RunConfig, num_samples: int) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file and name, without memory for their values where possible."""
    try:
        return _outline(config, num_samples, META)
    except RuntimeError:  # a buffer that is computed, or an older timm
        return _outline(config, num_samples, CPU)


def _outline(config: RunConfig, num_samples: int, device: torch.device) -> dict[str, dict[str, Tensor]]:
    with device:
        module = build.module(config, ALONE, device, num_samples)
        optimizer = build_optimizer(module, config.optim, module.parameter_rules())
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        files = {
            checkpoint.STUDENT: module.state_dict(),
            checkpoint.OPTIMIZER: {
                f"{key}.{name}": parameter.to(META)
                for key in optimizer.state_keys
                for name, parameter in trained
            },
        }
        if config.teacher is not None:
            files[checkpoint.TEACHER] = module.make_teacher().state_dict()
    return files


def num_bytes(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Of a checkpoint that holds these tensors."""
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())


def check_fit(folder: Path, changes: Changes, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Changes that were allowed still need the tensors that the checkpoint holds.

    files: what this run would write. A teacher that is new starts from the student, one that is gone is left.
    """
    for name in (checkpoint.STUDENT, checkpoint.TEACHER, checkpoint.OPTIMIZER):
        wanted = {key: list(tensor.shape) for key, tensor in files.get(name, {}).items()}
        if name == checkpoint.TEACHER and not (wanted and (folder / name).exists()):
            continue
        found = _shapes(folder / name)
        differing = [key for key in dict.fromkeys((*wanted, *found)) if wanted.get(key) != found.get(key)]
        if differing:
            flags = _flags(changes.keys)
            raise CheckpointError(
                f"{folder}: {' '.join(flags)} is not enough: {name} holds other tensors than this run needs "
                f"({len(differing)} differ, such as '{differing[0]}': {found.get(differing[0])} there, "
                f"{wanted.get(differing[0])} here); restore the settings, or start anew with another "
                "--output-dir"
            )


def _shapes(path: Path) -> dict[str, list[int]]:
    """From the header of the file alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise checkpoint.not_safetensors(path, error) from None
