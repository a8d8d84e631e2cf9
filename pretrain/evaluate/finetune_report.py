"""Whole fine-tunings, from names to results: one seed or several, a share of the labels, a probe after."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pretrain.errors import UserError
from pretrain.evaluate.classifier import build_classifier
from pretrain.evaluate.encoder import UNTRAINED, Encoder, open_encoder
from pretrain.evaluate.features import Features, extract
from pretrain.evaluate.finetune import Place, finetune
from pretrain.evaluate.image_set import ImageSet, open_images
from pretrain.evaluate.joint_head import classify, head_feature, read_head
from pretrain.evaluate.linear import linear_probe, wilson_interval
from pretrain.evaluate.recipes import FinetuneRecipe, RecipeName
from pretrain.evaluate.report import (
    EvaluateConfig,
    coloured,
    results_folder,
    save_result,
    versions,
)
from pretrain.evaluate.shards import LabelledSplit, decode_and_crop, find_split, refuse_overlap
from pretrain.export.source import is_run, read_weights


@dataclass(frozen=True)
class FinetuneRequest:
    """What is fine-tuned how; where and on which data comes beside it."""

    recipe_name: RecipeName
    recipe: FinetuneRecipe
    seeds: tuple[int, ...] = (0,)
    fraction_ratio: float = 1.0  # of the labels of each class
    is_scratch: bool = False  # fresh weights, drawn from the seed
    then_linear: bool = False  # a linear probe with all labels on what was fine-tuned
    image_px: int | None = None  # None: the encoder's
    resume: bool = False
    num_workers: int | None = None

    @property
    def name(self) -> str:
        """Of its results, so that those of other recipes, shares and controls lie beside them."""
        parts = ["finetune", self.recipe_name]
        parts += [f"{100 * self.fraction_ratio:g}pct"] if self.fraction_ratio < 1 else []
        parts += ["scratch"] if self.is_scratch else []
        return "_".join(parts)


def run_finetune(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    request: FinetuneRequest,
    config: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """Fine-tune once a seed. config.save: state and results go to `finetune/` and `eval/` of its folder."""
    config = config or EvaluateConfig()
    if len(set(request.seeds)) < len(request.seeds):
        raise UserError(f"--seeds: {' '.join(map(str, request.seeds))} names one twice")
    folder = results_folder(weights, config.out, "finetune") if config.save else None
    splits = {"train": find_split(train, "train"), "test": find_split(test, "test")}
    refuse_overlap(splits["train"], splits["test"])
    accelerator = Accelerator(cpu=config.device == "cpu")
    tests = open_images(splits["test"])
    runs = []
    for seed in request.seeds:
        place = Place(folder / f"{request.name}_seed{seed}" if folder else None, request.resume)
        began = time.perf_counter()
        encoder, run = _finetune_once(weights, splits, tests, request, config, seed, accelerator, place)
        runs.append({"seed": seed, "seconds": time.perf_counter() - began, **run})
    top1_ratio, best_top1_ratio = (
        statistics.mean(run[key] for run in runs) for key in ("top1_ratio", "best_top1_ratio")
    )
    several = len(runs) > 1
    result = {
        "method": "finetune",
        "recipe_name": request.recipe_name,
        "recipe": request.recipe.model_dump(mode="json"),
        "is_scratch": request.is_scratch,
        "fraction_ratio": request.fraction_ratio,
        "seeds": list(request.seeds),
        "top1_ratio": top1_ratio,  # of the last epoch, mean of the seeds
        "top1_ratio_std": statistics.stdev(run["top1_ratio"] for run in runs) if several else None,
        "top1_ratio_95": None if several else runs[0]["top1_ratio_95"],
        "best_top1_ratio": best_top1_ratio,  # of the best epoch: chosen on the test set
        "best_top1_ratio_std": statistics.stdev(run["best_top1_ratio"] for run in runs) if several else None,
        "linear_top1_ratio": (
            statistics.mean(run["linear"]["top1_ratio"] for run in runs) if request.then_linear else None
        ),
        "runs": runs,
        "num_test": len(tests),
        "encoder": encoder.describe(),
        **{role: split.describe() for role, split in splits.items()},
        "hardware": hardware(accelerator),
        "versions": versions(),
    }
    if config.save and accelerator.is_main_process:
        save_result(results_folder(weights, config.out), result, request.name)
    return result


def _finetune_once(
    weights: str | Path,
    splits: Mapping[str, LabelledSplit],
    tests: ImageSet,
    request: FinetuneRequest,
    config: EvaluateConfig,
    seed: int,
    accelerator: Accelerator,
    place: Place,
) -> tuple[Encoder, dict[str, Any]]:
    name = str(weights)
    if request.is_scratch and not name.startswith(UNTRAINED):
        name = f"{UNTRAINED}{name}"
    images = open_images(splits["train"], request.fraction_ratio, seed)
    encoder = coloured(open_encoder(name, None, config.network, seed), splits["train"], config)
    classes = torch.unique(images.labels)  # a share of the labels has every class
    encoder = build_classifier(encoder, request.recipe, len(classes), seed, request.image_px)
    identity = {"encoder": encoder.describe(), "fraction_ratio": request.fraction_ratio} | {
        role: split.describe()["manifest_sha256"] + ":" + split.name for role, split in splits.items()
    }
    done = finetune(
        encoder,
        images,
        tests,
        classes,
        request.recipe,
        seed,
        accelerator,
        place,
        identity,
        request.num_workers,
    )
    last, best = done.history[-1], max(done.history, key=lambda epoch: epoch["num_correct"])
    linear = None
    if request.then_linear:
        features = [
            _features(done.encoder, splits[role], config.batch_size, accelerator)
            for role in ("train", "test")
        ]
        linear = linear_probe(features[0], features[1], device=accelerator.device)
    return done.encoder, {
        "top1_ratio": last["test_top1_ratio"],
        "top1_ratio_95": list(wilson_interval(last["test_top1_ratio"], len(tests))),
        "best_top1_ratio": best["test_top1_ratio"],
        "best_top1_ratio_95": list(wilson_interval(best["test_top1_ratio"], len(tests))),
        "best_epoch": best["epoch"],
        "num_train": len(images),
        "num_classes": len(classes),
        "linear": linear,
        "history": done.history,
    }


def run_head(run: str | Path, test: str | Path, config: EvaluateConfig | None = None) -> dict[str, Any]:
    """Accuracy of the classification head that was trained together with a run's pretext tasks."""
    config = config or EvaluateConfig()
    folder = Path(run)
    if not (folder.is_dir() and is_run(folder)):
        raise UserError(
            f"{run}: neither a run nor a checkpoint; `evaluate head` wants one of a joint training"
        )
    source = read_weights(folder, "student")
    feature = head_feature(source)
    weight, bias = read_head(source)
    split = find_split(test, "test")
    accelerator = Accelerator(cpu=config.device == "cpu")
    encoder = coloured(open_encoder(source.checkpoint, feature, "student"), split, config)
    encoder = replace(encoder, weights=str(run))
    features = _features(encoder, split, config.batch_size, accelerator)
    result = {
        "method": "head",
        **classify(features, weight, bias, source.checkpoint),
        "encoder": encoder.describe(),
        "test": split.describe(),
        "hardware": hardware(accelerator),
        "versions": versions(),
    }
    if config.save and accelerator.is_main_process:
        save_result(results_folder(run, config.out), result)
    return result


def _features(encoder: Encoder, split: LabelledSplit, batch_size: int, accelerator: Accelerator) -> Features:
    prepare = partial(decode_and_crop, crop=encoder.crop)
    return extract(encoder, split.samples(), prepare, batch_size, accelerator=accelerator)


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    """What the work was done on."""
    device = accelerator.device
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{platform.machine()} CPU",
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "precision": "bf16 autocast" if is_gpu else "fp32",
    }
