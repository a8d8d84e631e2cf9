"""The proof of an export: stock timm, reading the folder, must give the features of the checkpoint.

Two models meet here: the one rebuilt from the checkpoint by our own code, and the one timm builds from the
folder alone. Keys, values, preprocessing and features have to agree, or the export fails.
"""

from __future__ import annotations

from collections.abc import Collection

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pretrain.errors import CheckpointError
from pretrain.export.proof import Proof
from pretrain.export.source import RunWeights
from pretrain.models.backbone import Backbone, create_backbone, encode

RELATIVE_TOLERANCE = 1e-5  # of the largest feature, or of 1 where all features are smaller


class ParityError(Exception):
    """An export that does not reproduce its checkpoint: our mistake, not the user's."""


def rebuild(source: RunWeights) -> Backbone:
    """The checkpoint's own backbone in eval mode; every tensor must find its place, and none may be left."""
    with torch.random.fork_rng(devices=[]):  # building draws weights: keep the caller's random state
        model = create_backbone(source.backbone, len(source.registers))
    expected, found = set(model.state_dict()), set(source.state)
    if expected != found:
        raise CheckpointError(
            f"{source.checkpoint}: the {source.weights} weights fit the model of config.yaml in "
            f"{len(expected & found)} of {len(expected)} tensors; "
            f"missing: {some(expected - found)}; unexpected: {some(found - expected)}"
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


def prove(stock: nn.Module, source: RunWeights, reference: Backbone, format: str) -> Proof:
    """Compare what timm has opened, as any of its users would, with `reference`, the rebuilt checkpoint.

    Tensors bit by bit; tokens and pooled features within the tolerance; preprocessing by value. The tokens of
    the reference are put together by our own code, as in training: timm's may forget some.
    """
    stock.eval()
    loaded = stock.state_dict()
    missing, unexpected = set(loaded) - set(source.state), set(source.state) - set(loaded)
    if missing or unexpected:
        num_matched = len(set(source.state) & set(loaded))
        raise ParityError(
            f"timm {timm.__version__} finds {num_matched} of {len(source.state)} tensors; missing: "
            f"{some(missing)}; unexpected: {some(unexpected)}"
        )
    changed = [key for key, value in source.state.items() if not torch.equal(loaded[key], value)]
    if changed:
        raise ParityError(f"timm altered {len(changed)} tensors on loading, such as '{changed[0]}'")
    _compare_preprocessing(stock, source)
    images = torch.randn(2, 3, *source.image_size, generator=_generator())
    difference, scale = 0.0, 0.0
    of_reference, of_stock = features_of(reference, source, images), _features(stock, images)
    for expected, found in zip(of_reference, of_stock, strict=True):
        if expected.shape != found.shape or not torch.isfinite(found).all():
            raise ParityError(
                f"timm {timm.__version__} gives features {tuple(found.shape)} or such as are not finite, not "
                f"{tuple(expected.shape)}"
            )
        scale = max(scale, expected.abs().max().item())
        difference = max(difference, (expected - found).abs().max().item())
    tolerance = tolerance_of(scale)
    if difference > tolerance:
        raise ParityError(f"features differ by {difference:.3g}, more than {tolerance:.3g}")
    return Proof(
        format=format,
        consumer=f"timm {timm.__version__} {type(stock).__name__}",
        files=("config.json", "model.safetensors"),
        matched=tuple(sorted(source.state)),
        missing=(),
        unexpected=(),
        left_out={},
        max_abs_difference=difference,
        feature_scale=scale,
        tolerance=tolerance,
        note="",
    )


def tolerance_of(scale: float) -> float:
    """How far apart the same float32 features may be, whose largest absolute value is `scale`."""
    return RELATIVE_TOLERANCE * max(1.0, scale)


def _compare_preprocessing(stock: nn.Module, source: RunWeights) -> None:
    """What timm tells a user to feed the model must be what the run fed it."""
    found = resolve_model_data_config(stock)
    expected = {
        "input_size": (3, *source.image_size),
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
def features_of(model: Backbone, source: RunWeights, images: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised images (B, 3, H, W) -> tokens (B, N, D) or a Swin's map (B, h, w, D); pooled (B, D)"""
    tokens = encode(model, images, source.layout).final
    if source.backbone.is_swin:
        tokens = tokens.reshape(len(images), *source.grid, -1)
    return tokens, model.forward_head(tokens)


@torch.inference_mode()
def _features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens: Tensor = model.forward_features(images)  # type: ignore[operator]
    return tokens, model.forward_head(tokens)  # type: ignore[operator]


def some(keys: Collection[str], limit: int = 5) -> str:
    """The first few names, for a message of one line."""
    shown = sorted(keys)[:limit]
    return ", ".join(shown) + (f" and {len(keys) - limit} more" if len(keys) > limit else "") or "none"
