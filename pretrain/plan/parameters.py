"""How many parameters a run trains, keeps fixed, and averages in a teacher; what a checkpoint of it holds."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.plan import recipe
from pretrain.plan.backbone import Encoder
from pretrain.plan.heads import Site, head, teacher_head
from pretrain.plan.recipe import Settings

FP32 = 4  # bytes; weights, gradients and the optimizer's state are kept so at any precision


@dataclass(frozen=True)
class Parameters:
    """Elements; those of buffers such as queues apart."""

    backbone: int
    heads: dict[str, int]  # by task
    others: int  # mask tokens and the balance of losses
    frozen: int  # of the backbone
    teacher: int
    buffers: int  # of the student
    optimizer: int  # elements of state for each trained one

    @property
    def student(self) -> int:
        return self.backbone + sum(self.heads.values()) + self.others

    @property
    def trained(self) -> int:
        return self.student - self.frozen

    @property
    def checkpoint_bytes(self) -> int:
        """Of the weights of student and teacher and the optimizer's state."""
        return FP32 * (self.student + self.buffers + self.optimizer * self.trained + self.teacher)


def parameters_of(settings: Settings, encoder: Encoder, site: Site) -> Parameters:
    tasks = recipe.tasks_of(settings)
    tokens = recipe.needs_mask_token(settings) + recipe.needs_no_position(settings)
    weights = len(tasks) if settings["balance"]["kind"] == "uncertainty" else 0
    backbone = encoder.cost.parameters + encoder.cost.frozen
    teacher = 0
    if settings["teacher"] is not None:
        seen = recipe.teacher_views(settings)
        named = [name for name in seen if name in recipe.TEACHER_HEADS]
        teacher = backbone + sum(teacher_head(name, site, 1).parameters for name in named)
    optim = settings["optim"]
    averages = 2 if optim["name"] == "adamw" else int(optim["momentum"] > 0)
    return Parameters(
        backbone=backbone,
        heads={name: head(name, site).parameters for name in tasks},
        others=tokens * encoder.dim + weights,
        frozen=encoder.cost.frozen,
        teacher=teacher,
        buffers=sum(_buffers(name, task, site.num_samples) for name, task in tasks.items()),
        optimizer=averages,
    )


def _buffers(name: str, task: Settings, num_samples: int) -> int:
    """Those that are large: queues of keys, centres of prototypes, clusters of images (int64)."""
    if name == "moco_v2":
        return int(task["queue_length"] * task["out_dim"])
    if name == "moby":
        return int(2 * task["queue_length"] * task["out_dim"])
    if name == "dino":
        return int(2 * task["out_dim"])
    return 2 * (num_samples + int(task["num_clusters"])) if name == "cluster_labels" else 0
