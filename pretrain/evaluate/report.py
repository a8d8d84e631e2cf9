"""Whole evaluations, from names to results: what the command line runs, saves and prints."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator

from pretrain.errors import UserError
from pretrain.evaluate.encoder import FeatureName, open_encoder
from pretrain.evaluate.features import Features, extract
from pretrain.evaluate.knn import KS, knn
from pretrain.evaluate.linear import LinearConfig, linear_probe
from pretrain.evaluate.shards import decode_and_crop, find_split, refuse_overlap
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
    encoder = open_encoder(weights, config.feature, config.network)
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
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    return FeatureSets(
        features["train"], features["test"], origin, accelerator.device, accelerator.is_main_process
    )


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


def results_folder(weights: str | Path, out: Path | None = None) -> Path:
    """`eval/` in `out`, in the folder of the weights, or, for one checkpoint, in its run."""
    if out is not None:
        return out / "eval"
    folder = Path(weights)
    if not folder.is_dir():
        raise UserError(f"'{weights}' is not a folder to save results in; say where with --out")
    if is_checkpoint(folder):  # a checkpoint is sealed: nothing is added to it
        return folder.resolve().parent.parent / "eval" / folder.resolve().name
    return folder / "eval"


def save_result(folder: Path, result: dict[str, Any]) -> Path:
    """Write <folder>/<method>.json, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['method']}.json"
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
                result["method"],
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
    low, high = result["top1_ratio_95"]
    chosen = result["chosen"]
    return f"95 % {100 * low:.2f} to {100 * high:.2f}; lr x{chosen['lr_factor']}, {chosen['inputs']} inputs"
