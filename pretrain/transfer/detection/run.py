"""A whole transfer to detection: data and settings in; a trained detector, scores and pictures out."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from pretrain.errors import UserError
from pretrain.evaluate.encoder import UNTRAINED
from pretrain.evaluate.finetune_state import FinetuneState, read_state
from pretrain.evaluate.report import results_folder, save_result, versions
from pretrain.export.source import WeightsName, sha256_of
from pretrain.optim import AdamW
from pretrain.transfer.detection.coco import CocoSet, check_images, check_same_categories, read_coco
from pretrain.transfer.detection.config import DetectionConfig
from pretrain.transfer.detection.model import build_detector
from pretrain.transfer.detection.pictures import draw_predictions
from pretrain.transfer.detection.predict import predict
from pretrain.transfer.detection.samples import DetectionSamples, Sample
from pretrain.transfer.detection.score import KINDS, score, single_boxes
from pretrain.transfer.detection.table import table
from pretrain.transfer.training import TrainingConfig, parameter_groups, train

MOST_WORKERS = 16
INITIAL = "initial"  # scores of the detector before its training, so that a resumed one need not look again

Say = Callable[[str], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionRequest:
    """What is transferred to which data, and how."""

    weights: str
    data: Path
    config: DetectionConfig
    out: Path | None = None  # None: in the folder of the weights
    resume: bool = False
    evaluate_only: bool = False  # score the newest state in `out`
    scratch: bool = False  # the control: fresh weights of the same architecture
    network: WeightsName | None = None  # of a run
    device: str | None = None  # "cpu", or None for what the machine has


def run_detection(request: DetectionRequest, say: Say) -> dict[str, Any]:
    """Train, unless only an evaluation is asked for, then score and draw the val split; returns the result.

    Everything that can be wrong with the input is told before training, as a UserError. In OUT: config.yaml,
    metrics.jsonl and step-N/ of the training; result.json, predictions_bbox.json and _segm.json in COCO's
    format of results, pictures/.
    """
    config, out = request.config, _out_of(request)
    accelerator = Accelerator(cpu=request.device == "cpu")
    say = say if accelerator.is_main_process else _silent
    found = _read(request.data, config, accelerator)
    weights = f"{UNTRAINED}{request.weights.removeprefix(UNTRAINED)}" if request.scratch else request.weights
    masks = found["train"].has_masks
    detector = build_detector(weights, len(found["train"].categories), masks, config, request.network)
    identity = _identity(detector, found["train"], config)
    state = _state(out, identity, request)
    accelerator.wait_for_everyone()
    for name, one in found.items():
        say(_line_of(name, one))

    began = time.perf_counter()
    result: dict[str, Any] = {
        "method": "detection",
        "detector": "Mask R-CNN" if masks else "Faster R-CNN",
        "encoder": detector.backbone.encoder.describe(),
        "is_scratch": request.scratch,
        **{name: one.describe() for name, one in found.items()},
        "config": config.model_dump(mode="json"),
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "versions": {**versions(), "torchvision": torchvision.__version__},
        "baselines": _baselines(found) if accelerator.is_main_process else {},
    }
    if config.evaluate.initial and not request.evaluate_only:
        result[INITIAL] = _initial(detector, found["val"], config, accelerator, out, state)
    if request.evaluate_only:
        assert state is not None
        detector.load_state_dict(state.model)
        result["step"], result["train_seconds"] = state.epoch, _seconds(state.history)
    else:
        history = _train(detector, found["train"], config, accelerator, out, identity, request.resume)
        result["step"], result["train_seconds"] = history[-1]["step"], _seconds(history)
    detections = predict(detector, found["val"], config.evaluate, accelerator)
    if accelerator.is_main_process:
        result["scores"] = _scores(found["val"], detections, config)
        result["num_detections"] = len(detections)
        result["seconds"] = time.perf_counter() - began
        _write(out, found["val"], detections, result, config)
        say(table(result))
        say(f"{out / 'result.json'}, pictures in {out / 'pictures'}")
    accelerator.wait_for_everyone()
    return result


def losses_of(model: nn.Module, batch: list[Sample]) -> Mapping[str, Tensor]:
    """Of the region proposals, the boxes and, where there are masks, the masks."""
    device = next(model.parameters()).device
    images = [sample.image.to(device, non_blocking=True).float() / 255 for sample in batch]
    targets = []
    for sample in batch:
        target = {"boxes": sample.boxes, "labels": sample.labels}
        if sample.masks is not None:
            target["masks"] = sample.masks
        targets.append({key: value.to(device, non_blocking=True) for key, value in target.items()})
    losses: Mapping[str, Tensor] = model(images, targets)
    return losses


def _train(
    detector: GeneralizedRCNN,
    found: CocoSet,
    config: DetectionConfig,
    accelerator: Accelerator,
    out: Path,
    identity: Mapping[str, Any],
    resume: bool,
) -> list[dict[str, Any]]:
    samples = DetectionSamples(found, config.augment, found.has_masks, config.data.skip_empty)
    optim, schedule = config.optim, config.schedule
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    detector.to(accelerator.device).train()
    groups = parameter_groups(detector, detector.backbone, optim.weight_decay, optim.layer_decay)
    is_cuda = accelerator.device.type == "cuda"
    num_workers = config.data.num_workers
    if num_workers is None:
        num_workers = min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    return train(
        detector,
        samples,
        losses_of,
        AdamW(groups, betas=optim.betas, fused=is_cuda or None),
        config.lr_schedule(len(samples)),
        TrainingConfig(
            num_steps=config.num_steps(len(samples)),
            batch_size=optim.batch_size,
            seed=config.seed,
            save_every_steps=schedule.save_every_steps,
            log_every_steps=schedule.log_every_steps,
            clip_norm=optim.clip_norm,
            num_workers=num_workers,
        ),
        accelerator,
        out,
        identity,
        resume,
    )


def _out_of(request: DetectionRequest) -> Path:
    if request.out is not None:
        return request.out
    name = "detection_scratch" if request.scratch else "detection"
    return results_folder(request.weights.removeprefix(UNTRAINED), kind="transfer") / name


def _read(folder: Path, config: DetectionConfig, accelerator: Accelerator) -> dict[str, CocoSet]:
    """Both splits, checked against each other and against their images."""
    data = config.data
    train_set = read_coco(folder, data.train, data.skip_invalid, config.model.masks)
    val_set = read_coco(folder, data.val, data.skip_invalid, train_set.has_masks)
    check_same_categories(train_set, val_set)
    told: list[str | None] = [None]
    if accelerator.is_main_process:  # one look at every file is enough
        try:
            check_images(train_set)
            check_images(val_set)
        except UserError as error:
            told = [str(error)]
    broadcast_object_list(told)
    if told[0]:
        raise UserError(told[0])
    return {"train": train_set, "val": val_set}


def _identity(detector: GeneralizedRCNN, found: CocoSet, config: DetectionConfig) -> dict[str, Any]:
    """What a state must agree on: first what decides on the shapes, then what decides on the numbers."""
    body = detector.backbone
    settings = config.model_dump(mode="json")
    num_weights = sum(value.numel() for value in body.network.parameters())
    return {
        "architecture": f"{type(body.network).__name__}, {num_weights} weights, {body.patch_px} px patches",
        "categories": [[category.id, category.name] for category in found.categories],
        "masks": found.has_masks,
        "model": settings["model"],
        "weights": body.encoder.origin,
        "annotations": sha256_of(found.annotations),
        "skip": [settings["data"][key] for key in ("skip_invalid", "skip_empty")],
        "augment": settings["augment"],
        "optim": settings["optim"],
        "schedule": {
            key: value for key, value in settings["schedule"].items() if not key.endswith("_every_steps")
        },
    }


def _state(out: Path, identity: Mapping[str, Any], request: DetectionRequest) -> FinetuneState | None:
    """What is there to be continued or evaluated; the same refusals as the training's own, but earlier."""
    if not request.evaluate_only:
        return read_state(out, identity, request.resume, unit="step")
    shapes = {key: identity[key] for key in ("architecture", "categories", "masks", "model")}
    state = read_state(out, shapes, True, unit="step")
    if state is None:
        raise UserError(f"{out}: holds no trained detector; train first, without --evaluate-only")
    return state


def _initial(
    detector: GeneralizedRCNN,
    found: CocoSet,
    config: DetectionConfig,
    accelerator: Accelerator,
    out: Path,
    state: FinetuneState | None,
) -> dict[str, Any]:
    """Scores before training: the detector has its first weights until the training puts others in."""
    path = out / f"{INITIAL}.json"
    if state is not None and path.is_file():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    detections = predict(detector, found, config.evaluate, accelerator)
    if not accelerator.is_main_process:
        return {}
    scores = _scores(found, detections, config)
    logger.info("before training: box AP %.2f", scores["bbox"]["AP"])
    save_result(out, scores, INITIAL)
    return scores


def _scores(found: CocoSet, detections: list[dict[str, Any]], config: DetectionConfig) -> dict[str, Any]:
    limit = config.evaluate.detections_per_image
    return {kind: score(found, detections, kind, limit) for kind in KINDS[: 1 + found.has_masks]}


def _baselines(found: Mapping[str, CocoSet]) -> dict[str, Any]:
    boxes = single_boxes(found["train"], found["val"], found["val"].has_masks)
    kinds = KINDS[: 1 + found["val"].has_masks]
    return {
        name: {kind: score(found["val"], detections, kind) for kind in kinds}
        for name, detections in boxes.items()
    }


def _write(
    out: Path,
    found: CocoSet,
    detections: list[dict[str, Any]],
    result: dict[str, Any],
    config: DetectionConfig,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS[: 1 + found.has_masks]:
        other = "segmentation" if kind == "bbox" else "bbox"
        rows = [{key: value for key, value in one.items() if key != other} for one in detections]
        (out / f"predictions_{kind}.json").write_text(json.dumps(rows))
    test = config.evaluate
    draw_predictions(found, detections, out / "pictures", test.pictures, test.picture_threshold)
    save_result(out, result, "result")


def _seconds(history: list[dict[str, Any]]) -> float:
    return float(sum(row["seconds"] for row in history))


def _line_of(name: str, found: CocoSet) -> str:
    masks = "masks" if found.has_masks else "boxes only"
    skipped = f", {found.num_skipped} invalid ones left out" if found.num_skipped else ""
    crowds = f", {int(found.crowds.sum())} crowds" if found.crowds.any() else ""
    return (
        f"{name}: {len(found)} images, {int((~found.crowds).sum())} objects ({masks}){crowds}{skipped}, "
        f"{len(found.categories)} categories"
    )


def _silent(line: str) -> None:
    pass
