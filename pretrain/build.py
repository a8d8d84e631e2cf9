"""RunConfig -> parts: checks what spans several sections, and makes the objects that the loop runs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import torch
from timm.models.vision_transformer import VisionTransformer

from pretrain.config import RunConfig
from pretrain.engine.deepspeed_engine import DeepSpeedEngine
from pretrain.engine.engine import Engine
from pretrain.engine.local import LocalEngine
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
