"""Export of a backbone as a folder for stock timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

The folder appears at its place only after it has been re-opened and has given the checkpoint's own features.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from pretrain.errors import UserError
from pretrain.export.export_report import ExportReport
from pretrain.export.model_card import model_card
from pretrain.export.parity import prove, rebuild
from pretrain.export.source import RunWeights, WeightsName, read_weights, sha256_of
from pretrain.models.backbone import Backbone, model_args

SMALL_IMAGE_PX = 96  # up to this size the crop is the whole image; above it, 0.875 of its side


def export_timm(
    run_or_checkpoint: Path,
    out: Path,
    weights: WeightsName | None = None,
    *,
    tag: str | None = None,
    license: str = "other",
) -> ExportReport:
    """Write the backbone of a run (its newest whole checkpoint) or of one checkpoint as a timm folder.

    weights: None takes the teacher where there is one. tag: timm's name for these weights, by default
    `<tasks>_<data>`. license: identifier for the model card.
    """
    run_or_checkpoint, out = run_or_checkpoint.resolve(), out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another --out or remove it")
    source = read_weights(run_or_checkpoint, weights)
    model = rebuild(source)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        report = _write(temporary, out, source, model, tag or default_tag(source), license)
        temporary.rename(out)  # also replaces an empty folder
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return report


def _write(
    folder: Path, out: Path, source: RunWeights, model: Backbone, tag: str, license: str
) -> ExportReport:
    tensors = {key: value.clone().contiguous() for key, value in source.state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", timm_config(source, model, tag, license))
    parity = prove(folder, source, model)
    report = ExportReport(
        folder=str(out),
        format="timm",
        architecture=source.backbone.name,
        source_checkpoint=str(source.checkpoint),
        source_weights=source.weights,
        source_step=source.step,
        source_sha256=source.sha256,
        model_sha256=sha256_of(folder / "model.safetensors"),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        registers=source.registers,
        matched=parity.matched,
        missing=(),
        unexpected=(),
        max_abs_difference=parity.max_abs_difference,
        feature_scale=parity.feature_scale,
        tolerance=parity.tolerance,
        versions={"torch": torch.__version__, "timm": timm.__version__},
    )
    (folder / "README.md").write_text(model_card(source, report, license))
    _write_json(folder / "export_report.json", asdict(report))
    return report


def timm_config(source: RunWeights, model: Backbone, tag: str, license: str) -> dict[str, Any]:
    """The content of config.json: the architecture, and the run's own preprocessing, not timm's default."""
    side = source.backbone.img_px
    return {
        "architecture": source.backbone.name,
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": model_args(source.backbone, len(source.registers)),
        "pretrained_cfg": {
            "tag": tag,
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": source.interpolation,
            "crop_pct": crop_ratio(side),
            "crop_mode": "center",
            "mean": list(source.mean),
            "std": list(source.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": license,
        },
        "pretrain": {  # ignored by timm
            "weights": source.weights,
            "step": source.step,
            "tasks": list(source.tasks),
            "registers": list(source.registers),
        },
    }


def crop_ratio(side_px: int) -> float:
    """Share of the resized image that the centre crop keeps, per side (timm's `crop_pct`)."""
    return 1.0 if side_px <= SMALL_IMAGE_PX else 0.875


def default_tag(source: RunWeights) -> str:
    """`<tasks>_<data>`, as in timm's `<arch>.<method>_<data>`; at most 64 characters."""
    words = ["-".join(source.tasks) or "pretrain"]
    shards = (source.config.get("data") or {}).get("shards")
    first = shards[0] if isinstance(shards, list) and shards else shards
    if isinstance(first, str):
        words.append(Path(first.split(":")[0].rstrip("/")).name)
    return re.sub(r"[^a-z0-9_-]+", "-", "_".join(words).lower())[:64]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
