"""What evaluations have in common: how features are taken, where results go, and what they say."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate import Accelerator

from pretrain import __version__
from pretrain.errors import UserError
from pretrain.evaluate.domain import Normalization, domain_of
from pretrain.evaluate.encoder import Encoder
from pretrain.evaluate.feature import FeatureName
from pretrain.evaluate.image_set import colours, open_images
from pretrain.evaluate.shards import LabelledSplit
from pretrain.export.source import WeightsName, is_checkpoint


@dataclass(frozen=True)
class EvaluateConfig:
    """How features are taken, and where results go."""

    feature: FeatureName | None = None  # None: that of the protocol
    network: WeightsName | None = None  # of a run; None: the teacher where there is one
    weights_seed: int = 0  # of the fresh weights that `untrained:` draws
    batch_size: int = 256  # images per process
    device: str | None = None  # "cpu", or None for what the machine has
    save: bool = False  # write <out>/eval/<method>.json
    out: Path | None = None  # None: the folder of the weights
    mean: tuple[float, ...] | None = None  # of pixels in 0..1, with `std`; None: the weights' own
    std: tuple[float, ...] | None = None
    normalization_of_data: bool = False  # take both from the train set
    protocol: str | None = None  # of PROTOCOLS; None: that of the method that made the weights

    @property
    def normalization(self) -> Normalization:
        if self.normalization_of_data:
            return "of the data"
        return "given" if self.mean is not None else "of the weights"


def coloured(encoder: Encoder, train: LabelledSplit, config: EvaluateConfig) -> Encoder:
    """The encoder with the normalisation that was asked for: given, measured on the train set, or its own."""
    check_colours(config)
    mean, std = config.mean, config.std
    if config.normalization_of_data:
        mean, std = colours(open_images(train), encoder.crop)
    if mean is None or std is None:
        return encoder
    return replace(encoder, mean=mean, std=std)


def check_colours(config: EvaluateConfig) -> None:
    mean, std = config.mean, config.std
    if config.normalization_of_data and (mean is not None or std is not None):
        raise UserError("--normalization-of-data measures what --mean and --std give; leave one away")
    if (mean is None) != (std is None):
        raise UserError("--mean and --std belong together; give both")
    if not all(0 <= value <= 1 for value in mean or ()) or not all(0 < value <= 1 for value in std or ()):
        raise UserError(f"--mean {mean} --std {std}: of pixels in 0..1, so all lie there; a std is above 0")


def sources_of(
    encoder: Encoder, train: LabelledSplit, test: LabelledSplit, config: EvaluateConfig
) -> dict[str, Any]:
    """What was evaluated on what."""
    return {
        "encoder": encoder.describe(),
        "domain": domain_of(encoder.origin.get("pretrained_on"), train, config.normalization),
        "train": train.describe(),
        "test": test.describe(),
    }


def versions() -> dict[str, str]:
    """Of everything that decides on a result."""
    return {
        "pretrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }


def hardware(accelerator: Accelerator, precision: str | None = None) -> dict[str, Any]:
    """What the work was done on. precision: None for that of a training."""
    device = accelerator.device
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{platform.machine()} CPU",
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "precision": precision or ("bf16 autocast" if is_gpu else "fp32"),
    }


def results_folder(weights: str | Path, out: Path | None = None, kind: str = "eval") -> Path:
    """`eval/` or another kind in `out`, in the folder of the weights, or, for one checkpoint, in its run."""
    if out is not None:
        return out / kind
    folder = Path(weights)
    if not folder.is_dir():
        raise UserError(f"'{weights}' is not a folder to save results in; say where with --out")
    if is_checkpoint(folder):  # a checkpoint is sealed: nothing is added to it
        return folder.resolve().parent.parent / kind / folder.resolve().name
    return folder / kind


def save_result(folder: Path, result: dict[str, Any], name: str | None = None) -> Path:
    """Write <folder>/<name>.json, complete or not at all. name: None takes the method's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or result['method']}.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    return temporary.replace(path)
