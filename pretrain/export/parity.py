"""The proof of an export: stock timm, reading the folder, must give the features of the checkpoint.

Two models meet here: the one rebuilt from the checkpoint by our own code, and the one timm builds from the
folder alone. Keys, values, preprocessing and features have to agree, or the export fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pretrain.errors import CheckpointError
from pretrain.export.source import RunWeights
from pretrain.models.backbone import Backbone, create_backbone

RELATIVE_TOLERANCE = 1e-5  # of the largest feature, or of 1 where all features are smaller


class ParityError(Exception):
    """An export that does not reproduce its checkpoint: our mistake, not the user's."""


@dataclass(frozen=True)
class Parity:
    """What was compared, and how far apart it was."""

    matched: tuple[str, ...]  # keys of the checkpoint's backbone that stock timm loaded, bit for bit
    max_abs_difference: float  # between the two models' tokens
    feature_scale: float  # largest absolute feature of the checkpoint's model
    tolerance: float  # allowed max_abs_difference


def rebuild(source: RunWeights) -> Backbone:
    """The checkpoint's own backbone in eval mode; every tensor must find its place, and none may be left."""
    with torch.random.fork_rng(devices=[]):  # building draws weights: keep the caller's random state
        model = create_backbone(source.backbone, len(source.registers))
    expected, found = set(model.state_dict()), set(source.state)
    if expected != found:
        raise CheckpointError(
            f"{source.checkpoint}: the {source.weights} weights fit the model of config.yaml in "
            f"{len(expected & found)} of {len(expected)} tensors; "
            f"missing: {_some(expected - found)}; unexpected: {_some(found - expected)}"
        )
    broken = sorted(key for key, value in source.state.items() if not torch.isfinite(value).all())
    if broken:
        raise CheckpointError(
            f"{source.checkpoint}: {len(broken)} of {len(expected)} {source.weights} tensors hold NaN or Inf"
            f", such as '{broken[0]}'; use an earlier checkpoint"
        )
    try:
        model.load_state_dict(source.state)
    except RuntimeError as error:  # a shape differs
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source.checkpoint}: weights of another model: {reason}") from error
    return model.eval()


def prove(folder: Path, source: RunWeights, reference: Backbone) -> Parity:
    """Open `folder` as any timm user would, and compare it with `reference`, the rebuilt checkpoint."""
    with torch.random.fork_rng(devices=[]):
        stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    loaded = stock.state_dict()
    missing, unexpected = set(source.state) - set(loaded), set(loaded) - set(source.state)
    if missing or unexpected:
        raise ParityError(
            f"timm's model has other tensors; missing: {_some(missing)}; unexpected: {_some(unexpected)}"
        )
    changed = [key for key, value in source.state.items() if not torch.equal(loaded[key], value)]
    if changed:
        raise ParityError(f"timm altered {len(changed)} tensors on loading, such as '{changed[0]}'")
    _compare_preprocessing(stock, source)
    images = torch.randn(2, 3, source.backbone.img_px, source.backbone.img_px, generator=_generator())
    expected, found = _features(reference, images), _features(stock, images)
    if expected.shape != found.shape or not torch.isfinite(found).all():
        raise ParityError(f"features are {tuple(found.shape)} or not finite, not {tuple(expected.shape)}")
    scale = expected.abs().max().item()
    difference = (expected - found).abs().max().item()
    tolerance = RELATIVE_TOLERANCE * max(1.0, scale)
    if difference > tolerance:
        raise ParityError(f"features differ by {difference:.3g}, more than {tolerance:.3g}")
    return Parity(tuple(sorted(source.state)), difference, scale, tolerance)


def _compare_preprocessing(stock: nn.Module, source: RunWeights) -> None:
    """What timm tells a user to feed the model must be what the run fed it."""
    found = resolve_model_data_config(stock)
    expected = {
        "input_size": (3, source.backbone.img_px, source.backbone.img_px),
        "mean": source.mean,
        "std": source.std,
        "interpolation": source.interpolation,
    }
    for name, value in expected.items():
        given = found[name] if isinstance(value, str) else tuple(found[name])
        if given != value:
            raise ParityError(f"timm would use {name} {given}; the run used {value}")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.inference_mode()
def _features(model: nn.Module, images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) -> tokens (B, N, D) or a Swin's map (B, h, w, D), float32"""
    tokens: Tensor = model.forward_features(images)  # type: ignore[operator]
    return tokens


def _some(keys: set[str], limit: int = 5) -> str:
    """The first few names of a set, for a message of one line."""
    shown = sorted(keys)[:limit]
    return ", ".join(shown) + (f" and {len(keys) - limit} more" if len(keys) > limit else "") or "none"
