"""Export as a state dictionary for torchvision's own VisionTransformer and SwinTransformer.

A `.pth` file, not safetensors: `model.load_state_dict(torch.load(FILE, weights_only=True))` is how
torchvision's users and its reference scripts load weights. Beside it stand the arguments of the constructor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torchvision.models import swin_transformer, vision_transformer

from pretrain.export.comparison import Difference, compare, conclude, refuse_strangers, seeded_images
from pretrain.export.plain_swin import plain_swin
from pretrain.export.plain_vit import (
    PlainViT,
    feature_of_image,
    plain_vit,
    refuse_no_class_token,
    refuse_registers,
)
from pretrain.export.proof import Proof
from pretrain.export.renaming import Table, rename
from pretrain.export.source import RunWeights
from pretrain.export.timm_folder import crop_ratio
from pretrain.export.torch_file import load_tensors, save_tensors
from pretrain.models.backbone import Backbone

FORMAT = "torchvision"
WEIGHTS, ARGUMENTS = "model.pth", "model.json"

_VIT: Table = {
    "patch_embed.proj.*": "conv_proj.*",
    "blocks.N.norm1.*": "encoder.layers.encoder_layer_N.ln_1.*",
    "blocks.N.attn.qkv.*": "encoder.layers.encoder_layer_N.self_attention.in_proj_*",
    "blocks.N.attn.proj.*": "encoder.layers.encoder_layer_N.self_attention.out_proj.*",
    "blocks.N.norm2.*": "encoder.layers.encoder_layer_N.ln_2.*",
    "blocks.N.mlp.fc1.*": "encoder.layers.encoder_layer_N.mlp.0.*",
    "blocks.N.mlp.fc2.*": "encoder.layers.encoder_layer_N.mlp.3.*",
    "norm.*": "encoder.ln.*",
}


def write(folder: Path, source: RunWeights, model: Backbone) -> Proof:
    """Write model.pth and model.json; build torchvision's model from both and compare."""
    note = f"build the model with the arguments in {ARGUMENTS}; the file has no classifier, so set "
    if isinstance(model, SwinTransformer):
        name, arguments, tensors = "SwinTransformer", *_swin(source, model)
        note += "`model.head = torch.nn.Identity()`, or load with strict=False to train a new one"
    else:
        vit = plain_vit(FORMAT, source, model)
        refuse_no_class_token(FORMAT, vit)
        refuse_registers(FORMAT, vit, source)
        name, arguments, tensors = "VisionTransformer", *_vit(vit)
        note += (
            "`model.heads = torch.nn.Identity()`, or load with strict=False to train a new one; "
            + feature_of_image(vit)
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / WEIGHTS)
    side = source.backbone.img_px
    description = {
        "model": f"torchvision.models.{name}",
        "arguments": arguments,
        "image_px": side,
        "crop_ratio": crop_ratio(side),
        "interpolation": source.interpolation,
        "mean": list(source.mean),
        "std": list(source.std),
    }
    (folder / ARGUMENTS).write_text(json.dumps(description, indent=2) + "\n")
    consumer = f"torchvision {torchvision.__version__} {name}"
    difference = _prove(folder, source, model, consumer)
    return conclude(FORMAT, consumer, (WEIGHTS, ARGUMENTS), source.state, difference, note)


def _vit(vit: PlainViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    assert vit.leader is not None
    arguments = {
        "image_size": vit.img_px,
        "patch_size": vit.patch_px,
        "num_layers": vit.depth,
        "num_heads": vit.num_heads,
        "hidden_dim": vit.dim,
        "mlp_dim": vit.mlp_dim,
    }
    tokens = {"class_token": vit.leader, "encoder.pos_embedding": vit.positions}
    return arguments, tokens | rename(vit.blocks, _VIT)


def _swin(source: RunWeights, model: SwinTransformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    swin = plain_swin(FORMAT, source, model)
    arguments = {
        "patch_size": [swin.patch_px] * 2,
        "embed_dim": swin.dim,
        "depths": list(swin.depths),
        "num_heads": list(swin.num_heads),
        "window_size": [swin.window] * 2,
        "mlp_ratio": float(swin.mlp_ratio),
    }
    tensors = rename(swin.tensors, _swin_table(len(swin.depths)))
    for name in tensors:
        if name.endswith(".relative_position_index"):
            tensors[name] = tensors[name].flatten()
    return arguments, tensors


def _swin_table(num_stages: int) -> Table:
    """One list holds everything: the patch embedding, then stages and mergings in turn."""
    table = {
        "patch_embed.proj.*": "features.0.0.*",
        "patch_embed.norm.*": "features.0.2.*",
        "norm.*": "norm.*",
    }
    for stage in range(num_stages):
        ours, theirs = f"layers.{stage}.blocks.N", f"features.{2 * stage + 1}.N"
        table |= {f"{ours}.{part}.*": f"{theirs}.{part}.*" for part in ("norm1", "attn", "norm2")}
        table |= {f"{ours}.mlp.fc1.*": f"{theirs}.mlp.0.*", f"{ours}.mlp.fc2.*": f"{theirs}.mlp.3.*"}
        table[f"layers.{stage}.downsample.*"] = f"features.{2 * stage + 2}.*"
    return table


def _prove(folder: Path, source: RunWeights, reference: Backbone, consumer: str) -> Difference:
    arguments = json.loads((folder / ARGUMENTS).read_text())["arguments"]
    model: Any
    with torch.random.fork_rng(devices=[]):
        if isinstance(reference, SwinTransformer):
            model = swin_transformer.SwinTransformer(**arguments)
            model.head, last = nn.Identity(), model.norm
        else:
            model = vision_transformer.VisionTransformer(**arguments)
            model.heads, last = nn.Identity(), model.encoder
    loading = model.load_state_dict(load_tensors(folder / WEIGHTS), strict=False)
    refuse_strangers(consumer, loading.missing_keys, loading.unexpected_keys)
    found: dict[str, Tensor] = {}
    last.register_forward_hook(lambda _module, _inputs, output: found.update(tokens=output))
    images = seeded_images(*reference.patch_embed.img_size)
    with torch.inference_mode():
        tokens = reference.forward_features(images)
        found["pooled"] = model.eval()(images)
    is_swin = isinstance(reference, SwinTransformer)
    pooled = tokens.mean(dim=(1, 2)) if is_swin else tokens[:, 0]
    return compare(consumer, {"tokens": tokens, "pooled": pooled}, found)
