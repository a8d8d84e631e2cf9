"""The trained module: one backbone call for all views of one shape, then every task reads its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pretrain.models.backbone import Backbone, TokenFill, accept_any_size, encode, num_features
from pretrain.models.teacher import Teacher
from pretrain.optim import ParameterRule
from pretrain.peers import ALONE, Peers
from pretrain.tasks.balance import Balance
from pretrain.tasks.contract import EncodedViews, TaskOutput, TeacherViews
from pretrain.tasks.health import effective_rank, spread
from pretrain.tokens import TokenLayout
from pretrain.views.plan import ViewPlan
from pretrain.views.prepare import Inputs, ViewGroup

BACKBONE_PREFIX = "backbone."  # of the timm names in a checkpoint's weights


@dataclass(frozen=True)
class Reading:
    """What a task reads: views, and what the teacher is to make of some of them."""

    views: tuple[str, ...]
    taps: tuple[int, ...] = ()
    teacher_views: tuple[str, ...] = ()
    teacher_head: str | None = None  # attribute of the task that the teacher has an average of
    student_views: tuple[str, ...] | None = None  # those of `views` that are encoded for it; None: all


class MultiTask(nn.Module):
    """Backbone, task heads and the balance of their losses.

    `mask_token` and `no_position` are made only if a task or a mask needs them, so that no parameter stays
    without gradient. `num_backbone_calls` counts encoder passes since the module was made.
    """

    def __init__(
        self,
        backbone: Backbone,
        layouts: Mapping[int, TokenLayout],
        tasks: Mapping[str, nn.Module],
        readings: Mapping[str, Reading],
        balance: Balance,
        *,
        mask_token: bool,
        no_position: bool,
        recompute: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        """layouts: of the views of each size in px; the first is that of the model's own size."""
        super().__init__()
        self.backbone = backbone
        self.layouts = dict(layouts)
        if len(self.layouts) > 1:
            accept_any_size(backbone)
        for name, task in tasks.items():
            assert not list(task.parameters(recurse=False)), f"{name}: parameters belong into a submodule"
        self.tasks = nn.ModuleDict(tasks)
        self.readings = dict(readings)
        self.encoded_views = {
            view
            for reading in readings.values()
            for view in (reading.views if reading.student_views is None else reading.student_views)
        }
        self.taps = sorted({level for reading in readings.values() for level in reading.taps})
        self.balance = balance
        self.recompute = recompute
        self.peers = peers
        self.num_backbone_calls = 0
        self.measures_rank = False  # in the next forward pass
        self.mask_token = self._token() if mask_token else None
        self.no_position = self._token() if no_position else None

    @property
    def layout(self) -> TokenLayout:
        """Of a view of the model's own size."""
        return next(iter(self.layouts.values()))

    def _token(self) -> nn.Parameter:
        """One learned vector (1, 1, D), three-dimensional as timm's class token, so it is decayed like it."""
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, num_features(self.backbone)), std=0.02))

    def _fill(self, plan: ViewPlan, num_patches: int) -> TokenFill | None:
        if self.mask_token is None and self.no_position is None:
            return None
        patches = plan.patches

        def marked(index: Tensor) -> Tensor:
            none = torch.zeros(len(index), num_patches, dtype=torch.bool, device=index.device)
            return none.scatter(1, index, True)

        masked = marked(patches.inpainting)
        if plan.mask is not None and plan.mask.kept is None:
            masked = masked | plan.mask.hidden
        return TokenFill(masked, self.mask_token, marked(patches.pairs.flatten(1)), self.no_position)

    def _encode(self, group: ViewGroup, inputs: Inputs) -> EncodedViews:
        self.num_backbone_calls += 1
        layout = self.layouts[group.images.shape[-1]]
        kept = None if group.plan.mask is None else group.plan.mask.kept
        tokens = encode(
            self.backbone,
            group.images,
            layout,
            self._fill(group.plan, layout.num_patches),
            taps=self.taps if kept is None else (),
            recompute=self.recompute,
            kept=kept,
        )
        return EncodedViews(
            group.names,
            layout,
            tokens.final,
            group.clean,
            group.plan,
            whole=group.whole,
            changed=group.changed,
            taps=tokens.taps,
            teacher=inputs.teacher,
            labels=inputs.labels,
            sample_ids=inputs.sample_ids,
            moment=inputs.moment,
        )

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """0-dimensional tensors: `total`, and per task `loss/T`, `weight/T` and `T/<metric>`."""
        encoded, outputs = self._outputs(inputs)
        total, weights = self.balance({name: output.loss for name, output in outputs.items()})
        named = {"total": total, **health(encoded[0], self.measures_rank)}
        for name, output in outputs.items():
            named[f"loss/{name}"] = output.loss.detach()
            named[f"weight/{name}"] = weights[name].detach()
            named |= {f"{name}/{metric}": value.detach() for metric, value in output.metrics.items()}
        return named

    def _outputs(self, inputs: Inputs) -> tuple[list[EncodedViews], dict[str, TaskOutput]]:
        # what only the teacher looks at is not encoded
        groups = [group.select(self.encoded_views) for group in inputs.groups]
        encoded = [self._encode(group, inputs) for group in groups if group is not None]
        # not through __call__: ZeRO-3's hooks see tensors only, and the parameters are the heads'
        outputs = {
            name: task.forward(views_for(encoded, self.readings[name].views), self.peers)
            for name, task in self.tasks.items()
        }
        return encoded, outputs

    def task_losses(self, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of each task by itself, with its graph, and what the total multiplies it by."""
        _, outputs = self._outputs(inputs)
        losses = {name: output.loss for name, output in outputs.items()}
        return losses, self.balance(losses)[1]

    def finish_step(self) -> None:
        """Called once after every optimizer step: what tasks keep in buffers may move on.

        The engine puts the buffers back after a step that was skipped, which only the device knows.
        """
        for task in self.tasks.values():
            finish = getattr(task, "finish_step", None)
            if finish is not None:
                finish()

    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        """How some parameters are stepped; tasks name them relative to themselves."""
        rules: list[ParameterRule] = []
        for name, task in self.tasks.items():
            of_task: Callable[[], Sequence[ParameterRule]] = getattr(task, "parameter_rules", tuple)
            rules += [replace(rule, prefix=f"tasks.{name}.{rule.prefix}") for rule in of_task()]
        return tuple(rules)

    def make_teacher(self) -> Teacher:
        """An average of the backbone, and of the heads that tasks want it to have."""
        heads = {
            f"tasks.{name}.{reading.teacher_head}": getattr(self.tasks[name], reading.teacher_head)
            for name, reading in self.readings.items()
            if reading.teacher_head
        }
        return Teacher(self.backbone, heads)

    def consult(self, teacher: Teacher, inputs: Inputs) -> Inputs:
        """The inputs with what the teacher makes of the views that tasks want it to see; one encoder pass."""
        asked = {view for reading in self.readings.values() for view in reading.teacher_views}
        if not asked:
            return inputs
        parts, names = [], []
        for group in inputs.groups:
            num_images = len(group.images) // len(group.names)
            for place, name in enumerate(group.names):
                if name in asked:
                    assert group.whole is not None
                    parts.append(group.whole[place * num_images : (place + 1) * num_images])
                    names.append(name)
        layout = self.layouts[parts[0].shape[-1]]
        same = inputs.groups[0].whole
        images = same if same is not None and tuple(names) == inputs.groups[0].names else torch.cat(parts)
        tokens = teacher.encode(images, layout)
        seen = TeacherViews(tuple(names), layout, tokens, {})
        heads = {
            name: {
                view: teacher.project(
                    f"tasks.{name}.{reading.teacher_head}", layout.image_feature(seen.of_view(view))
                )
                for view in reading.teacher_views
            }
            for name, reading in self.readings.items()
            if reading.teacher_head
        }
        return replace(inputs, teacher=replace(seen, heads=heads))


def health(views: EncodedViews, with_rank: bool) -> dict[str, Tensor]:
    """Numbers that tell a collapse, of the image features of this rank."""
    found = spread(views.features, len(views.names))
    if with_rank and views.num_images > 1:
        found["effective_rank"] = effective_rank(views.features[: views.num_images])
    return found


def views_for(encoded: list[EncodedViews], names: tuple[str, ...]) -> EncodedViews:
    """The named views: those of the first one's shape, the others behind `more`."""
    main, *more = [
        views.select(tuple(name for name in names if name in views.names))
        for views in sorted(encoded, key=lambda views: names[0] not in views.names)
        if any(name in views.names for name in names)
    ]
    return replace(main, more=tuple(more)) if more else main
