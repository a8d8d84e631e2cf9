"""Whether the settings of a run fit together: everything that spans several sections, told in one line."""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from pretrain import build
from pretrain.config import RunConfig
from pretrain.engine.deepspeed_engine import check_deepspeed_config
from pretrain.errors import ConfigError
from pretrain.models.backbone import BackboneConfig, create_backbone
from pretrain.tasks import TASKS


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
    layout = build.token_layout(config)
    try:
        vit = _outline(config.model, len(layout.registers))
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
    _check_prefix_without_positions(config.model, len(layout.registers))


def _check_prefix_without_positions(model: BackboneConfig, num_registers: int) -> None:
    """Older timm forgets class token and registers where there are no positions (seen: 1.0.16 to 1.0.24)."""
    if model.pos_embed != "none":
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        vit = create_backbone(_one_block(model), num_registers).eval()
        num_tokens = vit.forward_features(torch.zeros(1, 3, model.img_px, model.img_px)).shape[1]
    if num_tokens != vit.num_prefix_tokens + vit.patch_embed.num_patches:
        raise ConfigError(
            f"model.pos_embed: timm {timm.__version__} drops class token and registers when it is 'none', so "
            "an export would give other features; install a newer timm, or set it to 'learn'"
        )


def _one_block(model: BackboneConfig) -> BackboneConfig:
    return model.model_copy(update={"args": {**model.args, "depth": 1}})


def _outline(model: BackboneConfig, num_registers: int) -> VisionTransformer:
    """The backbone without memory for its weights; of one block where an older timm cannot do that."""
    try:
        with torch.device("meta"):
            return create_backbone(model, num_registers)
    except RuntimeError:
        with torch.random.fork_rng(devices=[]):
            return create_backbone(_one_block(model), num_registers)


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
    patches = build.patch_config(config)
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
