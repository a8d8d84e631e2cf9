"""The network under evaluation: opened from an export, a run, a checkpoint or timm, with the input it wants.

Everything here is frozen, in eval mode and float32; images are cropped the same way every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.errors import CheckpointError, UserError, nearest
from pretrain.evaluate.feature import FeatureName, check_feature, read_features, usual, width_of
from pretrain.export.parity import rebuild
from pretrain.export.source import WeightsName, is_run, read_weights, sha256_of
from pretrain.export.timm_folder import crop_ratio
from pretrain.models.backbone import create_backbone
from pretrain.models.t2t import register_t2t
from pretrain.tokens import TokenLayout

PIXELS = "pixels"  # the weights' name for no network at all
PIXELS_PX = 16
UNTRAINED = "untrained:"  # before a weights' name: its architecture with fresh weights
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class CentreCrop:
    """Resize the shorter side, then cut the centre; an image of the wanted size is left as it is."""

    size_px: int
    resize_px: int  # length of the shorter side before the cut
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"interpolation '{self.interpolation}': {nearest(self.interpolation, INTERPOLATIONS)}"
            )

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """uint8 (H, W, 3) -> uint8 (3, size, size)"""
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        height, width = pixels.shape[1:]
        if (height, width) == (self.size_px, self.size_px):
            return pixels
        scale = self.resize_px / min(height, width)
        resized = [max(self.resize_px, round(side * scale)) for side in (height, width)]
        if resized != [height, width]:
            pixels = F.interpolate(pixels[None], resized, mode=self.interpolation, antialias=True)[0]
        top, left = ((side - self.size_px) // 2 for side in resized)
        return pixels[:, top : top + self.size_px, left : left + self.size_px]


@dataclass(frozen=True)
class Encoder:
    """A frozen network, and how an image becomes one feature vector."""

    weights: str  # as the user named it
    model: nn.Module
    feature: FeatureName
    crop: CentreCrop
    mean: tuple[float, ...]  # of pixels in [0, 1]
    std: tuple[float, ...]
    token_width: int  # of the features that are not put together of several
    origin: dict[str, Any]  # where the weights come from, for the results
    layout: TokenLayout | None = None  # None: not a Vision Transformer of timm
    tasks: tuple[str, ...] = ()  # that the weights were pretrained with; () if nobody wrote that down
    besides: tuple[FeatureName, ...] = ()  # further features of the same forward pass, after the first one

    @property
    def num_features(self) -> int:
        return width_of(self.feature, self.layout, self.token_width)

    def columns(self, feature: FeatureName) -> slice:
        """Where one of several features stands in what `encode` gives."""
        names = (self.feature, *self.besides)
        if names == (feature,):
            return slice(None)
        widths = [width_of(name, self.layout, self.token_width) for name in names]
        place = names.index(feature)
        return slice(sum(widths[:place]), sum(widths[: place + 1]))

    @property
    def num_blocks(self) -> int:
        return len(getattr(self.model, "blocks", ()))

    def to(self, device: torch.device | str) -> Encoder:
        return replace(self, model=self.model.to(device))

    def reading(self, feature: FeatureName) -> Encoder:
        """The same network, read out in another way; UserError if it cannot be."""
        return self.reading_all((feature,))

    def reading_all(self, features: Sequence[FeatureName]) -> Encoder:
        """The same network, read out in several ways at once; UserError if it cannot be in one of them."""
        for feature in features:
            if feature != self.feature:
                check_feature(feature, self.layout, self.num_blocks)
        return replace(self, feature=features[0], besides=tuple(features[1:]))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, size, size), on the model's device -> float32 (B, D), D of all features together"""
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (self.mean, self.std))
        pixels = (images.float() / 255 - mean) / std
        if self.feature == PIXELS:
            return pixels.flatten(1)
        return read_features(self.model, (self.feature, *self.besides), self.layout, pixels).float()

    def describe(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "feature": self.feature,
            "num_features": self.num_features,
            "tasks": list(self.tasks),
            "image_px": self.crop.size_px,
            "resize_px": self.crop.resize_px,
            "interpolation": self.crop.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            **self.origin,
        }


def open_encoder(
    weights: str | Path,
    feature: FeatureName | None = None,
    network: WeightsName | None = None,
    seed: int = 0,
) -> Encoder:
    """Open what `weights` names: an exported folder, a run, a checkpoint, a timm model, or `pixels`.

    `untrained:` before a name keeps its architecture and draws fresh weights from `seed`.
    feature: what one image becomes; None takes the class token where there is one, else the mean of the patch
    tokens, else timm's own pooling. network: teacher or student of a run.
    """
    register_t2t()
    name = str(weights)
    if name == PIXELS:
        crop = CentreCrop(PIXELS_PX, PIXELS_PX, "bilinear")
        grey = (0.5, 0.5, 0.5)
        return Encoder(name, nn.Identity(), "pixels", crop, grey, grey, 3 * PIXELS_PX**2, {"kind": "pixels"})
    untrained = name.startswith(UNTRAINED)
    target = name.removeprefix(UNTRAINED)
    folder = Path(target)
    if (folder / "config.json").is_file():
        encoder = _open_export(folder, not untrained, seed)
    elif folder.is_dir() and is_run(folder):
        encoder = _open_run(folder, network, not untrained, seed)
    elif timm.is_model(target.split(".")[0]):
        encoder = _open_timm(target, not untrained, seed)
    elif folder.exists():
        raise UserError(f"{folder}: neither an exported folder, a run nor a checkpoint")
    else:
        known = nearest(target, timm.list_models())
        hint = f"; {known}" if known.startswith("did") else ""
        raise UserError(f"'{target}': no such folder, and timm has no model of this name{hint}")
    encoder.model.eval().requires_grad_(False)
    encoder = replace(encoder, weights=name)
    return encoder.reading(feature or usual(encoder.layout))


def _open_export(folder: Path, trained: bool, seed: int) -> Encoder:
    origin: dict[str, Any] = {"kind": "export"} if trained else untrained_from(seed)
    notes = json.loads((folder / "config.json").read_text()).get("pretrain") or {}  # of our own exports
    report = folder / "export_report.json"
    if trained and report.is_file():  # other people's timm folders have none
        record = json.loads(report.read_text())
        if sha256_of(folder / "model.safetensors") != record["model_sha256"]:
            raise CheckpointError(
                f"{folder / 'model.safetensors'}: not the file that was exported; export again"
            )
        origin |= {"step": record["source_step"], "sha256": record["model_sha256"]}
        origin["pretrained_on"] = notes.get("data") or data_of(Path(record["source_checkpoint"]))
    encoder = _from_timm(lambda: timm.create_model(f"local-dir:{folder}", pretrained=trained), origin, seed)
    layout = encoder.layout and replace(
        encoder.layout, registers=tuple(notes.get("registers") or encoder.layout.registers)
    )
    return replace(encoder, tasks=tuple(notes.get("tasks") or ()), layout=layout)


def _open_run(folder: Path, network: WeightsName | None, trained: bool, seed: int) -> Encoder:
    source = read_weights(folder, network)
    num_registers = len(source.registers)
    model = (
        rebuild(source) if trained else _fresh(lambda: create_backbone(source.backbone, num_registers), seed)
    )
    origin = {
        "kind": "checkpoint",
        "network": source.weights,
        "step": source.step,
        "sha256": source.sha256,
        "pretrained_on": data_of(source.checkpoint),
    }
    side = source.backbone.img_px
    return Encoder(
        weights=str(folder),
        model=model,
        feature="pooled",
        crop=CentreCrop(side, int(side / crop_ratio(side)), source.interpolation),
        mean=source.mean,
        std=source.std,
        token_width=source.embed_dim,
        origin=origin if trained else untrained_from(seed),
        layout=_layout(model, source.registers),
        tasks=source.tasks,
    )


def untrained_from(seed: int) -> dict[str, Any]:
    """What a result says of fresh weights."""
    return {"kind": "untrained", "seed": seed}


def data_of(checkpoint: Path) -> dict[str, Any] | None:
    """The shards that a run was trained on, and the hashes of their indexes; None where that is not known."""
    try:
        settings = yaml.safe_load((checkpoint / "config.yaml").read_text())["data"]
        identity = json.loads((checkpoint / "state.json").read_text()).get("identity") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
    shards = settings.get("shards") or [source.get("shards") for source in settings.get("sources") or ()]
    return {
        "shards": [shards] if isinstance(shards, str) else list(shards),
        "manifest_hashes": list(identity.get("manifest_hash") or ()),
    }


def _open_timm(name: str, trained: bool, seed: int) -> Encoder:
    if not trained:
        return _from_timm(lambda: timm.create_model(name, num_classes=0), untrained_from(seed), seed)
    overlay = {"file": str(_cached_file(name)), "custom_load": False}
    return _from_timm(
        lambda: timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay),
        {"kind": "timm"},
        seed,
    )


def _cached_file(name: str) -> Path:
    """The weights of a timm model that were downloaded before; an evaluation downloads nothing itself."""
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"timm has no pretrained weights for '{name}'; for a comparison use untrained:{name}")
    if config.file and Path(config.file).is_file():
        return Path(config.file)
    repository = (
        f"timm/{config.architecture}.{config.tag}" if config.hf_hub_id == "timm/" else config.hf_hub_id
    )
    if repository:
        cached = try_to_load_from_cache(repository, config.hf_hub_filename or "model.safetensors")
        if isinstance(cached, str):
            return Path(cached)
    raise UserError(
        f"the weights of '{name}' are not on this machine; fetch them once with "
        f"`python -c \"import timm; timm.create_model('{name}', pretrained=True)\"`"
    )


def _from_timm(create: Callable[[], nn.Module], origin: dict[str, Any], seed: int) -> Encoder:
    """What timm itself says of a model: its tokens and its preprocessing."""
    try:
        model = _fresh(create, seed)
    except (RuntimeError, SafetensorError) as error:  # timm refuses pickles that hold more than tensors
        said = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"timm cannot make this model ({said}); check its weights, or fetch them again"
        ) from None
    data = resolve_model_data_config(model)
    side = int(data["input_size"][-1])
    return Encoder(
        weights="",
        model=model,
        feature="pooled",
        crop=CentreCrop(side, int(side / data["crop_pct"]), data["interpolation"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        token_width=int(model.num_features),  # type: ignore[arg-type]
        origin=origin,
        layout=_layout(model),
    )


def _fresh(create: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build with fresh weights of a seed, and keep the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create()


def _layout(model: nn.Module, registers: tuple[str, ...] = ()) -> TokenLayout | None:
    """registers: the tasks that own the register tokens, where that is known."""
    if not isinstance(model, VisionTransformer):
        return None
    rows, columns = model.patch_embed.grid_size
    num_registers = model.num_prefix_tokens - int(model.has_class_token)
    named = registers or tuple(f"register {place}" for place in range(num_registers))
    return TokenLayout((rows, columns), named, model.has_class_token)
