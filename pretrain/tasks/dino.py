"""DINO: every crop predicts how the averaged teacher sorts the other crops onto prototypes."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import cross_view_cross_entropy, sharpened
from pretrain.models.heads import PrototypeHead
from pretrain.optim import ParameterRule
from pretrain.peers import Peers
from pretrain.schedules import linear_ramp
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite

Temperature = Annotated[float, Field(gt=0)]


class DinoConfig(TaskConfig):
    teacher_views: tuple[str, ...] | None = None  # the global crops; None: the first two views it reads
    temperature: Temperature = 0.1  # of the student
    teacher_temperature: Temperature = 0.04  # after its warm-up, along a line over whole epochs
    teacher_temperature_start: Temperature = 0.04
    teacher_temperature_warmup_epochs: Annotated[int, Field(ge=0)] = 0
    center_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    hidden_dim: Annotated[int, Field(gt=0)] = 2048  # of the head
    bottleneck_dim: Annotated[int, Field(gt=0)] = 256  # of the space that holds the prototypes
    out_dim: Annotated[int, Field(ge=2)] = 65536  # prototypes
    norm_last_layer: bool = True  # prototypes are of length 1; false: of a learned length
    freeze_last_layer_epochs: Annotated[float, Field(ge=0)] = 1.0  # at the start


def teacher_temperature(config: DinoConfig, epoch: float) -> float:
    """Constant within an epoch, and final from the last epoch of the warm-up on, as in the release."""
    start, final = config.teacher_temperature_start, config.teacher_temperature
    return linear_ramp(start, final, config.teacher_temperature_warmup_epochs)(math.floor(epoch))


@torch.no_grad()
def agreement(logits: Tensor, targets: Tensor, places: list[int], peers: Peers) -> tuple[Tensor, Tensor]:
    """How often student and teacher prefer the same prototype for two views of one image, and how often for
    views of two different images. Arguments as in `cross_view_cross_entropy` -> (), ()

    Counted over the global batch. Both are 1 when all images share one prototype.
    """
    student, teacher = logits.argmax(dim=2), targets.argmax(dim=2)  # (S, B), (T, B)
    num_views, num_teachers, num_prototypes = len(student), len(teacher), logits.shape[2]
    same = (student.unsqueeze(0) == teacher.unsqueeze(1)).sum(dim=2).float()  # (T, S)
    same_view = same[range(num_teachers), places].sum()
    usage = [
        same.new_zeros(num_prototypes).index_add(0, best, same.new_ones(len(best)))
        for best in (student.flatten(), teacher.flatten())
    ]
    counts = peers.sum(torch.cat([*usage, same.sum().reshape(1), same_view.reshape(1)]))
    of_student, of_teacher = counts[:num_prototypes], counts[num_prototypes:-2]
    num_images = logits.shape[1] * peers.world_size
    agree = (counts[-2] - counts[-1]) / (num_teachers * (num_views - 1) * num_images)
    by_chance = (of_student * of_teacher).sum() - counts[-2]  # among ordered pairs of different images
    num_strangers = num_views * num_teachers * num_images * max(1, num_images - 1)
    return agree, by_chance / num_strangers


class DinoTask(nn.Module):
    """Self-distillation with no labels (Caron et al., 2021, arXiv:2104.14294).

    The student sees all crops, the teacher the global ones. Metrics: `agreement` of student and teacher on
    the best prototype of an image; `chance`, the same between different images; `teacher_entropy` in nats,
    which falls to 0 or rises to `entropy_bound`, ln K, in a collapse; and `divergence`, that of Kullback and
    Leibler between teacher and student, which then vanishes.
    """

    center: Tensor  # (K,) float32: running mean of the teacher's logits
    pending: Tensor  # (K,) float32: sum of the teacher's logits since the centre moved, over all ranks
    num_pending: Tensor  # int64 (1,): how many they are

    def __init__(self, config: DinoConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.head = PrototypeHead(
            site.embed_dim,
            config.hidden_dim,
            config.bottleneck_dim,
            config.out_dim,
            learn_gain=not config.norm_last_layer,
        )
        self.register_buffer("center", torch.zeros(config.out_dim))
        self.register_buffer("pending", torch.zeros(config.out_dim))
        self.register_buffer("num_pending", torch.zeros(1, dtype=torch.int64))

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        assert views.teacher is not None
        shapes = (views, *views.more)
        names = [name for of_shape in shapes for name in of_shape.names]
        rows = torch.cat([of_shape.features for of_shape in shapes])  # (S * B, D)
        logits = self.head(rows).unflatten(0, (len(names), -1))  # (S, B, K)
        projected = views.teacher.heads["dino"]
        places = [names.index(name) for name in projected]
        teacher_logits = torch.stack(list(projected.values()))  # (T, B, K)
        temperature = teacher_temperature(self.config, views.moment.epoch)
        targets = sharpened(teacher_logits, self.center, temperature)
        loss = cross_view_cross_entropy(logits, targets, places, self.config.temperature)
        if self.training:
            self._collect(teacher_logits, peers)
        agree, chance = agreement(logits, targets, places, peers)
        entropy = torch.special.entr(targets).sum(dim=2).mean()
        metrics = {
            "agreement": agree,
            "chance": chance,
            "teacher_entropy": entropy,
            "entropy_bound": entropy.new_full((), math.log(self.config.out_dim)),
            "divergence": loss.detach() - entropy,  # each of the teacher's views is in equally many terms
        }
        return TaskOutput(loss, metrics)

    @torch.no_grad()
    def _collect(self, teacher_logits: Tensor, peers: Peers) -> None:
        flat = teacher_logits.flatten(0, 1).to(self.pending.dtype)
        self.pending += peers.sum(flat.sum(dim=0))
        self.num_pending += len(flat) * peers.world_size

    @torch.no_grad()
    def finish_step(self) -> None:
        """The centre follows the mean over all micro steps and ranks of a step (eq. 4)."""
        mean = self.pending / self.num_pending.clamp(min=1)
        share = (1 - self.config.center_momentum) * (self.num_pending > 0).to(mean.dtype)
        self.center.lerp_(mean, share)
        self.pending.zero_()
        self.num_pending.zero_()

    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        frozen_epochs = self.config.freeze_last_layer_epochs
        return (ParameterRule("head.last.", frozen_epochs=frozen_epochs),) if frozen_epochs else ()


def teacher_views(config: DinoConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """The global crops."""
    return names[:2] if config.teacher_views is None else config.teacher_views


def unsuited(config: DinoConfig, surroundings: Surroundings) -> str | None:
    views = surroundings.views
    if len(views) < 2:
        return "every view predicts what the teacher makes of others, but it reads one view; add a view"
    of_teacher = teacher_views(config, tuple(views))
    unknown = [name for name in of_teacher if name not in views]
    if unknown:
        return f"teacher_views: '{unknown[0]}' is none of the views it reads; known: {', '.join(views)}"
    if len(set(of_teacher)) < len(of_teacher) or not of_teacher:
        return f"teacher_views: {list(of_teacher)} must name one or more different views"
    sizes_px = {views[name].size_px for name in of_teacher}
    if sizes_px != {surroundings.model.img_px}:
        return (
            f"its teacher would encode views of {sorted(sizes_px)} px, not of model.img_px, "
            f"{surroundings.model.img_px}; name the global crops in `teacher_views`"
        )
    return None
