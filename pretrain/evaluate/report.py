"""Whole evaluations, from names to results: what the command line runs, saves and prints."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate import Accelerator

from pretrain import __version__
from pretrain.errors import UserError
from pretrain.evaluate.encoder import Encoder, FeatureName, open_encoder
from pretrain.evaluate.features import Features, extract
from pretrain.evaluate.image_set import colours, open_images
from pretrain.evaluate.knn import KS, knn
from pretrain.evaluate.linear import LinearConfig, linear_probe
from pretrain.evaluate.shards import LabelledSplit, decode_and_crop, find_split, refuse_overlap
from pretrain.export.source import WeightsName, is_checkpoint


@dataclass(frozen=True)
class EvaluateConfig:
    """How features are taken, and where results go."""

    feature: FeatureName | None = None  # None: class token, else mean of the patch tokens
    network: WeightsName | None = None  # of a run; None: the teacher where there is one
    batch_size: int = 256  # images per process
    device: str | None = None  # "cpu", or None for what the machine has
    save: bool = False  # write <out>/eval/<method>.json
    out: Path | None = None  # None: the folder of the weights
    mean: tuple[float, ...] | None = None  # of pixels in 0..1, with `std`; None: the weights' own
    std: tuple[float, ...] | None = None
    normalization_of_data: bool = False  # take both from the train set


@dataclass(frozen=True)
class FeatureSets:
    """Frozen features of both sets, and where they come from."""

    train: Features
    test: Features
    origin: dict[str, Any]
    device: torch.device
    is_main: bool  # the process that writes


def take_features(
    weights: str | Path, train: str | Path, test: str | Path, config: EvaluateConfig | None = None
) -> FeatureSets:
    """Encode both sets once. `run_knn` and `run_linear` accept the result: one encoding serves both."""
    config = config or EvaluateConfig()
    if config.save:
        results_folder(weights, config.out)  # a wrong place is told before the work
    splits = {"train": find_split(train, "train"), "test": find_split(test, "test")}
    refuse_overlap(splits["train"], splits["test"])
    accelerator = Accelerator(cpu=config.device == "cpu")
    encoder = coloured(open_encoder(weights, config.feature, config.network), splits["train"], config)
    prepare = partial(decode_and_crop, crop=encoder.crop)
    began = time.perf_counter()
    features = {
        role: extract(encoder, split.samples(), prepare, config.batch_size, accelerator=accelerator)
        for role, split in splits.items()
    }
    origin = {
        "encoder": encoder.describe(),
        **{role: split.describe() for role, split in splits.items()},
        "extract_seconds": time.perf_counter() - began,
        "versions": versions(),
    }
    return FeatureSets(
        features["train"], features["test"], origin, accelerator.device, accelerator.is_main_process
    )


def coloured(encoder: Encoder, train: LabelledSplit, config: EvaluateConfig) -> Encoder:
    """The encoder with the normalisation that was asked for: given, measured on the train set, or its own."""
    mean, std = config.mean, config.std
    if config.normalization_of_data:
        if mean is not None or std is not None:
            raise UserError("--normalization-of-data measures what --mean and --std give; leave one away")
        mean, std = colours(open_images(train), encoder.crop)
    if mean is None and std is None:
        return encoder
    if mean is None or std is None:
        raise UserError("--mean and --std belong together; give both")
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise UserError(f"--mean {mean} --std {std}: of pixels in 0..1, so all lie there; a std is above 0")
    return replace(encoder, mean=mean, std=std)


def versions() -> dict[str, str]:
    """Of everything that decides on a result."""
    return {
        "pretrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }


def run_knn(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    config: EvaluateConfig | None = None,
    *,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
    sets: FeatureSets | None = None,
) -> dict[str, Any]:
    """Weighted k-NN of the test set among the train set. sets: features already taken of the same names."""
    sets = sets or take_features(weights, train, test, config)
    began = time.perf_counter()
    result = knn(sets.train, sets.test, ks, temperature, device=sets.device)
    return _finish("knn", weights, result, began, sets, config)


def run_linear(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    config: EvaluateConfig | None = None,
    *,
    linear: LinearConfig | None = None,
    sets: FeatureSets | None = None,
) -> dict[str, Any]:
    """Linear probe learnt on the train set, tested on the test set. sets: as in `run_knn`."""
    sets = sets or take_features(weights, train, test, config)
    began = time.perf_counter()
    result = linear_probe(sets.train, sets.test, linear, sets.device)
    return _finish("linear", weights, result, began, sets, config)


def _finish(
    method: str,
    weights: str | Path,
    result: dict[str, Any],
    began: float,
    sets: FeatureSets,
    config: EvaluateConfig | None,
) -> dict[str, Any]:
    result = {"method": method, **result, "classify_seconds": time.perf_counter() - began, **sets.origin}
    if config is not None and config.save and sets.is_main:
        save_result(results_folder(weights, config.out), result)
    return result


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


def table(results: Iterable[dict[str, Any]]) -> str:
    """Results as lines of text, one evaluation each; accuracies in percent."""
    rows = [("weights", "feature", "method", "top-1 %", "")]
    for result in results:
        encoder = result["encoder"]
        rows.append(
            (
                encoder["weights"],
                encoder["feature"],
                f"finetune {result['recipe_name']}" if result["method"] == "finetune" else result["method"],
                f"{100 * result['top1_ratio']:.2f}",
                _detail(result),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def _detail(result: dict[str, Any]) -> str:
    if result["method"] == "knn":
        best = f"best {100 * result['best_top1_ratio']:.2f} at k={result['best_k']}"
        return f"k={result['reported_k']}; {best}"
    if result["method"] == "finetune":
        return _finetune_detail(result)
    if result["method"] == "head":
        low, high = result["top1_ratio_95"]
        return f"95 % {100 * low:.2f} to {100 * high:.2f}; trained with the pretext tasks"
    low, high = result["top1_ratio_95"]
    chosen = result["chosen"]
    return f"95 % {100 * low:.2f} to {100 * high:.2f}; lr x{chosen['lr_factor']}, {chosen['inputs']} inputs"


def _finetune_detail(result: dict[str, Any]) -> str:
    """The interval of one seed, or the deviation of several; the best epoch; what was unusual."""
    if result["top1_ratio_95"] is None:
        spread = f"+- {100 * result['top1_ratio_std']:.2f} of {len(result['seeds'])} seeds"
        best = f"best epochs {100 * result['best_top1_ratio']:.2f}"
        best += f" +- {100 * result['best_top1_ratio_std']:.2f}"
    else:
        low, high = result["top1_ratio_95"]
        spread = f"95 % {100 * low:.2f} to {100 * high:.2f}"
        best = f"best {100 * result['best_top1_ratio']:.2f} at epoch {result['runs'][0]['best_epoch']}"
    parts = [spread, best]
    if result["fraction_ratio"] < 1:
        parts.append(f"{100 * result['fraction_ratio']:g} % of the labels")
    if result["is_scratch"]:
        parts.append("from scratch")
    if result["linear_top1_ratio"] is not None:
        parts.append(f"then linear {100 * result['linear_top1_ratio']:.2f}")
    return "; ".join(parts)
