"""A run folder as training leaves it, small enough for a test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from pretrain.models.backbone import BackboneConfig, create_backbone

TINY: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2}
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]


def tiny_config(**changes: Any) -> BackboneConfig:
    fields = {"name": "vit_small_patch16_224", "img_px": 32, "patch_px": 8, "args": TINY}
    return BackboneConfig(**{**fields, **changes})


def random_state(config: BackboneConfig, num_registers: int, seed: int = 0) -> dict[str, Tensor]:
    """Backbone weights in which every tensor is random: the zeros of a fresh model would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    state = create_backbone(config, num_registers).state_dict()
    return {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def write_checkpoint(
    run: Path,
    config: BackboneConfig,
    registers: tuple[str, ...] = (),
    step: int = 1000,
    networks: dict[str, dict[str, Tensor]] | None = None,
) -> Path:
    """checkpoints/step-… of a run; networks: backbone weights by "student" and "teacher"."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "weights").mkdir(parents=True)
    for name, state in (networks or {"student": random_state(config, len(registers))}).items():
        tensors = {f"backbone.{key}": value for key, value in state.items()}
        tensors["tasks.rotation.head.weight"] = torch.zeros(4, 24)
        save_file(tensors, folder / "weights" / f"{name}.safetensors")
    values = {
        "model": config.model_dump(),
        "normalization": {"mean": MEAN, "std": STD},
        "views": {
            "small": {"size_px": 16, "interpolation": "bicubic"},
            "main": {"size_px": config.img_px, "interpolation": "bilinear"},
        },
        "data": {"shards": "data_shards/cifar10"},
        "tasks": {"contrastive": {}, "jigsaw": None, "rotation": {}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "state.json").write_text(json.dumps({"step": step, "registers": list(registers)}))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write MANIFEST.json over what the checkpoint holds now."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "MANIFEST.json"]
    sums = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "MANIFEST.json").write_text(json.dumps({"files": sums}))
