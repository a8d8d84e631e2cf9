"""The classification head of joint training: what it scores on a test set, just as the run left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import CheckpointError, UserError
from pretrain.evaluate.feature import FeatureName
from pretrain.evaluate.features import Features
from pretrain.evaluate.intervals import wilson_interval
from pretrain.export.source import RunWeights

TASK = "classification"
WEIGHT, BIAS = f"tasks.{TASK}.head.weight", f"tasks.{TASK}.head.bias"  # in the student's weights


def head_feature(source: RunWeights) -> FeatureName:
    """What the head of a run reads: `class` or `mean_patch`, as a name of the encoder's."""
    if TASK not in source.tasks:
        raise UserError(
            f"{source.checkpoint}: this run trained no classification head (its tasks: "
            f"{', '.join(source.tasks) or 'none'}); use `pretrain evaluate linear` or `finetune`"
        )
    if source.backbone.is_swin:
        return "pooled"  # the mean over the last map
    feature: FeatureName = (source.config["tasks"][TASK] or {}).get("feature", "class")
    return feature


def read_head(source: RunWeights) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of the head; the checkpoint was verified when `source` was read."""
    path = source.checkpoint / "weights" / "student.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not {WEIGHT, BIAS} <= names:
                raise CheckpointError(f"{path}: holds no {WEIGHT} and {BIAS}; it is not of a joint training")
            return file.get_tensor(WEIGHT), file.get_tensor(BIAS)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is no safetensors file ({error}); use another checkpoint") from None


def classify(features: Features, weight: Tensor, bias: Tensor, where: Path) -> dict[str, Any]:
    """Top-1 accuracy of a linear head whose output k stands for the label k."""
    if weight.shape[1] != features.features.shape[1]:
        raise CheckpointError(
            f"{where}: the head reads {weight.shape[1]} numbers, the feature has {features.features.shape[1]}"
        )
    logits = torch.addmm(bias, features.features, weight.T)
    num_correct = int((logits.argmax(dim=1) == features.labels).sum())
    count = len(features.labels)
    return {
        "top1_ratio": num_correct / count,
        "top1_ratio_95": list(wilson_interval(num_correct / count, count)),
        "num_correct": num_correct,
        "num_test": count,
        "num_classes": len(weight),
        "chance_ratio": 1 / len(weight),
    }
