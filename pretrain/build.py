"""RunConfig -> parts: checks what spans several sections, and makes the objects that the loop runs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import torch

from pretrain import schedules
from pretrain.config import RunConfig
from pretrain.engine.deepspeed_engine import DeepSpeedEngine, zero_stage
from pretrain.engine.engine import Engine
from pretrain.engine.local import LocalEngine
from pretrain.models.backbone import (
    Backbone,
    create_backbone,
    layout_of,
    levels_of,
    num_features,
)
from pretrain.models.compiled import compile_blocks
from pretrain.models.heads import synchronize_batch_norm
from pretrain.models.teacher import Teacher
from pretrain.optim import Knobs
from pretrain.peers import Peers
from pretrain.schedules import Schedule
from pretrain.tasks import TASKS
from pretrain.tasks.balance import Balance
from pretrain.tasks.contract import Surroundings, TaskSite
from pretrain.tasks.multitask import MultiTask, Reading
from pretrain.tokens import TokenLayout
from pretrain.views.plan import PatchConfig, ViewConfig, encoder_calls
from pretrain.views.prepare import Moment, Recipe


@dataclass(frozen=True)
class Sizes:
    """How the global batch is divided: global = micro * accumulation * world."""

    global_batch: int
    accumulation_steps: int
    world_size: int

    @property
    def micro_batch(self) -> int:
        """Images of one rank in one micro step."""
        return self.global_batch // self.accumulation_steps // self.world_size


def registers(config: RunConfig) -> tuple[str, ...]:
    """The tasks that read a register token of their own, in token order."""
    return tuple(name for name in config.tasks.enabled() if TASKS[name].needs_register)


def token_layout(config: RunConfig) -> TokenLayout:
    return layout_of(config.model, registers(config))


def views_of(config: RunConfig, task: str) -> tuple[str, ...]:
    """The views a task reads."""
    settings, names = getattr(config.tasks, task), tuple(config.views)
    if settings.views is not None:
        return tuple(settings.views)
    reads = TASKS[task].reads
    if reads == "all":
        return names
    if reads == "group":
        return encoder_calls(config.views)[0]
    return names[:2] if reads == "pair" else names[:1]


def views(config: RunConfig) -> dict[str, ViewConfig]:
    """The views as they are made: only those that a patch-level task reads have patches worked on."""
    readers: dict[str, list[str]] = {name: [] for name in config.views}
    for task in config.tasks.enabled():
        if TASKS[task].patch_request is not None:
            for view in views_of(config, task):
                readers[view].append(task)

    def corrupt(name: str) -> bool | tuple[str, ...]:
        asked = config.views[name].corrupt
        if isinstance(asked, bool):
            return asked and bool(readers[name])
        return tuple(task for task in readers[name] if task in asked) or False

    return {name: view.model_copy(update={"corrupt": corrupt(name)}) for name, view in config.views.items()}


def surroundings(config: RunConfig, task: str, num_samples: int | None = None) -> Surroundings:
    read = {name: config.views[name] for name in views_of(config, task)}
    return Surroundings(read, config.model, token_layout(config), num_samples, micro_step_batch(config))


def teacher_views(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """The views that the averaged teacher encodes for each task that wants it to."""
    asked = {}
    for name, settings in config.tasks.enabled().items():
        wanted = TASKS[name].teacher_views
        if wanted is not None:
            asked[name] = wanted(settings, views_of(config, name))
    return {name: views for name, views in asked.items() if views}


def patch_config(config: RunConfig) -> PatchConfig:
    """The patch sets that the enabled tasks ask for."""
    layout = token_layout(config)
    known = {field.name for field in fields(PatchConfig)}
    asked: dict[str, int | bool | str] = {}
    for name, settings in config.tasks.enabled().items():
        request = TASKS[name].patch_request
        if request is not None:
            asked |= request(settings, layout.num_patches)
    assert asked.keys() <= known, f"PatchConfig does not know {asked.keys() - known}"
    return PatchConfig(layout.grid, config.model.token_px, **asked)  # type: ignore[arg-type]


def recipe(config: RunConfig, trains_on: torch.device | None = None) -> Recipe:
    """trains_on: the device of a training run, on which views may be compiled; a CPU has code of its own."""
    on_gpu = trains_on is not None and trains_on.type == "cuda"
    inpainting = config.tasks.inpainting
    return Recipe(
        views(config),
        patch_config(config),
        config.normalization.mean,
        config.normalization.std,
        blank_inpainting=inpainting is not None and inpainting.fill == "zero",
        needs_whole=bool(teacher_views(config))
        or any(TASKS[name].needs_whole for name in config.tasks.enabled()),
        compiled=on_gpu and compiles(config, "cuda"),
    )


def sizes(config: RunConfig, world_size: int) -> Sizes:
    return Sizes(config.batch.global_size, config.batch.accumulation_steps, world_size)


def micro_step_batch(config: RunConfig) -> int:
    """Images of all ranks in one micro step."""
    return config.batch.global_size // config.batch.accumulation_steps


def num_steps(config: RunConfig, num_samples: int) -> int:
    if config.schedule.steps is not None:
        return config.schedule.steps
    assert config.schedule.epochs is not None
    return max(1, round(config.schedule.epochs * num_samples / config.batch.global_size))


def lr_schedule(config: RunConfig, num_samples: int) -> Schedule:
    schedule = config.schedule
    length = num_steps(config, num_samples)
    if schedule.length_epochs is not None:
        length = max(length, _steps_of(config, schedule.length_epochs, num_samples))
    warmup = warmup_steps(config, num_samples, length)
    base = config.optim.scaled_lr(config.batch.global_size)
    scale = base / config.optim.base_lr if schedule.scale_ends else 1.0
    start, final = schedule.start_lr * scale, schedule.final_lr * scale
    match schedule.kind:
        case "cosine":
            return schedules.cosine_with_warmup(base, final, length, warmup, start)
        case "cosine_over_all":
            return schedules.cosine_over_all(base, final, length, warmup, start)
        case "quarter_cosine":
            return schedules.quarter_cosine(base, final, length, warmup)
        case "constant":
            return schedules.constant(base, warmup, start)


def warmup_steps(config: RunConfig, num_samples: int, length: int) -> int:
    schedule = config.schedule
    if schedule.warmup_epochs is not None:
        return _steps_of(config, schedule.warmup_epochs, num_samples)
    if schedule.warmup_ratio is not None:
        return int(schedule.warmup_ratio * length)
    return schedule.warmup_steps or 0


def _steps_of(config: RunConfig, epochs: float, num_samples: int) -> int:
    return round(epochs * num_samples / config.batch.global_size)


def momentum_schedule(config: RunConfig, length: int) -> Schedule | None:
    teacher = config.teacher
    if teacher is None:
        return None
    match teacher.schedule:
        case "cosine":
            return schedules.cosine_momentum(teacher.momentum, length)
        case "linear":
            return schedules.linear_momentum(teacher.momentum, length)
        case "constant":
            return schedules.constant(teacher.momentum)


@dataclass(frozen=True)
class Timetable:
    """Everything that follows the step."""

    num_steps: int
    images_per_step: int
    num_samples: int
    lr: Schedule
    peak_lr: float
    weight_decay: Schedule
    momentum: Schedule | None  # of the teacher
    seed: int

    def moment(self, step: int) -> Moment:
        epoch = step * self.images_per_step / self.num_samples
        return Moment(step, self.num_steps, epoch, self.seed)

    def knobs(self, step: int) -> Knobs:
        return Knobs(self.lr(step), self.peak_lr, self.weight_decay(step), self.moment(step).epoch)


def timetable(config: RunConfig, num_samples: int) -> Timetable:
    length, optim = num_steps(config, num_samples), config.optim
    decay = schedules.constant(optim.weight_decay)
    if optim.final_weight_decay is not None:
        decay = schedules.cosine_between(optim.weight_decay, optim.final_weight_decay, length)
    return Timetable(
        length,
        config.batch.global_size,
        num_samples,
        lr_schedule(config, num_samples),
        optim.scaled_lr(config.batch.global_size),
        decay,
        momentum_schedule(config, length),
        config.seed,
    )


def _fresh_backbone(config: RunConfig, num_registers: int) -> Backbone:
    """Weights from the seed; registers are drawn apart, so with and without them the rest starts alike."""
    torch.manual_seed(config.seed)
    plain = create_backbone(config.model)
    if not num_registers:
        return plain
    torch.manual_seed(config.seed)
    backbone = create_backbone(config.model, num_registers)
    weights = backbone.state_dict()
    for name, value in plain.state_dict().items():
        if weights[name].shape == value.shape:
            weights[name] = value
        else:  # positions: class token, registers, patches
            num_class = value.shape[1] - plain.patch_embed.num_patches
            own = weights[name][:, num_class : num_class + num_registers]
            weights[name] = torch.cat([value[:, :num_class], own, value[:, num_class:]], dim=1)
    backbone.load_state_dict(weights)
    return backbone


def module(config: RunConfig, peers: Peers, device: torch.device, num_samples: int = 0) -> MultiTask:
    """Backbone and task heads with fresh weights, the same on every rank and for every order of the tasks."""
    layout = token_layout(config)
    enabled = config.tasks.enabled()
    with torch.random.fork_rng(devices=[]):
        backbone = _fresh_backbone(config, len(layout.registers))
        levels = levels_of(backbone)
        site = TaskSite(layout, num_features(backbone), config.model.token_px, levels, num_samples)
        tasks = {}
        for name, settings in enabled.items():
            torch.manual_seed(config.seed ^ zlib.crc32(name.encode()))  # of its own, whatever other tasks run
            tasks[name] = TASKS[name].task(settings, site)
        balance = Balance(
            {name: TASKS[name].likelihood_of(settings) for name, settings in enabled.items()},
            {name: settings.weight for name, settings in enabled.items()},
            config.balance,
        )
        torch.manual_seed(config.seed)
        model = MultiTask(
            backbone,
            _layouts(config),
            tasks,
            {name: _reading(config, name, len(levels)) for name in enabled},
            balance,
            mask_token=needs_mask_token(config),
            no_position=_needs_no_position(config),
            recompute=config.engine.recompute,
            peers=peers,
        )
    synchronize_batch_norm(model, peers, device.type)
    return model.to(device)


def _layouts(config: RunConfig) -> dict[int, TokenLayout]:
    """The tokens of the views of each size, the model's own size first."""
    own = config.model.img_px
    sizes_px = [own, *(view.size_px for view in config.views.values() if view.size_px != own)]
    return {size_px: layout_of(config.model, registers(config), size_px) for size_px in sizes_px}


def _reading(config: RunConfig, task: str, num_levels: int) -> Reading:
    spec, settings = TASKS[task], getattr(config.tasks, task)
    seen = teacher_views(config).get(task, ())
    return Reading(
        views_of(config, task),
        taps=spec.taps(settings, num_levels) if spec.taps else (),
        teacher_views=seen,
        teacher_head=spec.teacher_head if seen else None,
        student_views=spec.student_views(settings, views_of(config, task)) if spec.student_views else None,
    )


def needs_mask_token(config: RunConfig) -> bool:
    inpainting = config.tasks.inpainting
    is_masked = any(view.mask is not None and view.mask.how == "token" for view in config.views.values())
    return is_masked or (inpainting is not None and inpainting.fill == "token")


def _needs_no_position(config: RunConfig) -> bool:
    relative = config.tasks.relative_position
    has_positions = config.model.pos_embed != "none" and not config.model.is_swin
    return relative is not None and relative.pos_embed == "mask" and has_positions


def engine(config: RunConfig, model: MultiTask, peers: Peers, teacher: Teacher | None = None) -> Engine:
    """The engine, and where the config says so, the blocks of the module and of its teacher compiled."""
    made = _engine(config, model, peers)
    if compiles(config, next(model.parameters()).device.type):
        compile_blocks(model, config.engine.compile_mode, dynamic=varies_in_length(config))
        if teacher is not None:  # which sees whole views
            compile_blocks(teacher.backbone, config.engine.compile_mode)
    return made


def compiles(config: RunConfig, device_type: str) -> bool:
    """Whether blocks and views are compiled; ZeRO-3's hooks within blocks cannot be."""
    if config.engine.compile == "auto":
        has_hooks = config.engine.kind == "deepspeed" and zero_stage(config.engine) == 3
        return device_type == "cuda" and not has_hooks
    return config.engine.compile == "on"


def varies_in_length(config: RunConfig) -> bool:
    """Whether the student gets another number of tokens from step to step."""
    masks = [view.mask for view in config.views.values()]
    return any(mask is not None and mask.kind == "multiblock" for mask in masks)


def _engine(config: RunConfig, model: MultiTask, peers: Peers) -> Engine:
    accumulation = config.batch.accumulation_steps
    if config.engine.kind == "local":
        return LocalEngine(
            model, config.optim, accumulation, config.engine.precision, model.parameter_rules()
        )
    return DeepSpeedEngine(
        model,
        config.engine,
        config.optim,
        peers,
        config.batch.global_size,
        accumulation,
        model.parameter_rules(),
    )


def headlines(config: RunConfig) -> dict[str, str]:
    return {name: TASKS[name].headline for name in config.tasks.enabled()}
