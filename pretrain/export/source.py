"""Reading the weights of a run: find the checkpoint, prove its files whole, take the backbone out of them.

Reads safetensors, YAML and JSON only: no pickle, no engine state, no GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint import list_checkpoints, not_safetensors
from pretrain.errors import CheckpointError, UserError
from pretrain.models.backbone import BackboneConfig
from pretrain.tasks.multitask import BACKBONE_PREFIX
from pretrain.tokens import TokenLayout

WeightsName = Literal["student", "teacher"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunWeights:
    """The backbone of one checkpoint, with what is needed to rebuild and to feed it."""

    checkpoint: Path  # the folder step-00001000
    weights: WeightsName
    step: int
    sha256: str  # of the safetensors file
    state: dict[str, Tensor]  # timm key -> float32 tensor
    backbone: BackboneConfig
    registers: tuple[str, ...]  # the tasks that own the register tokens, in order
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    interpolation: str  # how the run resized its views: bicubic or bilinear
    config: dict[str, Any]  # the resolved run config, as plain values
    manifest_hashes: tuple[str, ...] = ()  # of the indexes of its data; empty where none were recorded

    @property
    def embed_dim(self) -> int:
        norm = "norm.weight" if "norm.weight" in self.state else "fc_norm.weight"
        return self.state[norm].shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in px of the images that the model takes."""
        given = self.backbone.args.get("img_size", self.backbone.img_px)
        height, width = given if isinstance(given, (list, tuple)) else (given, given)
        return int(height), int(width)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patch tokens; of a Swin those of its last stage."""
        height, width = self.image_size
        return height // self.backbone.token_px, width // self.backbone.token_px

    @property
    def layout(self) -> TokenLayout:
        """The order of the tokens that the model gives."""
        return TokenLayout(self.grid, self.registers, self.backbone.class_token and not self.backbone.is_swin)

    @property
    def run(self) -> Path:
        """The run folder that the checkpoint belongs to."""
        return self.checkpoint.parent.parent

    @property
    def tasks(self) -> tuple[str, ...]:
        """The pretext tasks that were on; a task that was off stands as null in the config."""
        return tuple(
            name for name, settings in (self.config.get("tasks") or {}).items() if settings is not None
        )


def is_checkpoint(folder: Path) -> bool:
    return (folder / "MANIFEST.json").is_file() or (folder / "weights").is_dir()


def is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() or is_checkpoint(folder)


def read_weights(run_or_checkpoint: Path, weights: WeightsName | None = None) -> RunWeights:
    """The backbone of a checkpoint folder, or of the newest checkpoint of a run folder that verifies.

    weights: which network; None takes the teacher where there is one, else the student.
    """
    if is_checkpoint(run_or_checkpoint):
        return _read_checkpoint(run_or_checkpoint, weights)
    checkpoints = list_checkpoints(run_or_checkpoint)  # without those of attempts that do not count
    if not checkpoints:
        raise CheckpointError(
            f"{run_or_checkpoint}: neither a run folder with checkpoints/step-* nor a checkpoint folder"
        )
    damaged = []
    for checkpoint in checkpoints:
        try:
            return _read_checkpoint(checkpoint, weights)
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
            damaged.append(str(error))
    raise CheckpointError(f"{run_or_checkpoint}: no checkpoint can be used; {'; '.join(damaged)}")


def _read_checkpoint(checkpoint: Path, weights: WeightsName | None) -> RunWeights:
    manifest = _read_manifest(checkpoint)
    name = _choose(checkpoint, manifest, weights)
    path = f"weights/{name}.safetensors"
    for file in ("config.yaml", "state.json", path):
        _verify(checkpoint, file, manifest)
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    if weights is None and name == "student" and isinstance(config, dict) and config.get("teacher"):
        raise CheckpointError(
            f"{checkpoint}: its run has a teacher, whose weights are not here; use another checkpoint, or "
            "--weights student"
        )
    position = json.loads((checkpoint / "state.json").read_text())
    try:
        mean, std = (_three(config["normalization"][key]) for key in ("mean", "std"))
        backbone = BackboneConfig.model_validate(config["model"])
        return RunWeights(
            checkpoint=checkpoint,
            weights=name,
            step=int(position["step"]),
            sha256=manifest[path],
            state=_backbone_state(checkpoint / path),
            backbone=backbone,
            registers=tuple(position["registers"]),
            mean=mean,
            std=std,
            interpolation=_interpolation(config, backbone.img_px),
            config=config,
            manifest_hashes=tuple((position.get("identity") or {}).get("manifest_hash") or ()),
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise CheckpointError(f"{checkpoint}: config.yaml or state.json is not a run's ({reason})") from error


def _read_manifest(checkpoint: Path) -> dict[str, str]:
    try:
        files: dict[str, str] = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: MANIFEST.json is missing or damaged ({error})") from error
    return files


def _choose(checkpoint: Path, manifest: dict[str, str], weights: WeightsName | None) -> WeightsName:
    present = [name for name in ("student", "teacher") if f"weights/{name}.safetensors" in manifest]
    if weights is not None and weights not in present:
        raise UserError(
            f"{checkpoint}: no {weights} weights here; --weights may be: {', '.join(present) or 'none'}"
        )
    if not present:
        raise CheckpointError(f"{checkpoint}: its manifest lists no weights/student.safetensors")
    return weights or ("teacher" if "teacher" in present else "student")


def _verify(checkpoint: Path, file: str, manifest: dict[str, str]) -> None:
    if file not in manifest:
        raise CheckpointError(f"{checkpoint}: MANIFEST.json does not list {file}")
    try:
        found = sha256_of(checkpoint / file)
    except OSError as error:
        raise CheckpointError(f"{checkpoint / file}: {error.strerror}") from error
    if found != manifest[file]:
        raise CheckpointError(
            f"{checkpoint / file}: sha256 is {found[:12]}…, the manifest says {manifest[file][:12]}…; "
            "the file is damaged, use another checkpoint"
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _backbone_state(path: Path) -> dict[str, Tensor]:
    """The tensors under `backbone.`, prefix removed; heads stay on disk."""
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping: it has no __iter__)
                if key.startswith(BACKBONE_PREFIX):
                    state[key.removeprefix(BACKBONE_PREFIX)] = file.get_tensor(key)
    except SafetensorError as error:
        raise not_safetensors(path, error) from None
    if not state:
        raise CheckpointError(f"{path}: no tensor is named {BACKBONE_PREFIX}*")
    return state


def _interpolation(config: dict[str, Any], img_px: int) -> str:
    """That of the first view of the model's own size, else of the first view."""
    views = [view for view in (config.get("views") or {}).values() if isinstance(view, dict)]
    views.sort(key=lambda view: view.get("size_px") != img_px)  # stable: order of the recipe otherwise
    return next((view["interpolation"] for view in views if "interpolation" in view), "bicubic")


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
