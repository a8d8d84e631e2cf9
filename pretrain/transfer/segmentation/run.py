"""A whole segmentation, from names to results: data looked at, network trained, tested, drawn and told."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.evaluate.encoder import UNTRAINED
from pretrain.evaluate.report import hardware, results_folder, save_result, versions
from pretrain.export.source import WeightsName
from pretrain.optim import SGD, AdamW, Optimizer
from pretrain.transfer.segmentation.folders import find_data
from pretrain.transfer.segmentation.pictures import picture, save_picture
from pretrain.transfer.segmentation.recipe import SegmentationRecipe
from pretrain.transfer.segmentation.samples import Samples, moved, normalised
from pretrain.transfer.segmentation.scenes import SceneSet, open_scenes
from pretrain.transfer.segmentation.scores import majority, scores
from pretrain.transfer.segmentation.segmenter import Segmenter, build_segmenter, losses
from pretrain.transfer.segmentation.synchronized import synchronized
from pretrain.transfer.segmentation.testing import Classes, Image, See, chosen, segmenter_confusion
from pretrain.transfer.segmentation.trained import cannot_write, read_trained, write_trained
from pretrain.transfer.training import TrainingConfig, parameter_groups, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentationRequest:
    """What is asked for, beside the recipe."""

    weights: str
    data: Path
    out: Path | None = None  # None: transfer/segmentation in the folder of the weights
    network: WeightsName | None = None  # of a run
    is_scratch: bool = False  # fresh weights, drawn from the seed
    resume: bool = False
    evaluate_only: bool = False
    device: str | None = None  # "cpu", or None for what the machine has

    @property
    def name(self) -> str:
        """Of the weights, as `backbone` takes them."""
        fresh = self.is_scratch and not self.weights.startswith(UNTRAINED)
        return f"{UNTRAINED}{self.weights}" if fresh else self.weights

    @property
    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        return results_folder(self.weights, None, "transfer") / (
            "segmentation_scratch" if self.is_scratch else "segmentation"
        )


def run_segmentation(request: SegmentationRequest, recipe: SegmentationRecipe) -> dict[str, Any]:
    """Train (or with `evaluate_only` read) a segmenter and test it; the result also stands in result.json."""
    began = time.perf_counter()
    folder = request.folder
    labels, splits = find_data(request.data, recipe.data)
    accelerator = Accelerator(cpu=request.device == "cpu")
    segmenter = build_segmenter(request.name, recipe, len(labels.classes), request.network)
    _refuse_lonely_places(recipe)
    trained = read_trained(folder, segmenter, recipe, labels.classes) if request.evaluate_only else None
    if accelerator.is_main_process:
        logger.info("looking at %d images and masks", sum(len(split.scenes) for split in splits.values()))
    sets = {role: open_scenes(split, labels) for role, split in splits.items()}
    if accelerator.is_main_process:
        _tell_data(sets)

    history: list[dict[str, Any]] = []
    _guarded(folder, partial(folder.mkdir, parents=True, exist_ok=True))  # told before training, not after
    if trained is None:
        history = _train(segmenter, sets, recipe, request, accelerator, folder)
        if accelerator.is_main_process:
            write_trained(folder, segmenter, recipe, labels.classes, recipe.num_steps)
    else:
        segmenter.to(accelerator.device)
    tests = sets["test"]
    drawn = chosen(len(tests), recipe.test.num_pictures)
    started = time.perf_counter()
    matrix = segmenter_confusion(segmenter, tests, recipe, accelerator, _drawing(tests, drawn, folder))
    result: dict[str, Any] = {
        "method": "segmentation",
        "weights": request.name,
        "head": recipe.head.kind,
        "num_steps": recipe.num_steps if trained is None else trained["num_steps"],
        **scores(matrix, labels.classes),
        "confusion": matrix.tolist(),
        "baselines": _baselines(request, recipe, sets, accelerator),
        "recipe": recipe.model_dump(mode="json"),
        "encoder": segmenter.backbone.encoder.describe(),
        "num_parameters": _num_parameters(segmenter),
        "train": sets["train"].describe(),
        "test": tests.describe(),
        "test_seconds": time.perf_counter() - started,
        "seconds": time.perf_counter() - began,
        "train_seconds": sum(row["seconds"] for row in history) if trained is None else None,
        "pictures": str(folder / "pictures") if drawn else None,
        "hardware": hardware(accelerator),
        "versions": versions(),
    }
    if accelerator.is_main_process:
        _guarded(folder, partial(save_result, folder, result, "result"))
    return result


def _train(
    segmenter: Segmenter,
    sets: Mapping[str, SceneSet],
    recipe: SegmentationRecipe,
    request: SegmentationRequest,
    accelerator: Accelerator,
    folder: Path,
) -> list[dict[str, Any]]:
    device = accelerator.device
    segmenter.to(device)  # before the optimizer sees its parameters
    synchronized(segmenter, accelerator.process_index, accelerator.num_processes, device.type)
    mean, std = segmenter.backbone.mean, segmenter.backbone.std

    def losses_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = moved(batch, device)
        logits = model(normalised(batch["pixels"], batch["size"], mean, std))
        return losses(logits, batch["classes"], recipe.head.aux_weight)

    def after_save(step: int) -> None:
        if recipe.test.every_steps and step % recipe.test.every_steps == 0 and step < recipe.num_steps:
            found = scores(
                segmenter_confusion(segmenter, sets["test"], recipe, accelerator), sets["test"].labels.classes
            )
            if accelerator.is_main_process:
                logger.info("step %d: test mIoU %.2f %%", step, 100 * found["miou"])
                save_result(folder / "tests", found, f"step-{step:06d}")

    # settings that leave the weights of a step as they are may change between start and resume
    settings = recipe.model_dump(
        mode="json", exclude={"test", "save_every_steps", "log_every_steps", "num_workers"}
    )
    return train(
        segmenter,
        Samples(sets["train"], recipe),
        losses_of,
        build_optimizer(segmenter, recipe),
        recipe.optim.schedule(recipe.num_steps),
        TrainingConfig(
            num_steps=recipe.num_steps,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            save_every_steps=recipe.save_every_steps,
            log_every_steps=recipe.log_every_steps,
            clip_norm=recipe.optim.clip_norm,
            num_workers=recipe.workers(accelerator.num_processes),
        ),
        accelerator,
        folder,
        {
            "recipe": settings,
            "encoder": segmenter.backbone.encoder.describe(),
            "data": sets["train"].sha256,
            "classes": list(sets["train"].labels.classes),
        },
        request.resume,
        after_save,
    )


def build_optimizer(segmenter: Segmenter, recipe: SegmentationRecipe) -> Optimizer:
    """What is new learns `head_lr_scale` times as fast, but for the neck of mla, which SETR's release counts
    to the backbone.
    """
    optim = recipe.optim
    groups = parameter_groups(
        segmenter, segmenter.backbone, optim.weight_decay, optim.layer_decay, optim.head_lr_scale
    )
    if recipe.head.kind == "mla" and segmenter.neck is not None:
        neck = {id(parameter) for parameter in segmenter.neck.parameters()}
        groups = [
            {**group, "params": members, "lr_scale": scale}
            for group in groups
            for members, scale in (
                ([one for one in group["params"] if id(one) not in neck], group["lr_scale"]),
                ([one for one in group["params"] if id(one) in neck], 1.0),
            )
            if members
        ]
    if optim.name == "sgd":
        return SGD(groups, lr=0.0, momentum=optim.momentum)
    on_gpu = all(one.is_cuda for one in segmenter.parameters())
    return AdamW(groups, lr=0.0, betas=optim.betas, fused=on_gpu or None)


def _baselines(
    request: SegmentationRequest,
    recipe: SegmentationRecipe,
    sets: Mapping[str, SceneSet],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What to compare with: the train set's most frequent class everywhere, and the untrained network."""
    classes = sets["test"].labels.classes
    counts = sets["train"].pixels
    constant = majority(counts, sets["test"].pixels)
    found = {"majority": {"class": classes[int(counts.argmax())], **scores(constant, classes)}}
    if recipe.test.initialisation:
        fresh = build_segmenter(request.name, recipe, len(classes), request.network).to(accelerator.device)
        found["initialisation"] = scores(
            segmenter_confusion(fresh, sets["test"], recipe, accelerator), classes
        )
    return found


def _drawing(tests: SceneSet, drawn: set[int], folder: Path) -> See:
    def see(index: int, image: Image, labels: Classes, predicted: Classes) -> None:
        if index in drawn:
            page = picture(image, labels, predicted, tests.labels.classes, tests.labels.colours)
            name = tests.split.scenes[index].name
            _guarded(folder, lambda: save_picture(page, folder / "pictures", name))

    return see


def _refuse_lonely_places(recipe: SegmentationRecipe) -> None:
    """Pyramid pooling makes one place of an image, and a batch norm needs two or more to learn from."""
    if recipe.head.kind == "upernet" and recipe.batch_size < 2:
        raise ConfigError(
            f"batch_size: {recipe.batch_size} is too small for upernet, whose batch norms need two "
            "images; use 2"
        )


def _num_parameters(segmenter: Segmenter) -> dict[str, int]:
    parts = {"backbone": segmenter.backbone, "neck": segmenter.neck, "decoder": segmenter.decoder}
    parts["auxiliary"] = segmenter.auxiliary
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in parts.items()
        if part is not None
    }


def _tell_data(sets: Mapping[str, SceneSet]) -> None:
    for role, scenes in sets.items():
        ignored = scenes.num_ignored / (scenes.num_ignored + int(scenes.pixels.sum()))
        logger.info(
            "%s: %d images of '%s', %d classes, %.1f %% of the pixels without a label",
            role,
            len(scenes),
            scenes.split.name,
            len(scenes.labels.classes),
            100 * ignored,
        )


def _guarded(folder: Path, write: Any) -> None:
    try:
        write()
    except OSError as error:
        raise cannot_write(folder, error) from error
