"""Every pretext task, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pretrain.tasks import (
    absolute_position,
    angle,
    byol,
    classification,
    cluster_labels,
    clustering,
    colorization,
    contrastive,
    dino,
    distance,
    drloc,
    exemplar,
    grid_relations,
    ijepa,
    inpainting,
    jigsaw,
    mae,
    maskfeat,
    moby,
    moco_v2,
    moco_v3,
    reconstruction,
    relative_position,
    repre,
    rotation,
    simsiam,
    spatial_relation,
)
from pretrain.tasks.balance import Likelihood
from pretrain.tasks.contract import Surroundings, TaskConfig


@dataclass(frozen=True)
class TaskSpec:
    """What the rest of the system needs to know about a task without running it."""

    config: type[TaskConfig]
    task: type[
        nn.Module
    ]  # made with (config, site: TaskSite); called with (views: EncodedViews, peers: Peers)
    likelihood: Likelihood | Callable[[Any], Likelihood]  # how the balance treats the loss
    headline: str  # the metric that tells how well the task is solved; `chance` is in the same unit
    higher_is_better: bool
    # which views it reads unless its settings name them: all that are encoded together with the first one,
    # the first two, the first, or all of any shape
    reads: Literal["group", "pair", "first", "all"] = "group"
    needs_register: bool = False  # reads a register token of its own, under the task's name
    # (config, number of patches) -> fields of PatchConfig: the patches this task works on
    patch_request: Callable[[Any, int], dict[str, int | bool | str]] | None = None
    # (config, where it would be built in) -> why it cannot work there, and the remedy; None if it can
    unsuited: Callable[[Any, Surroundings], str | None] | None = None
    # (config, number of levels) -> the levels whose features it reads
    taps: Callable[[Any, int], tuple[int, ...]] | None = None
    # (config, its views) -> the views that the averaged teacher has to encode for it
    teacher_views: Callable[[Any, tuple[str, ...]], tuple[str, ...]] | None = None
    teacher_head: str | None = None  # its submodule that the teacher has an average of
    # (config, its views) -> those that the student has to encode for it, the first ones; None: all
    student_views: Callable[[Any, tuple[str, ...]], tuple[str, ...]] | None = None
    own_places: bool = False  # its answers stand where what they are about stands: no shuffled views
    needs_whole: bool = False  # reads the clean views normalised (`EncodedViews.whole`)

    def likelihood_of(self, config: Any) -> Likelihood:
        return self.likelihood(config) if callable(self.likelihood) else self.likelihood


TASKS: dict[str, TaskSpec] = {
    "contrastive": TaskSpec(
        contrastive.ContrastiveConfig,
        contrastive.ContrastiveTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        reads="pair",
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
        reads="pair",
        needs_register=True,
    ),
    "colorization": TaskSpec(
        colorization.ColorizationConfig,
        colorization.ColorizationTask,
        colorization.likelihood,
        "error",
        higher_is_better=False,
        patch_request=colorization.patch_request,
        unsuited=colorization.unsuited,
    ),
    "inpainting": TaskSpec(
        inpainting.InpaintingConfig,
        inpainting.InpaintingTask,
        inpainting.likelihood,
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
    "reconstruction": TaskSpec(
        reconstruction.ReconstructionConfig,
        reconstruction.ReconstructionTask,
        "l1",
        "error",
        higher_is_better=False,
        unsuited=reconstruction.unsuited,
        needs_whole=True,
        own_places=True,
    ),
    "repre": TaskSpec(
        repre.RepreConfig,
        repre.RepreTask,
        "l1",
        "error",
        higher_is_better=False,
        reads="first",
        taps=repre.taps,
        own_places=True,
    ),
    "mae": TaskSpec(
        mae.MaeConfig,
        mae.MaeTask,
        "l2",
        "error",
        higher_is_better=False,
        unsuited=mae.unsuited,
        needs_whole=True,
        own_places=True,
    ),
    "ijepa": TaskSpec(
        ijepa.IjepaConfig,
        ijepa.IjepaTask,
        "l2",
        "error",
        higher_is_better=False,
        unsuited=ijepa.unsuited,
        teacher_views=ijepa.teacher_views,
        own_places=True,
    ),
    "maskfeat": TaskSpec(
        maskfeat.MaskfeatConfig,
        maskfeat.MaskfeatTask,
        "l2",
        "error",
        higher_is_better=False,
        unsuited=maskfeat.unsuited,
        needs_whole=True,
        own_places=True,
    ),
    "spatial_relation": TaskSpec(
        spatial_relation.SpatialRelationConfig,
        spatial_relation.SpatialRelationTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        unsuited=grid_relations.unsuited,
    ),
    "distance": TaskSpec(
        distance.DistanceConfig,
        distance.DistanceTask,
        "l2",
        "error_x100",
        higher_is_better=False,
        unsuited=grid_relations.unsuited,
    ),
    "angle": TaskSpec(
        angle.AngleConfig,
        angle.AngleTask,
        "l2",
        "error_x100",
        higher_is_better=False,
        unsuited=grid_relations.unsuited,
    ),
    "absolute_position": TaskSpec(
        absolute_position.AbsolutePositionConfig,
        absolute_position.AbsolutePositionTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        unsuited=absolute_position.unsuited,
    ),
    "drloc": TaskSpec(
        drloc.DrlocConfig,
        drloc.DrlocTask,
        "l1",
        "error",
        higher_is_better=False,
        unsuited=grid_relations.unsuited,
    ),
    "classification": TaskSpec(
        classification.ClassificationConfig,
        classification.ClassificationTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        unsuited=classification.unsuited,
    ),
    "exemplar": TaskSpec(
        exemplar.ExemplarConfig,
        exemplar.ExemplarTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        unsuited=exemplar.unsuited,
    ),
    "cluster_labels": TaskSpec(
        cluster_labels.ClusterLabelsConfig,
        cluster_labels.ClusterLabelsTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        unsuited=cluster_labels.unsuited,
    ),
    "byol": TaskSpec(
        byol.ByolConfig,
        byol.ByolTask,
        "l2",
        "cosine",
        higher_is_better=True,
        reads="pair",
        teacher_views=byol.teacher_views,
        teacher_head="projector",
    ),
    "simsiam": TaskSpec(
        simsiam.SimSiamConfig,
        simsiam.SimSiamTask,
        "l2",
        "cosine",
        higher_is_better=True,
        reads="pair",
    ),
    "moco_v2": TaskSpec(
        moco_v2.MocoV2Config,
        moco_v2.MocoV2Task,
        "ce",
        "accuracy",
        higher_is_better=True,
        reads="pair",
        unsuited=moco_v2.unsuited,
        teacher_views=moco_v2.teacher_views,
        student_views=moco_v2.student_views,
        teacher_head="projector",
    ),
    "moco_v3": TaskSpec(
        moco_v3.MocoV3Config,
        moco_v3.MocoV3Task,
        "ce",
        "accuracy",
        higher_is_better=True,
        reads="pair",
        teacher_views=moco_v3.teacher_views,
        teacher_head="projector",
    ),
    "moby": TaskSpec(
        moby.MobyConfig,
        moby.MobyTask,
        "ce",
        "accuracy",
        higher_is_better=True,
        reads="pair",
        unsuited=moby.unsuited,
        teacher_views=moby.teacher_views,
        teacher_head="projector",
    ),
    "dino": TaskSpec(
        dino.DinoConfig,
        dino.DinoTask,
        "ce",
        "agreement",
        higher_is_better=True,
        reads="all",
        unsuited=dino.unsuited,
        teacher_views=dino.teacher_views,
        teacher_head="head",
    ),
}
