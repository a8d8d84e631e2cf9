"""RunConfig -> parts: checks what spans several sections, and makes the objects that the loop runs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import torch
from timm.models.vision_transformer import VisionTransformer

from pretrain.config import RunConfig
from pretrain.data.loader import order_of
from pretrain.data.manifest import Split
from pretrain.engine.deepspeed_engine import DeepSpeedEngine, check_deepspeed_config
from pretrain.engine.engine import Engine
from pretrain.engine.local import LocalEngine
from pretrain.errors import ConfigError
from pretrain.models.backbone import create_backbone, layout_of
from pretrain.models.heads import synchronize_batch_norm
from pretrain.peers import Peers
from pretrain.schedules import Schedule, cosine_with_warmup
from pretrain.tasks import TASKS
from pretrain.tasks.balance import Balance
from pretrain.tasks.contract import TaskSite
from pretrain.tasks.multitask import MultiTask
from pretrain.tokens import TokenLayout
from pretrain.views.plan import PatchConfig
from pretrain.views.prepare import Recipe


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

    @property
    def local_batch(self) -> int:
        return self.global_batch // self.world_size


def registers(config: RunConfig) -> tuple[str, ...]:
    """The tasks that read a register token of their own, in token order."""
    return tuple(name for name in config.tasks.enabled() if TASKS[name].needs_register)


def token_layout(config: RunConfig) -> TokenLayout:
    return layout_of(config.model, registers(config))


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
    return PatchConfig(layout.grid, config.model.patch_px, **asked)  # type: ignore[arg-type]


def recipe(config: RunConfig) -> Recipe:
    inpainting = config.tasks.inpainting
    return Recipe(
        tuple(config.views),
        tuple(config.views.values()),
        patch_config(config),
        config.normalization.mean,
        config.normalization.std,
        blank_inpainting=inpainting is not None and inpainting.fill == "zero",
    )


def check(config: RunConfig, world_size: int) -> None:
    """Everything that can be known to be wrong from the settings alone. Raises ConfigError."""
    if not config.tasks.enabled():
        raise ConfigError(f"tasks: none is named; name one or more of {', '.join(TASKS)}")
    _check_model(config)
    _check_views(config)
    _check_tasks(config)
    _check_patches(config)
    _check_batch(config, world_size)
    _check_schedule(config)
    if config.engine.kind == "deepspeed":
        check_deepspeed_config(config.engine)
    elif world_size > 1:
        raise ConfigError(
            f"engine.kind: 'local' trains on one process, not on {world_size}; use 'deepspeed' or --nproc 1"
        )


# arguments of timm that follow from ours, and where to set them instead
_OWNED_MODEL_ARGS = {
    "img_size": "model.img_px",
    "patch_size": "model.patch_px",
    "class_token": "model.class_token",
    "pos_embed": "model.pos_embed",
    "drop_path_rate": "model.drop_path_ratio",
    "reg_tokens": "tasks",
    "num_classes": "tasks",
    "dynamic_img_size": "model.img_px",
}
_ENCODED_PARTS = {"patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre", "blocks", "norm"}


def _check_model(config: RunConfig) -> None:
    """Build the backbone without memory for its weights, and compare its tokens with the layout."""
    for key, owner in _OWNED_MODEL_ARGS.items():
        if key in config.model.args:
            raise ConfigError(f"model.args.{key}: follows from '{owner}'; remove it here and set that")
    layout = token_layout(config)
    try:
        with torch.device("meta"):
            vit = create_backbone(config.model, len(layout.registers))
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"model.args: timm refuses them for '{config.model.name}': {reason}") from None
    left_out = {name.partition(".")[0] for name, _ in vit.named_parameters()} - _ENCODED_PARTS
    if left_out:
        raise ConfigError(
            f"model: '{config.model.name}' has parts that pretraining would never train: "
            f"{', '.join(sorted(left_out))}; choose a plain ViT and leave pooling to the class token"
        )
    found = (int(vit.num_prefix_tokens), int(vit.patch_embed.num_patches))
    if found != (layout.num_prefix, layout.num_patches):
        raise ConfigError(
            f"model.name: '{config.model.name}' has {found[0]} prefix and {found[1]} patch tokens, the "
            f"settings ask for {layout.num_prefix} and {layout.num_patches}; choose a plain ViT, or set "
            "model.class_token"
        )


def _check_tasks(config: RunConfig) -> None:
    for name, settings in config.tasks.enabled().items():
        if settings.weight < 0:
            raise ConfigError(f"tasks.{name}.weight: {settings.weight} is below 0; use 0 or more")


def _check_views(config: RunConfig) -> None:
    if not config.views:
        raise ConfigError("views: none is named; a view needs a name, such as `one: {}`")
    for name, view in config.views.items():
        if view.size_px != config.model.img_px:
            raise ConfigError(
                f"views.{name}.size_px: {view.size_px} differs from model.img_px, {config.model.img_px}"
            )
        ranges = {"scale": view.scale, "aspect": view.aspect, "blur.sigma_px": view.blur.sigma_px}
        for setting, (low, high) in ranges.items():
            if not 0 < low <= high:
                raise ConfigError(
                    f"views.{name}.{setting}: [{low}, {high}] is not a range above 0, low to high"
                )
        if view.scale[1] > 1:
            raise ConfigError(
                f"views.{name}.scale: a crop covers at most 1.0 of the image, not {view.scale[1]}"
            )
    if len({view.corrupt for view in config.views.values()}) > 1:
        raise ConfigError(
            "views: `corrupt` differs between views; views that are encoded together must agree"
        )
    for task in ("contrastive", "clustering"):
        if getattr(config.tasks, task) is not None and len(config.views) < 2:
            raise ConfigError(
                f"tasks.{task}: compares two views, but `views` names {len(config.views)}; add one"
            )
    turned = [name for name, view in config.views.items() if view.turn]
    if config.tasks.rotation is not None and len(turned) < len(config.views):
        raise ConfigError(
            "tasks.rotation: needs `turn: true` in every view, or every label would be 'not turned'"
        )
    if config.tasks.contrastive is not None and not config.model.class_token:
        raise ConfigError("tasks.contrastive: reads the class token; set model.class_token: true")
    for task in ("contrastive", "clustering"):
        chosen = getattr(getattr(config.tasks, task), "views", None)
        for name in chosen or ():
            if name not in config.views:
                raise ConfigError(
                    f"tasks.{task}.views: no view is named '{name}'; known: {', '.join(config.views)}"
                )
        if chosen and len(set(chosen)) < 2:
            raise ConfigError(f"tasks.{task}.views: '{chosen[0]}' is compared with itself; name two views")


def _check_patches(config: RunConfig) -> None:
    patches = patch_config(config)
    num_patches = patches.num_patches
    if patches.total > num_patches // 2:
        parts = {
            "colorization": patches.colorization,
            "inpainting": patches.inpainting,
            "relative_position": 2 * patches.pairs,
            "jigsaw": patches.jigsaw,
        }
        shares = ", ".join(f"{name} {count}" for name, count in parts.items() if count)
        raise ConfigError(
            f"tasks: patch-level tasks work on {patches.total} of {num_patches} patches ({shares}), "
            "more than half of the image; lower their ratios"
        )
    if patches.jigsaw_mode == "permset" and patches.jigsaw and min(patches.grid) < 3:
        raise ConfigError(
            f"tasks.jigsaw.mode: 'permset' needs a grid of 3x3 patches, this one is {patches.grid}"
        )
    if patches.total and not next(iter(config.views.values())).corrupt:
        raise ConfigError(
            "views: patch-level tasks are on, but `corrupt` is false in every view; set it to true"
        )


def _check_batch(config: RunConfig, world_size: int) -> None:
    size, accumulation, lanes = config.batch.global_size, config.batch.accumulation_steps, config.data.lanes
    if lanes % world_size:
        raise ConfigError(
            f"data.lanes: {lanes} lanes cannot be shared equally by {world_size} ranks; "
            f"{_nearest(lanes, world_size)}"
        )
    unit = lanes * accumulation
    if size % unit:
        raise ConfigError(
            f"batch.global_size: {size} is not divisible by data.lanes * batch.accumulation_steps = "
            f"{lanes} * {accumulation}; {_nearest(size, unit)}, or fewer lanes"
        )


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"nearest legal values: {below} and {below + unit}" if below else f"nearest legal value: {unit}"


def _check_schedule(config: RunConfig) -> None:
    schedule = config.schedule
    if (schedule.steps is None) == (schedule.epochs is None):
        raise ConfigError("schedule: give either `steps` or `epochs`")
    if schedule.warmup_steps is not None and schedule.warmup_epochs is not None:
        raise ConfigError("schedule: give either `warmup_steps` or `warmup_epochs`, not both")
    for unit in ("steps", "epochs"):
        length, warmup = getattr(schedule, unit), getattr(schedule, f"warmup_{unit}")
        if length is not None and warmup is not None and warmup >= length:
            raise ConfigError(f"schedule.warmup_{unit}: {warmup} is not below schedule.{unit}, {length}")
    base = config.optim.scaled_lr(config.batch.global_size)
    if schedule.final_lr > base:
        raise ConfigError(
            f"schedule.final_lr: {schedule.final_lr:g} is above the learning rate it ends, {base:g} "
            "(optim.base_lr scaled to the batch); lower it"
        )


def sizes(config: RunConfig, world_size: int) -> Sizes:
    return Sizes(config.batch.global_size, config.batch.accumulation_steps, world_size)


def micro_step_batch(config: RunConfig) -> int:
    """Images of all ranks in one micro step."""
    return config.batch.global_size // config.batch.accumulation_steps


def check_order(config: RunConfig, split: Split) -> None:
    """Raises ConfigError if the lanes do not fit the data."""
    order_of(config.data, split, config.seed, micro_step_batch(config))


def num_steps(config: RunConfig, num_samples: int) -> int:
    if config.schedule.steps is not None:
        return config.schedule.steps
    assert config.schedule.epochs is not None
    return max(1, round(config.schedule.epochs * num_samples / config.batch.global_size))


def lr_schedule(config: RunConfig, num_samples: int) -> Schedule:
    schedule = config.schedule
    warmup = schedule.warmup_steps or 0
    if schedule.warmup_epochs is not None:
        warmup = round(schedule.warmup_epochs * num_samples / config.batch.global_size)
    base = config.optim.scaled_lr(config.batch.global_size)
    return cosine_with_warmup(base, schedule.final_lr, num_steps(config, num_samples), warmup)


def _fresh_backbone(config: RunConfig, num_registers: int) -> VisionTransformer:
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


def module(config: RunConfig, peers: Peers, device: torch.device) -> MultiTask:
    """Backbone and task heads with fresh weights, the same on every rank and for every order of the tasks."""
    layout = token_layout(config)
    enabled = config.tasks.enabled()
    with torch.random.fork_rng(devices=[]):
        backbone = _fresh_backbone(config, len(layout.registers))
        site = TaskSite(layout, backbone.embed_dim, config.model.patch_px)
        tasks = {}
        for name, settings in enabled.items():
            torch.manual_seed(config.seed ^ zlib.crc32(name.encode()))  # of its own, whatever other tasks run
            tasks[name] = TASKS[name].task(settings, site)
        balance = Balance(
            {name: TASKS[name].likelihood for name in enabled},
            {name: settings.weight for name, settings in enabled.items()},
            config.balance,
        )
        torch.manual_seed(config.seed)
        inpainting, relative = config.tasks.inpainting, config.tasks.relative_position
        model = MultiTask(
            backbone,
            layout,
            tasks,
            balance,
            tuple(config.views),
            mask_token=inpainting is not None and inpainting.fill == "token",
            no_position=relative is not None
            and relative.pos_embed == "mask"
            and config.model.pos_embed != "none",
            recompute=config.engine.recompute,
            peers=peers,
        )
    synchronize_batch_norm(model, peers, device.type)
    return model.to(device)


def engine(config: RunConfig, model: MultiTask, peers: Peers) -> Engine:
    if config.engine.kind == "local":
        return LocalEngine(model, config.optim, config.batch.accumulation_steps, config.engine.precision)
    return DeepSpeedEngine(
        model, config.engine, config.optim, peers, config.batch.global_size, config.batch.accumulation_steps
    )


def headlines(config: RunConfig) -> dict[str, str]:
    return {name: TASKS[name].headline for name in config.tasks.enabled()}
