"""What an export may change about a backbone: the image size it is built for, its registers, its pooling.

Each change gives new weights with the settings that fit them, and says what it does to the features, measured
against the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from pretrain.errors import UserError
from pretrain.export.options import ExportOptions, Pooling
from pretrain.export.parity import ParityError, rebuild, tolerance_of
from pretrain.export.source import RunWeights
from pretrain.export.timm_versions import check_timm
from pretrain.models.backbone import Backbone, accept_any_size, create_backbone, encode, positions_for
from pretrain.tokens import TokenLayout

BIAS_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Change:
    """One thing in which the exported model is not the run's."""

    told: str  # one line
    values: dict[str, Any]  # the same as numbers, for export_report.json


@dataclass(frozen=True)
class Adapted:
    """Weights and settings as they are exported, and the model that they make, in eval mode."""

    source: RunWeights
    model: Backbone
    changes: tuple[Change, ...] = ()


def adapt(
    source: RunWeights, options: ExportOptions, see: Callable[[RunWeights], tuple[Tensor, str]]
) -> Adapted:
    """The model of a checkpoint, with the changes that were asked for.

    see: images (B, 3, H, W) as the run would see them, normalised, and what they are; asked for only where
    features change.
    """
    adapted = Adapted(source, rebuild(source))
    check_timm(source, adapted.model)
    if options.drop_registers:
        adapted = _without_registers(adapted, *see(source))
    grid = _grid(options, source)
    if grid != source.grid:
        adapted = _resized(adapted, grid)
    if options.global_pool is not None:
        adapted = _pooled(adapted, options.global_pool)
    return adapted


def _grid(options: ExportOptions, source: RunWeights) -> tuple[int, int]:
    """The (rows, columns) that were asked for, or those that the weights have."""
    if options.grid is not None:
        return options.grid
    if options.img_px is None:
        return source.grid
    unit, side = source.backbone.token_px, options.img_px
    if side % unit:
        below = side // unit * unit
        legal = f"{below} or {below + unit}" if below else str(unit)
        raise UserError(f"--img-px {side}: is not a whole number of {unit} px patches; use {legal}")
    return side // unit, side // unit


def _resized(before: Adapted, grid: tuple[int, int]) -> Adapted:
    """For images of another size: positions of a ViT, bias tables of a Swin's windows are resampled.

    Grid and number of prefix tokens come from the settings of the run. `before.model` is spent.
    """
    source, model = before.source, before.model
    height, width = (number * source.backbone.token_px for number in grid)
    args = {name: value for name, value in source.backbone.args.items() if name != "img_size"}
    if height != width:
        args["img_size"] = [height, width]
    backbone = source.backbone.model_copy(update={"img_px": height, "args": args})
    there = replace(source, backbone=backbone)
    layout = there.layout
    if isinstance(model, SwinTransformer):
        with torch.random.fork_rng(devices=[]):
            target = create_backbone(backbone)
        assert isinstance(target, SwinTransformer)
        with warnings.catch_warnings():  # timm's interpolation indexes in a way that torch warns of
            warnings.simplefilter("ignore", UserWarning)
            state = _resampled_tables(source.state, target)
            model.set_input_size((height, width), window_size=target.layers[0].blocks[0].window_size)
    else:
        positions = positions_for(model, layout)
        state = source.state if positions is None else {**source.state, "pos_embed": positions.detach()}
        accept_any_size(model)
    there = replace(there, state=state)
    after = rebuild(there)
    resampled = [name for name, value in state.items() if value is not source.state[name]]
    difference, scale = _difference_at(model, after, layout, (height, width))
    if not difference <= tolerance_of(scale):
        raise ParityError(
            f"at {height} x {width} px the resampled weights give features that differ by {difference:.3g} "
            f"from the run's model at this size, more than {tolerance_of(scale):.3g}"
        )
    old = source.image_size
    told = (
        f"for images of {height} x {width} px instead of {old[0]} x {old[1]}, {grid[0]} x {grid[1]} tokens "
        f"instead of {source.grid[0]} x {source.grid[1]}; resampled: {_few(resampled)}; within "
        f"{difference:.2g} of the run's own model at this size"
    )
    values = {
        "change": "image size",
        "from_px": list(old),
        "to_px": [height, width],
        "from_grid": list(source.grid),
        "to_grid": list(grid),
        "num_prefix_tokens": layout.num_prefix,
        "resampled": resampled,
        "max_abs_difference": difference,
        "feature_scale": scale,
    }
    return Adapted(there, after, (*before.changes, Change(told, values)))


def _few(names: list[str]) -> str:
    return ", ".join(names) or "nothing" if len(names) < 2 else f"{len(names)} tables of relative positions"


def _resampled_tables(state: dict[str, Tensor], target: SwinTransformer) -> dict[str, Tensor]:
    """A window is never larger than its map, so small images have smaller tables of relative positions."""
    tables = dict(state)
    for name, module in target.named_modules():
        key = f"{name}.{BIAS_TABLE}"
        table = getattr(module, BIAS_TABLE, None)
        if table is not None and table.shape != state[key].shape:
            tables[key] = resize_rel_pos_bias_table(
                state[key], new_window_size=module.window_size, new_bias_shape=table.shape
            )
    return tables


@torch.inference_mode()
def _difference_at(
    own: Backbone, resampled: Backbone, layout: TokenLayout, size: tuple[int, int]
) -> tuple[float, float]:
    """Largest difference between the run's model, which interpolates inside, and the resampled one; scale."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = encode(own, images, layout).final
    found = resampled.forward_features(images).reshape(expected.shape)
    return (expected - found).abs().max().item(), expected.abs().max().item()


@torch.inference_mode()
def _without_registers(before: Adapted, images: Tensor, what: str) -> Adapted:
    """Take the registers out, and measure what that does to the other tokens."""
    source, model = before.source, before.model
    if not source.registers:
        raise UserError("--drop-registers: this backbone has none; leave the flag away")
    layout = source.layout
    state = {name: value for name, value in source.state.items() if name != "reg_token"}
    positions = state.get("pos_embed")
    if positions is not None and positions.shape[1] == layout.num_tokens:  # else prefix tokens have none
        first = int(layout.has_class_token)
        state["pos_embed"] = torch.cat([positions[:, :first], layout.patches(positions)], dim=1)
    there = replace(source, state=state, registers=())
    after = rebuild(there)
    kept = there.layout
    old, new = encode(model, images, layout).final, encode(after, images, kept).final
    features = {"mean_patch": (layout.patches(old).mean(dim=1), kept.patches(new).mean(dim=1))}
    if layout.has_class_token:
        features = {"class": (layout.class_token(old), kept.class_token(new)), **features}
    changed = {
        name: {
            "relative": ((b - a).norm(dim=1) / a.norm(dim=1)).mean().item(),
            "cosine": F.cosine_similarity(a, b).mean().item(),
        }
        for name, (a, b) in features.items()
    }
    shown = "; ".join(
        f"{name.replace('_', ' ')} feature changed by {100 * value['relative']:.1f} % (cosine "
        f"{value['cosine']:.4f})"
        for name, value in changed.items()
    )
    told = f"without the registers {', '.join(source.registers)}: {shown}, on {what}"
    values = {
        "change": "registers dropped",
        "registers": list(source.registers),
        "features": changed,
        "measured_on": what,
    }
    return Adapted(there, after, (*before.changes, Change(told, values)))


def _pooled(before: Adapted, pooling: Pooling) -> Adapted:
    """Another pooling behind the norm that was trained.

    timm's own default for the mean is a norm behind the pooling, which these weights do not have.
    """
    source = before.source
    if source.backbone.is_swin:
        if pooling == "avg":
            return before
        raise UserError("--global-pool token: a Swin has no class token; use avg")
    if pooling == "token" and not source.backbone.class_token:
        raise UserError("--global-pool token: this backbone has no class token; use avg")
    if pooling == before.model.global_pool:
        return before
    if "norm.weight" not in source.state:
        raise UserError(
            f"--global-pool {pooling}: this backbone was trained with its norm behind the pooling "
            f"'{before.model.global_pool}'; leave the flag away"
        )
    args = {**source.backbone.args, "global_pool": pooling, "fc_norm": False}
    there = replace(source, backbone=source.backbone.model_copy(update={"args": args}))
    told = f"pooled by {pooling} instead of {before.model.global_pool}, behind the trained norm"
    values = {"change": "global pool", "from": before.model.global_pool, "to": pooling}
    return Adapted(there, rebuild(there), (*before.changes, Change(told, values)))
