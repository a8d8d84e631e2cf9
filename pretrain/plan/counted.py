"""The cost of a backbone that no table knows (Swin, T2T-ViT, other arguments), counted on the module itself.

It is built without memory on torch's meta device where that is possible, and one image goes forward and
backward under torch's own FLOP counter. Attention is computed as plain products meanwhile, because the fused
kinds count the products that they compute twice.
"""

from __future__ import annotations

import json
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.backbone import (
    Backbone,
    BackboneConfig,
    accept_any_size,
    create_backbone,
    encode,
    layout_of,
    levels_of,
    num_features,
)
from pretrain.plan import recipe
from pretrain.plan.backbone import CHANNELS, Encoder
from pretrain.plan.cost import Cost, total
from pretrain.plan.heads import Level
from pretrain.plan.recipe import Settings

META, CPU = torch.device("meta"), torch.device("cpu")


def counted_encoder(settings: Settings) -> Encoder:
    """As `backbone.encoder_of`."""
    model = json.dumps(settings["model"])
    registers = recipe.registers(settings)
    seen = [recipe.seen_of(settings, name) for name in settings["views"]]
    backbone = _built(model, len(registers), META)
    costs = [_cost(model, registers, view.size_px, round(view.num_kept)) for view in seen]
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    parameters = Cost(
        parameters=trained,
        frozen=sum(p.numel() for p in backbone.parameters()) - trained,
        matrices=sum(p.numel() for p in backbone.parameters() if p.dim() in (2, 4)),
    )
    return Encoder(
        name=str(settings["model"]["name"]),
        dim=num_features(backbone),
        levels=tuple(Level(level.dim, level.stride_px) for level in levels_of(backbone)),
        cost=parameters + total(costs),
        whole={
            view.size_px: _cost(model, registers, view.size_px, view.num_patches).forward for view in seen
        },
        is_counted=True,
    )


def _config(model_json: str) -> BackboneConfig:
    return BackboneConfig.model_validate_json(model_json, strict=True)


@cache
def _built(model_json: str, num_registers: int, device: torch.device) -> Backbone:
    config = _config(model_json)
    with torch.random.fork_rng(devices=[]):
        try:
            with device:
                backbone = create_backbone(config, num_registers)
        except RuntimeError:  # values that are computed, or an older timm
            backbone = create_backbone(config, num_registers).to(device)
    accept_any_size(backbone)
    return backbone.train()


@cache
def _cost(model_json: str, registers: tuple[str, ...], size_px: int, num_kept: int) -> Cost:
    """Of one view of one image, of which so many patches are kept; no parameters."""
    try:
        return _counted(model_json, registers, size_px, num_kept, META)
    except RuntimeError:  # autocast, which T2T-ViT switches off in part, knows no such device
        return _counted(model_json, registers, size_px, num_kept, CPU)


def _counted(
    model_json: str, registers: tuple[str, ...], size_px: int, num_kept: int, device: torch.device
) -> Cost:
    backbone = _built(model_json, len(registers), device)
    layout = layout_of(_config(model_json), registers, size_px)
    images = torch.zeros(1, CHANNELS, size_px, size_px, device=device)
    kept = None
    if num_kept < layout.num_patches:
        kept = torch.arange(num_kept, device=device).unsqueeze(0)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        with counter:
            tokens = encode(backbone, images, layout, kept=kept).final
        forward = float(counter.get_total_flops())
        with counter:
            tokens.sum().backward()  # type: ignore[no-untyped-call]
        backward = float(counter.get_total_flops())
    backbone.zero_grad(set_to_none=True)
    return Cost(forward=forward, backward=backward)
