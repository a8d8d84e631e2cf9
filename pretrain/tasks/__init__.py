"""Every pretext task, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pretrain.tasks import (
    clustering,
    colorization,
    contrastive,
    inpainting,
    jigsaw,
    relative_position,
    rotation,
)
from pretrain.tasks.balance import Likelihood
from pretrain.tasks.contract import TaskConfig


@dataclass(frozen=True)
class TaskSpec:
    """What the rest of the system needs to know about a task without running it."""

    config: type[TaskConfig]
    task: type[
        nn.Module
    ]  # made with (config, site: TaskSite); called with (views: EncodedViews, peers: Peers)
    likelihood: Likelihood  # how the balance treats the loss
    headline: str  # the metric that tells how well the task is solved; `chance` is in the same unit
    higher_is_better: bool
    needs_register: bool = False  # reads a register token of its own, under the task's name
    # (config, number of patches) -> fields of PatchConfig: the patches this task works on
    patch_request: Callable[[Any, int], dict[str, int | bool | str]] | None = None


TASKS: dict[str, TaskSpec] = {
    "contrastive": TaskSpec(
        contrastive.ContrastiveConfig, contrastive.ContrastiveTask, "ce", "accuracy", higher_is_better=True
    ),
    "rotation": TaskSpec(
        rotation.RotationConfig,
        rotation.RotationTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        needs_register=True,
    ),
    "clustering": TaskSpec(
        clustering.ClusteringConfig,
        clustering.ClusteringTask,
        "ce",
        "agreement",
        higher_is_better=True,
        needs_register=True,
    ),
    "colorization": TaskSpec(
        colorization.ColorizationConfig,
        colorization.ColorizationTask,
        "l1",
        "error",
        higher_is_better=False,
        patch_request=colorization.patch_request,
    ),
    "inpainting": TaskSpec(
        inpainting.InpaintingConfig,
        inpainting.InpaintingTask,
        "l1",
        "error",
        higher_is_better=False,
        patch_request=inpainting.patch_request,
    ),
    "relative_position": TaskSpec(
        relative_position.RelativePositionConfig,
        relative_position.RelativePositionTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        patch_request=relative_position.patch_request,
    ),
    "jigsaw": TaskSpec(
        jigsaw.JigsawConfig,
        jigsaw.JigsawTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        patch_request=jigsaw.patch_request,
    ),
}
