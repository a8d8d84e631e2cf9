"""Export for detectron2: `train.init_checkpoint = "FOLDER/model.pth?matching_heuristics=True"`.

Its ViT (Li et al., 2022, arXiv:2203.16527) sees patches only and ends before the final norm; its Swin
normalises each map that a detector reads. So class token, registers and a ViT's final norm stay behind, and
the proof compares with our network run on patches alone.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from pretrain.export.comparison import Difference, compare, conclude, refuse_changes, seeded_images
from pretrain.export.consumer import AbsentError, import_consumer, version_of
from pretrain.export.detector_maps import last_map, patches_alone
from pretrain.export.plain_swin import PlainSwin, plain_swin
from pretrain.export.plain_vit import NORM_EPS, PlainViT, plain_vit
from pretrain.export.proof import Proof
from pretrain.export.quiet import quiet
from pretrain.export.renaming import rename
from pretrain.export.source import RunWeights
from pretrain.export.torch_file import load_tensors, save_tensors
from pretrain.models.backbone import Backbone

FORMAT = "detectron2"
WEIGHTS, ARGUMENTS = "model.pth", "model.json"
_NOT_READ = "ViTDet attends over patches only"


def write(folder: Path, source: RunWeights, model: Backbone) -> Proof:
    """Write model.pth and model.json; load them with detectron2's own checkpointer where it is installed."""
    left_out: dict[str, str] = {}
    plain: PlainSwin | PlainViT
    if isinstance(model, SwinTransformer):
        name, plain = "SwinTransformer", plain_swin(FORMAT, source, model, any_maps=True)
        arguments, tensors = _swin(plain)
        note = "norm0, norm1 and norm2, which detectors put on the earlier maps, start anew"
    else:
        name, plain = "ViT", plain_vit(FORMAT, source, model)
        arguments, tensors = _vit(plain)
        left_out = {key: _NOT_READ for key in ("cls_token", "reg_token") if key in source.state}
        left_out |= {f"norm.{part}": "ViTDet has no norm after the last block" for part in ("weight", "bias")}
        note = (
            f"norm_layer=partial(nn.LayerNorm, eps=1e-6), pretrain_img_size={plain.img_px}, "
            "pretrain_use_cls_token=True (also for models without: its position is a placeholder)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / WEIGHTS)
    description = {
        "backbone": f"detectron2.modeling.backbone.{name}",
        "arguments": arguments,
        "pixel_mean": [255 * value for value in source.mean],  # for RGB pixels in 0..255
        "pixel_std": [255 * value for value in source.std],
    }
    (folder / ARGUMENTS).write_text(json.dumps(description, indent=2) + "\n")
    difference = None
    try:
        difference = _prove(folder, source, model, plain)
    except AbsentError as absent:
        note += f"; {absent}"
    return conclude(
        FORMAT,
        f"{version_of('detectron2')} {name}",
        (WEIGHTS, ARGUMENTS),
        source.state,
        difference,
        note,
        left_out,
    )


def _vit(vit: PlainViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arguments = {
        "patch_size": vit.patch_px,
        "embed_dim": vit.dim,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        "mlp_ratio": vit.mlp_dim / vit.dim,
        "qkv_bias": True,
        "pretrain_img_size": vit.img_px,
        "pretrain_use_cls_token": True,
    }
    blocks = {name: tensor for name, tensor in vit.blocks.items() if not name.startswith("norm.")}
    return arguments, {"pos_embed": vit.positions, **blocks}


def _swin(swin: PlainSwin) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arguments = {
        "pretrain_img_size": swin.img_px,
        "patch_size": swin.patch_px,
        "embed_dim": swin.dim,
        "depths": list(swin.depths),
        "num_heads": list(swin.num_heads),
        "window_size": swin.window,
        "mlp_ratio": float(swin.mlp_ratio),
    }
    # not plain `norm`, which the name-matching heuristics would take for the end of any other norm's name
    table = {
        "patch_embed.*": "patch_embed.*",
        "layers.N.*": "layers.N.*",
        "norm.*": f"norm{swin.last_stage}.*",
    }
    return arguments, rename(swin.tensors, table)


def _prove(folder: Path, source: RunWeights, reference: Backbone, plain: PlainSwin | PlainViT) -> Difference:
    backbones = import_consumer("detectron2.modeling.backbone")
    checkpointer = import_consumer("detectron2.checkpoint").DetectionCheckpointer
    arguments = json.loads((folder / ARGUMENTS).read_text())["arguments"]
    with quiet(), torch.random.fork_rng(devices=[]):  # it imports deprecated names of timm
        if isinstance(plain, PlainSwin):
            images = seeded_images(plain.large_image_px, plain.large_image_px, num_images=1)
            expected = last_map(source, reference, images)
            outputs = {"out_indices": (plain.last_stage,), "drop_path_rate": 0.0}
            network = backbones.swin.SwinTransformer(**arguments, **outputs)
        else:
            images = seeded_images(plain.img_px, plain.img_px)
            expected = patches_alone(source, reference, images)
            norm = partial(nn.LayerNorm, eps=NORM_EPS)
            network = backbones.ViT(**arguments, img_size=plain.img_px, norm_layer=norm)
    detector = nn.ModuleDict({"backbone": nn.ModuleDict({"net": network})})  # the names of a detector
    with quiet():
        checkpointer(detector).load(f"{folder / WEIGHTS}?matching_heuristics=True")
    consumer = version_of("detectron2")
    refuse_changes(consumer, load_tensors(folder / WEIGHTS), network.state_dict())
    with torch.inference_mode():
        (found,) = network.eval()(images).values()
    return compare(consumer, {"map": expected}, {"map": found})
