"""Model FLOPs of a run, for each image: what the numerator of a model FLOP utilisation counts.

The convention: matrix products only, 2 FLOPs for each multiplication with its addition; a forward pass is
counted once and a backward pass as one product for each operand that needs a gradient, which makes three
times the forward pass less the gradient of the images. What is computed again to save memory is not counted
again (`engine.recompute`, fused attention). The making of the views, norms, activations and the optimizer are
not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.plan import recipe
from pretrain.plan.backbone import Encoder, encoder_of
from pretrain.plan.heads import Site, head, teacher_head
from pretrain.plan.recipe import Settings

if TYPE_CHECKING:
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class StepFlops:
    """FLOPs for each image of the global batch, all its views together."""

    student_forward: float  # backbone and heads
    teacher_forward: float  # backbone and heads of the averaged teacher; 0 without one
    train: float  # forward and backward of the student and forward of the teacher: counts for utilisation
    by_part: dict[str, float]  # adds up to `train`: "backbone", "teacher", and "task/T" of each task T


def train_flops(config: RunConfig, world_size: int = 1, num_samples: int = 0) -> StepFlops:
    """Of a run's config. A multiplication by the images of a step gives the FLOPs of the step.

    world_size: matters only to a contrastive task that does not gather. num_samples: of the training data,
    which the exemplar task has a class for each of. Where masks differ in size from step to step (I-JEPA),
    the mean. Other backbones than plain ViTs are built on torch's meta device to be counted, in seconds.
    """
    settings = config.model_dump(mode="json")
    encoder = encoder_of(settings)
    return flops_of(settings, encoder, site_of(settings, encoder, world_size, num_samples))


def site_of(settings: Settings, encoder: Encoder, world_size: int, num_samples: int) -> Site:
    """Where the heads of a run are built into."""
    batch = settings["batch"]
    of_micro_step = batch["global_size"] // batch["accumulation_steps"]
    return Site(
        settings, encoder.dim, encoder.levels, of_micro_step, of_micro_step // world_size, num_samples
    )


def flops_of(settings: Settings, encoder: Encoder, site: Site) -> StepFlops:
    heads = {name: head(name, site) for name in recipe.tasks_of(settings)}
    seen = recipe.teacher_views(settings)
    asked = {view for views in seen.values() for view in views}
    teacher = sum(encoder.whole[settings["views"][view]["size_px"]] for view in asked)
    for name, views in seen.items():
        if name in recipe.TEACHER_HEADS:
            teacher += teacher_head(name, site, len(views)).forward
    parts = {"backbone": encoder.cost.train, **{f"task/{name}": cost.train for name, cost in heads.items()}}
    if teacher:
        parts["teacher"] = teacher
    return StepFlops(
        student_forward=encoder.cost.forward + sum(cost.forward for cost in heads.values()),
        teacher_forward=teacher,
        train=sum(parts.values()),
        by_part=parts,
    )
