"""A folder for stock timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

`write_hub` writes the same as a repository of the Hugging Face hub has it, to be uploaded as it is.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from pretrain.export.export_report import ExportReport
from pretrain.export.options import ExportOptions
from pretrain.export.parity import ParityError, prove
from pretrain.export.proof import Proof
from pretrain.export.source import RunWeights, WeightsName
from pretrain.export.timm_versions import check_timm, oldest_timm
from pretrain.models.backbone import Backbone, model_args

SMALL_IMAGE_PX = 96  # up to this size the crop is the whole image; above it, 0.875 of its side
HUB_NAME = "pretrain/export"  # of a repository that exists for the length of a proof, on this machine only


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
    from pretrain.export.exporting import Exported, Target, export_run

    options = ExportOptions(weights=weights, tag=tag, license=license)
    (done,) = export_run(run_or_checkpoint, [Target("timm", out)], options)
    assert isinstance(done, Exported)
    return done.report


def write(folder: Path, source: RunWeights, model: Backbone, options: ExportOptions) -> Proof:
    """Write config.json and model.safetensors, and let timm open them."""
    note = _write_files(folder, source, model, options)
    return replace(prove(_opened(f"local-dir:{folder}"), source, model, "timm"), note=note)


def write_hub(folder: Path, source: RunWeights, model: Backbone, options: ExportOptions) -> Proof:
    """The same files, opened by `hf-hub:` from a cache like the one that a download would leave."""
    note = _write_files(folder, source, model, options)
    commit = "0" * 40
    with TemporaryDirectory(prefix="pretrain-hub-") as cache, _no_network():
        repository = Path(cache) / f"models--{HUB_NAME.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        for name in ("config.json", "model.safetensors"):
            (snapshot / name).symlink_to((folder / name).resolve())
        stock = _opened(f"hf-hub:{HUB_NAME}", cache_dir=cache)
        return replace(prove(stock, source, model, "hf-hub"), note=note)


def _write_files(folder: Path, source: RunWeights, model: Backbone, options: ExportOptions) -> str:
    """Returns what a user has to mind."""
    check_timm(source, model)
    tensors = {file_key(key, source): value.clone().contiguous() for key, value in source.state.items()}
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(errno.EIO, str(error)) from error
    config = timm_config(source, model, options.tag or default_tag(source), options.license)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    oldest, why = oldest_timm(source, model)
    return f"needs timm {oldest} or later" + (f": an older one {why}" if why else "")


def file_key(key: str, source: RunWeights) -> str:
    """The name of a tensor in the file: timm's, but for a Swin's merging of patches.

    Its authors count that to the end of a stage, timm to the beginning of the next. timm reads both, but its
    older versions (seen: 1.0.16 to 1.0.27) tell them apart by the classifier, so that they read weights
    without one in the authors' names only.
    """
    if not source.backbone.is_swin:
        return key
    return re.sub(
        r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample.", key
    )


def _opened(name: str, **where: Any) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(name, pretrained=True, **where)
    except RuntimeError as error:  # tensors that do not fit
        reason = " ".join(str(error).split())
        raise ParityError(f"timm {timm.__version__} cannot open what was written: {reason}") from error
    return model


@contextmanager
def _no_network() -> Iterator[None]:
    """Let the hub's library look at its cache alone. Its environment variable is read at import only."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def timm_config(source: RunWeights, model: Backbone, tag: str, license: str) -> dict[str, Any]:
    """The content of config.json: the architecture, and the run's own preprocessing, not timm's default."""
    height, width = source.image_size
    return {
        "architecture": source.backbone.name,
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": model_args(source.backbone, len(source.registers)),
        "pretrained_cfg": {
            "tag": tag,
            "custom_load": False,
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": source.interpolation,
            "crop_pct": crop_ratio(min(height, width)),
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
