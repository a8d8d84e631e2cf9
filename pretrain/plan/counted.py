"""The cost of a backbone that no table knows (Swin, T2T-ViT, other arguments), counted on the module itself.

It is built without memory on torch's meta device where that is possible, and one image goes forward and
backward under torch's own FLOP counter. Attention is computed as plain products meanwhile, because the fused
kinds count the products that they compute twice.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor
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
from pretrain.plan.backbone import CHANNELS, Encoder, by_calls
from pretrain.plan.cost import Cost, total
from pretrain.plan.heads import Level
from pretrain.plan.recipe import Settings

META, CPU = torch.device("meta"), torch.device("cpu")
BYTES = 4  # of an element, whatever its kind


def counted_encoder(settings: Settings) -> Encoder:
    """As `backbone.encoder_of`."""
    model = json.dumps(settings["model"])
    registers = recipe.registers(settings)
    seen = [recipe.seen_of(settings, name) for name in recipe.encoded_views(settings)]
    backbone = _built(model, len(registers), META)
    counts = [_count(model, registers, view.size_px, round(view.num_kept)) for view in seen]
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
        cost=parameters + total(count.cost for count in counts),
        blocks=total(count.blocks for count in counts),
        block_inputs=sum(count.block_inputs for count in counts),
        largest=max(by_calls(settings, [count.largest for count in counts]), key=lambda cost: cost.saved),
        unfused=Cost(),
        whole={
            view.size_px: _count(model, registers, view.size_px, view.num_patches).cost.forward
            for view in (recipe.seen_of(settings, name) for name in settings["views"])
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


@dataclass(frozen=True)
class _Count:
    """Of one view of one image; no parameters."""

    cost: Cost
    blocks: Cost
    block_inputs: float
    largest: Cost


@cache
def _count(model_json: str, registers: tuple[str, ...], size_px: int, num_kept: int) -> _Count:
    """num_kept: patches that are not dropped."""
    try:
        return _counted(model_json, registers, size_px, num_kept, META)
    except RuntimeError:  # autocast, which T2T-ViT switches off in part, knows no such device
        return _counted(model_json, registers, size_px, num_kept, CPU)


def _counted(
    model_json: str, registers: tuple[str, ...], size_px: int, num_kept: int, device: torch.device
) -> _Count:
    backbone = _built(model_json, len(registers), device)
    layout = layout_of(_config(model_json), registers, size_px)
    images = torch.zeros(1, CHANNELS, size_px, size_px, device=device)
    kept = None
    if num_kept < layout.num_patches:
        kept = torch.arange(num_kept, device=device).unsqueeze(0)
    counter = FlopCounterMode(display=False)
    with torch.enable_grad():
        with sdpa_kernel(SDPBackend.MATH):
            with counter:
                tokens = encode(backbone, images, layout, kept=kept).final
            forward = float(counter.get_total_flops())
            with counter:
                tokens.sum().backward()  # type: ignore[no-untyped-call]
            backward = float(counter.get_total_flops())
        with Keeping(backbone) as keeping:
            encode(backbone, images, layout, kept=kept)
    backbone.zero_grad(set_to_none=True)
    of_blocks = [Cost(saved=count) for count in keeping.of_blocks]
    return _Count(
        Cost(forward=forward, backward=backward, saved=keeping.total, saved_fp32=float(tokens.numel())),
        total(of_blocks),
        float(keeping.block_inputs),
        max(of_blocks, key=lambda cost: cost.saved),
    )


class Keeping:
    """Counts, while it is entered, the elements that a forward pass keeps for the backward pass.

    Memory that several results share counts once, and parameters not at all.
    """

    def __init__(self, backbone: Backbone) -> None:
        blocks = backbone.layers if isinstance(backbone, SwinTransformer) else backbone.blocks
        self.total = 0.0
        self.block_inputs = 0.0
        self.of_blocks: list[float] = []
        self._parts = list(blocks)
        self._known = {_memory(p) for p in backbone.parameters()}
        self._alive: list[Tensor] = []  # or another tensor could get the place of one that is gone
        self._stack = ExitStack()

    def __enter__(self) -> Keeping:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._stack.enter_context(hooks)
        for part in self._parts:
            for handle in (
                part.register_forward_pre_hook(self._begin),
                part.register_forward_hook(self._end),
            ):
                self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _pack(self, tensor: Tensor) -> Tensor:
        memory = _memory(tensor)
        if memory not in self._known:
            self._known.add(memory)
            self._alive.append(tensor)
            self.total += tensor.untyped_storage().nbytes() / BYTES
        return tensor

    def _begin(self, part: object, inputs: tuple[Tensor, ...]) -> None:
        self.block_inputs += inputs[0].numel()
        self.of_blocks.append(-self.total)

    def _end(self, part: object, inputs: object, output: object) -> None:
        self.of_blocks[-1] += self.total


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
