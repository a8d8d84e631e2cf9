"""Export for mmpretrain, mmsegmentation or mmdetection: weights, and a config whose backbone loads them.

The first lines of backbone.py tell how a config takes it over; the file names its weights by the folder that
it lies in. The three read one file in three ways: mmengine's loader takes what stands behind `prefix`;
mmdetection's Swin takes what begins with `backbone.` and drops the rest unsaid; mmsegmentation's ViT strips
no prefix and finds nothing in a file that has one. So the names follow the reader.
"""

from __future__ import annotations

import pprint
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from pretrain.errors import UserError
from pretrain.export.comparison import Difference, compare, conclude, refuse_changes, seeded_images
from pretrain.export.consumer import AbsentError, import_consumer, version_of
from pretrain.export.detector_maps import last_map
from pretrain.export.plain_swin import PlainSwin, plain_swin
from pretrain.export.plain_vit import NORM_EPS, PlainViT, plain_vit, refuse_registers
from pretrain.export.proof import Proof
from pretrain.export.quiet import quiet
from pretrain.export.renaming import Table, rename
from pretrain.export.source import RunWeights
from pretrain.export.torch_file import load_tensors, save_tensors
from pretrain.models.backbone import Backbone, layout_of

Library: TypeAlias = Literal["mmpretrain", "mmseg", "mmdet"]
WEIGHTS, CONFIG = "backbone.pth", "backbone.py"
PREFIX = "backbone."
_DISTRIBUTIONS = {"mmseg": "mmsegmentation"}  # whose name is not that of the module

_VIT: Table = {
    "patch_embed.proj.*": "patch_embed.projection.*",
    "blocks.N.norm1.*": "layers.N.ln1.*",
    "blocks.N.norm2.*": "layers.N.ln2.*",
    "blocks.N.mlp.fc1.*": "layers.N.ffn.layers.0.0.*",
    "blocks.N.mlp.fc2.*": "layers.N.ffn.layers.1.*",
    "norm.*": "ln1.*",
}
_ATTENTION: dict[str, Table] = {
    "mmpretrain": {
        "blocks.N.attn.qkv.*": "layers.N.attn.qkv.*",
        "blocks.N.attn.proj.*": "layers.N.attn.proj.*",
    },
    "mmseg": {
        "blocks.N.attn.qkv.*": "layers.N.attn.attn.in_proj_*",
        "blocks.N.attn.proj.*": "layers.N.attn.attn.out_proj.*",
    },
}
_SWIN: Table = {
    "patch_embed.proj.*": "patch_embed.projection.*",
    "patch_embed.norm.*": "patch_embed.norm.*",
    "layers.N.blocks.N.norm1.*": "stages.N.blocks.N.norm1.*",
    "layers.N.blocks.N.norm2.*": "stages.N.blocks.N.norm2.*",
    "layers.N.blocks.N.attn.*": "stages.N.blocks.N.attn.w_msa.*",
    "layers.N.blocks.N.mlp.fc1.*": "stages.N.blocks.N.ffn.layers.0.0.*",
    "layers.N.blocks.N.mlp.fc2.*": "stages.N.blocks.N.ffn.layers.1.*",
    "layers.N.downsample.*": "stages.N.downsample.*",
}


def write(folder: Path, source: RunWeights, model: Backbone, library: Library = "mmpretrain") -> Proof:
    """Write backbone.pth and backbone.py; let mmengine build and load them where the library is installed."""
    plain: PlainSwin | PlainViT
    if isinstance(model, SwinTransformer):
        plain = plain_swin(library, source, model, any_maps=library != "mmpretrain")
        backbone, tensors = _swin(plain, library)
    else:
        if library == "mmdet":
            raise UserError(
                "--format mmdet: mmdetection 3 has no Vision Transformer of its own; use --format "
                f"mmpretrain, whose {CONFIG} mmdetection takes too, with mmpretrain installed"
            )
        plain = plain_vit(library, source, model)
        refuse_registers(library, plain, source)
        backbone, tensors = _vit(plain, library)
    if library == "mmseg" and isinstance(plain, PlainViT):
        loading, prefix = {}, ""
    else:
        loading, prefix = {"prefix": PREFIX}, PREFIX
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({"state_dict": {prefix + key: value for key, value in tensors.items()}}, folder / WEIGHTS)
    # mmengine puts the folder of the config there
    loading = {"type": "Pretrained", "checkpoint": "{{ fileDirname }}/" + WEIGHTS, **loading}
    (folder / CONFIG).write_text(_config(source, library, {**backbone, "init_cfg": loading}))
    note = _note(plain)
    difference = None
    try:
        difference = _prove(folder, source, model, plain, library, prefix)
    except AbsentError as absent:
        note += f"; {absent}"
    network = str(backbone["type"]).removeprefix(f"{library}.")
    consumer = f"{version_of(_DISTRIBUTIONS.get(library, library))} {network}"
    return conclude(library, consumer, (WEIGHTS, CONFIG), source.state, difference, note)


def _vit(vit: PlainViT, library: Library) -> tuple[dict[str, Any], dict[str, Tensor]]:
    norm = {"type": "LN", "eps": NORM_EPS}
    backbone = {
        "type": f"{library}.VisionTransformer",
        "img_size": vit.img_px,
        "patch_size": vit.patch_px,
        "qkv_bias": True,
        "norm_cfg": norm,
        "final_norm": True,
        "with_cls_token": vit.leader is not None,
    }
    tensors = rename(vit.blocks, _VIT | _ATTENTION[library])  # type: ignore[operator]
    if library == "mmpretrain":
        backbone["arch"] = {
            "embed_dims": vit.dim,
            "num_layers": vit.depth,
            "num_heads": vit.num_heads,
            "feedforward_channels": vit.mlp_dim,
        }
        backbone["out_type"] = "cls_token" if vit.leader is not None and vit.is_pooled_by_token else "featmap"
        if vit.leader is None:
            return backbone, {"pos_embed": vit.patch_positions, **tensors}
        return backbone, {"cls_token": vit.leader, "pos_embed": vit.positions, **tensors}
    if vit.mlp_dim % vit.dim:
        raise UserError(
            f"--format mmseg: its MLP is a whole multiple of the {vit.dim} channels wide, this one is "
            f"{vit.mlp_dim}; use --format mmpretrain, whose backbone.py mmsegmentation loads too"
        )
    quarters = sorted({max(1, vit.depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})
    backbone |= {
        "embed_dims": vit.dim,
        "num_layers": vit.depth,
        "num_heads": vit.num_heads,
        "mlp_ratio": vit.mlp_dim // vit.dim,
        "patch_bias": True,
        "out_indices": quarters,
    }
    # without a class token mmsegmentation still holds one, which it takes off again before the first block
    leader = torch.zeros(1, 1, vit.dim) if vit.leader is None else vit.leader
    return backbone, {"cls_token": leader, "pos_embed": vit.positions, **tensors}


def _swin(swin: PlainSwin, library: Library) -> tuple[dict[str, Any], dict[str, Tensor]]:
    backbone: dict[str, Any] = {
        "type": f"{library}.SwinTransformer",
        "patch_size": swin.patch_px,
        "window_size": swin.window,
        "out_indices": list(range(swin.last_stage + 1)),
    }
    sizes = {"embed_dims": swin.dim, "depths": list(swin.depths), "num_heads": list(swin.num_heads)}
    if library == "mmpretrain":
        backbone |= {"arch": sizes, "img_size": swin.img_px, "out_indices": [swin.last_stage]}
        backbone["stage_cfgs"] = {"block_cfgs": {"ffn_ratio": swin.mlp_ratio}}
    else:
        strides = [swin.patch_px] + [2] * swin.last_stage
        backbone |= {
            **sizes,
            "pretrain_img_size": swin.img_px,
            "strides": strides,
            "mlp_ratio": swin.mlp_ratio,
        }
    tensors = rename(swin.tensors, {**_SWIN, "norm.*": f"norm{swin.last_stage}.*"})
    return backbone, {key: _unfolded(key, value) for key, value in tensors.items()}


def _unfolded(name: str, tensor: Tensor) -> Tensor:
    """Merged patches in the order of torch's Unfold, which OpenMMLab uses: channel by channel.

    The authors concatenate the four neighbours, upper left, lower left, upper right, lower right, with all
    channels of each; Unfold goes row by row through the neighbours of one channel, then of the next.
    """
    if ".downsample." not in name:
        return tensor
    neighbours = tensor.reshape(*tensor.shape[:-1], 4, -1)  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)


def _config(source: RunWeights, library: Library, backbone: dict[str, Any]) -> str:
    """Text of backbone.py: two variables, for a config to take what it wants of them."""
    pixels = {
        "mean": [round(255 * value, 4) for value in source.mean],
        "std": [round(255 * value, 4) for value in source.std],
        "to_rgb" if library == "mmpretrain" else "bgr_to_rgb": True,  # they read images as BGR
    }
    lines = [f"# {source.backbone.name}, {source.weights} weights of step {source.step}", *_usage(library)]
    for name, values in (("backbone", {"_delete_": True, **backbone}), ("pixels", pixels)):
        lines.append(f"{name} = {pprint.pformat(values, sort_dicts=False, width=100)}")
    return "\n".join(lines) + "\n"


def _usage(library: Library) -> list[str]:
    preprocessor = "data_preprocessor = {{_base_.pixels}}"
    model = "model = dict(backbone={{_base_.backbone}}"
    if library != "mmpretrain":
        model, preprocessor = f"{model}, {preprocessor.replace(' ', '')})", ""
    else:
        model += ")"
    lines = [f'_base_ = ["CONFIG.py", "FOLDER/{CONFIG}"]', model, preprocessor]
    return [f"#     {line}" for line in lines if line]


def _note(plain: PlainSwin | PlainViT) -> str:
    note = f"the first lines of {CONFIG} tell how a config takes it over"
    if isinstance(plain, PlainSwin):
        return note + "; norms that a detector puts on the earlier maps start anew"
    if plain.is_pooled_by_token:
        return note
    return note + "; the feature of an image is the mean of the map (avg_featmap would add a second norm)"


def _prove(
    folder: Path,
    source: RunWeights,
    reference: Backbone,
    plain: PlainSwin | PlainViT,
    library: Library,
    prefix: str,
) -> Difference:
    import_consumer(f"{library}.models")
    registry = import_consumer(f"{library}.registry").MODELS
    mmengine = import_consumer("mmengine")
    with quiet(), torch.random.fork_rng(devices=[]):
        config = mmengine.Config.fromfile(str(folder / CONFIG)).backbone
        del config["_delete_"]  # for configs that put it in the place of another
        if isinstance(plain, PlainViT) and library == "mmpretrain":
            config.out_type = "raw"  # all tokens
        if isinstance(plain, PlainSwin):
            config.out_indices = [plain.last_stage]
        network = registry.build(config)
        network.init_weights()
    consumer = version_of(_DISTRIBUTIONS.get(library, library))
    written = load_tensors(folder / WEIGHTS)["state_dict"]
    written = {key.removeprefix(prefix): value for key, value in written.items()}
    refuse_changes(consumer, written, network.state_dict())
    # the detectors' Swin shifts windows even where a map is a single one
    if isinstance(plain, PlainSwin) and library != "mmpretrain":
        images = seeded_images(plain.large_image_px, plain.large_image_px, num_images=1)
    else:
        images = seeded_images(plain.img_px, plain.img_px)
    with torch.inference_mode():
        network.eval()  # some of theirs return nothing
        found = network(images)[-1]
        if isinstance(plain, PlainSwin):
            expected = last_map(source, reference, images)
        else:
            expected = reference.forward_features(images)
            if library == "mmseg":
                layout = layout_of(source.backbone, source.registers)
                expected = layout.patches(expected).mT.reshape(*found.shape[:2], *layout.grid)
    return compare(consumer, {"features": expected}, {"features": found})
