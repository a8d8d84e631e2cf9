"""Whole fine-tunings, from names to results: one seed or several, a share of the labels, a probe after."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pretrain.errors import UserError
from pretrain.evaluate.classifier import build_classifier
from pretrain.evaluate.encoder import UNTRAINED, Encoder, open_encoder
from pretrain.evaluate.feature import num_parts
from pretrain.evaluate.features import Features, extract
from pretrain.evaluate.finetune import Finetuned, Place, finetune
from pretrain.evaluate.image_set import ImageSet, open_images
from pretrain.evaluate.intervals import accuracy_of, over_seeds, wilson_interval
from pretrain.evaluate.joint_head import classify, head_feature, read_head
from pretrain.evaluate.linear import Reading, linear_probe
from pretrain.evaluate.protocols import protocol_for
from pretrain.evaluate.recipes import FinetuneRecipe, RecipeName
from pretrain.evaluate.report import (
    EvaluateConfig,
    check_colours,
    coloured,
    hardware,
    results_folder,
    save_result,
    sources_of,
    versions,
)
from pretrain.evaluate.shards import LabelledSplit, Role, decode_and_crop, find_split, open_splits
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
    linear_changes: Mapping[str, Any] = field(default_factory=dict)  # of the probe's LinearConfig
    image_px: int | None = None  # None: the encoder's
    resume: bool = False
    num_workers: int | None = None
    test_every_epochs: int = 1  # 0: only after the last

    @property
    def name(self) -> str:
        """Of its results, so that those of other recipes, shares and controls lie beside them."""
        parts = ["finetune", self.recipe_name]
        parts += [f"{100 * self.fraction_ratio:g}pct"] if self.fraction_ratio < 1 else []
        parts += ["scratch"] if self.is_scratch else []
        return "_".join(parts)


@dataclass(frozen=True)
class FinetuneData:
    """Both sets of labelled images, opened."""

    splits: Mapping[Role, LabelledSplit]
    tests: ImageSet


def open_data(train: str | Path, test: str | Path) -> FinetuneData:
    splits = open_splits(train, test)
    return FinetuneData(splits, open_images(splits["test"]))


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
    check_colours(config)
    data = open_data(train, test)
    accelerator = Accelerator(cpu=config.device == "cpu")
    runs = []
    for seed in request.seeds:
        place = Place(folder / f"{request.name}_seed{seed}" if folder else None, request.resume)
        encoder, run = finetune_once(weights, data, request, config, seed, accelerator, place)
        runs.append(run)
    several = len(runs) > 1
    best = over_seeds([run["best_top1_ratio"] for run in runs])
    linear = [run["linear"]["top1_ratio"] for run in runs] if request.then_linear else []
    result = {
        "method": "finetune",
        "recipe_name": request.recipe_name,
        "recipe": request.recipe.model_dump(mode="json"),
        "is_scratch": request.is_scratch,
        "fraction_ratio": request.fraction_ratio,
        "seeds": list(request.seeds),
        **accuracy_of([run["top1_ratio"] for run in runs], len(data.tests)),  # of the last epoch
        "best_top1_ratio": best["mean"],  # of the best epoch: chosen on the test set
        "best_top1_ratio_std": best["std"],
        "best_top1_ratio_95": best["interval_95"] if several else runs[0]["best_top1_ratio_95"],
        "linear_top1_ratio": over_seeds(linear)["mean"] if linear else None,
        "linear_top1_ratio_95": accuracy_of(linear, len(data.tests))["top1_ratio_95"] if linear else None,
        "runs": runs,
        "num_test": len(data.tests),
        **sources_of(encoder, data.splits["train"], data.splits["test"], config),
        "hardware": hardware(accelerator),
        "versions": versions(),
    }
    if config.save and accelerator.is_main_process:
        save_result(results_folder(weights, config.out), result, request.name)
    return result


def finetune_once(
    weights: str | Path,
    data: FinetuneData,
    request: FinetuneRequest,
    config: EvaluateConfig,
    seed: int,
    accelerator: Accelerator,
    place: Place,
) -> tuple[Encoder, dict[str, Any]]:
    """With one seed: the fine-tuned network, and a line for the result."""
    began, splits = time.perf_counter(), data.splits
    name = str(weights)
    if request.is_scratch and not name.startswith(UNTRAINED):
        name = f"{UNTRAINED}{name}"
    images = open_images(splits["train"], request.fraction_ratio, seed)
    encoder = coloured(open_encoder(name, None, config.network, seed), splits["train"], config)
    protocol = protocol_for(encoder, config.protocol)
    classes = torch.unique(images.labels)  # a share of the labels has every class
    encoder = build_classifier(encoder, request.recipe, len(classes), seed, request.image_px)
    identity = {"encoder": encoder.describe(), "fraction_ratio": request.fraction_ratio} | {
        role: split.describe()["manifest_sha256"] + ":" + split.name for role, split in splits.items()
    }
    done = finetune(
        encoder,
        images,
        data.tests,
        classes,
        request.recipe,
        seed,
        accelerator,
        place,
        identity,
        request.num_workers,
        request.test_every_epochs,
    )
    linear = None
    if request.then_linear:
        features = [
            _features(done.encoder, splits[role], config.batch_size, accelerator)
            for role in ("train", "test")
        ]
        probe = replace(protocol.probe, **request.linear_changes, seed=seed)
        reading = Reading(done.encoder.feature, num_parts=num_parts(done.encoder.feature))
        linear = linear_probe(features[0], features[1], probe, accelerator.device, [reading])
    seconds = time.perf_counter() - began
    return done.encoder, {"seed": seed, "seconds": seconds, **_scores(done, images, data.tests, linear)}


def _scores(
    done: Finetuned, images: ImageSet, tests: ImageSet, linear: dict[str, Any] | None
) -> dict[str, Any]:
    last = done.history[-1]
    best = max(
        (epoch for epoch in done.history if epoch["num_correct"] is not None),
        key=lambda epoch: int(epoch["num_correct"]),
    )
    return {
        "top1_ratio": last["test_top1_ratio"],
        "top1_ratio_95": list(wilson_interval(last["test_top1_ratio"], len(tests))),
        "best_top1_ratio": best["test_top1_ratio"],
        "best_top1_ratio_95": list(wilson_interval(best["test_top1_ratio"], len(tests))),
        "best_epoch": best["epoch"],
        "num_train": len(images),
        "num_classes": len(torch.unique(images.labels)),
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
    split.labels()  # one that lacks a label is told before the work
    accelerator = Accelerator(cpu=config.device == "cpu")
    encoder = coloured(open_encoder(source.checkpoint, feature, "student"), split, config)
    encoder = replace(encoder, weights=str(run))
    features = _features(encoder, split, config.batch_size, accelerator)
    result = {
        "method": "head",
        **classify(features, weight, bias, source.checkpoint),
        "encoder": encoder.describe(),
        "test": split.describe(),
        "hardware": hardware(accelerator, "fp32"),
        "versions": versions(),
    }
    if config.save and accelerator.is_main_process:
        save_result(results_folder(run, config.out), result)
    return result


def _features(encoder: Encoder, split: LabelledSplit, batch_size: int, accelerator: Accelerator) -> Features:
    return extract(
        encoder,
        split.samples(),
        partial(decode_and_crop, crop=encoder.crop),
        batch_size,
        num_images=split.num_samples,
        accelerator=accelerator,
    )
