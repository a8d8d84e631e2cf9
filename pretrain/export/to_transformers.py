"""Export as a folder for Hugging Face transformers: `AutoModel.from_pretrained(FOLDER)`.

A ViT becomes a ViTModel; with more than one prefix token a Dinov2WithRegistersModel, whose layer scales are
set to one; without any an IJepaModel; a Swin a SwinModel. Tensors bear the names of transformers 4, which
version 5 reads as well. Nothing of transformers is needed to write the folder, only to prove it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from pretrain.errors import UserError
from pretrain.export.comparison import Difference, compare, conclude, refuse_strangers, seeded_images
from pretrain.export.parity import ParityError
from pretrain.export.plain_swin import NORM_EPS as SWIN_NORM_EPS
from pretrain.export.plain_swin import plain_swin
from pretrain.export.plain_vit import NORM_EPS, PlainViT, feature_of_image, plain_vit
from pretrain.export.proof import Proof
from pretrain.export.quiet import quiet
from pretrain.export.renaming import Table, rename
from pretrain.export.source import RunWeights
from pretrain.export.timm_folder import crop_ratio
from pretrain.models.backbone import Backbone

FORMAT = "transformers"
OLDEST = (4, 50)  # knows `pooler_act`
_PIL_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling
_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")

_ATTENTION: Table = {
    "blocks.N.attn.qkv.*": (
        "encoder.layer.N.attention.attention.query.*",
        "encoder.layer.N.attention.attention.key.*",
        "encoder.layer.N.attention.attention.value.*",
    ),
    "blocks.N.attn.proj.*": "encoder.layer.N.attention.output.dense.*",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "norm.*": "layernorm.*",
}
_VIT: Table = {
    **_ATTENTION,
    "blocks.N.norm1.*": "encoder.layer.N.layernorm_before.*",
    "blocks.N.norm2.*": "encoder.layer.N.layernorm_after.*",
    "blocks.N.mlp.fc1.*": "encoder.layer.N.intermediate.dense.*",
    "blocks.N.mlp.fc2.*": "encoder.layer.N.output.dense.*",
}
_REGISTERS: Table = {
    **_ATTENTION,
    "blocks.N.norm1.*": "encoder.layer.N.norm1.*",
    "blocks.N.norm2.*": "encoder.layer.N.norm2.*",
    "blocks.N.mlp.*": "encoder.layer.N.mlp.*",
}
_SWIN: Table = {
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "patch_embed.norm.*": "embeddings.norm.*",
    "layers.N.blocks.N.norm1.*": "encoder.layers.N.blocks.N.layernorm_before.*",
    "layers.N.blocks.N.norm2.*": "encoder.layers.N.blocks.N.layernorm_after.*",
    "layers.N.blocks.N.attn.relative_position_*": (
        "encoder.layers.N.blocks.N.attention.self.relative_position_*"
    ),
    "layers.N.blocks.N.attn.qkv.*": (
        "encoder.layers.N.blocks.N.attention.self.query.*",
        "encoder.layers.N.blocks.N.attention.self.key.*",
        "encoder.layers.N.blocks.N.attention.self.value.*",
    ),
    "layers.N.blocks.N.attn.proj.*": "encoder.layers.N.blocks.N.attention.output.dense.*",
    "layers.N.blocks.N.mlp.fc1.*": "encoder.layers.N.blocks.N.intermediate.dense.*",
    "layers.N.blocks.N.mlp.fc2.*": "encoder.layers.N.blocks.N.output.dense.*",
    "layers.N.downsample.*": "encoder.layers.N.downsample.*",
    "norm.*": "layernorm.*",
}


def write(folder: Path, source: RunWeights, model: Backbone) -> Proof:
    """Write config.json, model.safetensors and preprocessor_config.json; reopen them with transformers."""
    version = importlib.metadata.version("transformers") if find_spec("transformers") else None
    if version is not None and tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise UserError(
            f"--format transformers: transformers {version} cannot hand the class token on as pooler_output; "
            f"pip install 'transformers>={'.'.join(map(str, OLDEST))}'"
        )
    if isinstance(model, SwinTransformer):
        config, tensors = _swin(source, model)
        note = "pooler_output is the mean of the last map"
    else:
        vit = plain_vit(FORMAT, source, model)
        config, tensors = _vit(vit)
        note = _what_is_pooled(vit)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _preprocessing(source))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    consumer, difference = f"transformers {config['architectures'][0]}", None
    if version is None:
        note += "; transformers is not installed here, so its reading is not proved"
    else:
        consumer = consumer.replace("transformers", f"transformers {version}")
        difference = _prove(folder, source, model, consumer)
    return conclude(FORMAT, consumer, _FILES, source.state, difference, note)


def _vit(vit: PlainViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        "hidden_size": vit.dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "intermediate_size": vit.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": NORM_EPS,
        "image_size": vit.img_px,
        "patch_size": vit.patch_px,
        "num_channels": 3,
        "qkv_bias": True,
    }
    if vit.leader is None:
        config |= {"architectures": ["IJepaModel"], "model_type": "ijepa"}
        tokens = {"position_embeddings": vit.patch_positions}
        table = _VIT
    elif vit.registers.shape[1] == 0:
        # the pooler is made to hand the class token on: AutoModel would draw one at random
        config |= {"architectures": ["ViTModel"], "model_type": "vit", "pooler_act": "linear"}
        tokens = {"cls_token": vit.leader, "position_embeddings": vit.positions}
        table = _VIT
    else:
        config |= {
            "architectures": ["Dinov2WithRegistersModel"],
            "model_type": "dinov2_with_registers",
            "num_register_tokens": vit.registers.shape[1],
            "mlp_ratio": _ratio(vit),
            "layerscale_value": 1.0,
            "drop_path_rate": 0.0,
            "use_swiglu_ffn": False,
        }
        tokens = {
            "cls_token": vit.leader,
            "register_tokens": vit.registers,
            "mask_token": torch.zeros(1, vit.dim),  # never read without masks
            "position_embeddings": vit.positions,
        }
        table = _REGISTERS
    tensors = {f"embeddings.{name}": tensor for name, tensor in tokens.items()} | rename(vit.blocks, table)
    if table is _REGISTERS:
        for number in range(vit.depth):
            for scale in ("layer_scale1", "layer_scale2"):
                tensors[f"encoder.layer.{number}.{scale}.lambda1"] = torch.ones(vit.dim)
    elif vit.leader is not None:
        tensors["pooler.dense.weight"] = torch.eye(vit.dim)
        tensors["pooler.dense.bias"] = torch.zeros(vit.dim)
    return config, tensors


def _ratio(vit: PlainViT) -> int | float:
    """The width of the MLP as the ratio from which the consumer computes it."""
    ratio = vit.mlp_dim / vit.dim
    return int(ratio) if ratio.is_integer() else ratio


def _what_is_pooled(vit: PlainViT) -> str:
    if vit.leader is None:
        return "there is no pooler_output: the feature of an image is the mean of last_hidden_state"
    return (
        f"pooler_output is the first token (with transformers before 4.50, its tanh); {feature_of_image(vit)}"
    )


def _swin(source: RunWeights, model: SwinTransformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    swin = plain_swin(FORMAT, source, model)
    config = {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": swin.img_px,
        "patch_size": swin.patch_px,
        "num_channels": 3,
        "embed_dim": swin.dim,
        "depths": list(swin.depths),
        "num_heads": list(swin.num_heads),
        "window_size": swin.window,
        "mlp_ratio": float(swin.mlp_ratio),
        "qkv_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "use_absolute_embeddings": False,
        "layer_norm_eps": SWIN_NORM_EPS,
    }
    return config, rename(swin.tensors, _SWIN)


def _preprocessing(source: RunWeights) -> dict[str, Any]:
    """The run's own: resize the shorter side, centre crop, normalise; as in the folder for timm."""
    side = source.backbone.img_px
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(side / crop_ratio(side))},
        "resample": _PIL_FILTERS[source.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.mean),
        "image_std": list(source.std),
    }


def _prove(folder: Path, source: RunWeights, reference: Backbone, consumer: str) -> Difference:
    from transformers import AutoImageProcessor, AutoModel

    with _silent_transformers(), torch.random.fork_rng(devices=[]):
        model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    refuse_strangers(consumer, loading["missing_keys"], loading["unexpected_keys"])
    if loading["mismatched_keys"]:
        raise ParityError(f"{consumer}: shapes differ: {loading['mismatched_keys']}")
    for name, value in (("image_mean", source.mean), ("image_std", source.std)):
        if tuple(getattr(processor, name)) != value:
            raise ParityError(
                f"{consumer}: would use {name} {getattr(processor, name)}, the run used {value}"
            )
    images = seeded_images(*reference.patch_embed.img_size)
    with torch.inference_mode():
        expected = {"tokens": reference.forward_features(images)}
        output = model.eval()(pixel_values=images)
    found = {"tokens": output.last_hidden_state}
    if isinstance(reference, SwinTransformer):
        expected = {"tokens": expected["tokens"].flatten(1, 2), "pooled": expected["tokens"].mean(dim=(1, 2))}
    elif output.pooler_output is not None:
        expected["pooled"] = expected["tokens"][:, 0]
    if output.pooler_output is not None:
        found["pooled"] = output.pooler_output
    return compare(consumer, expected, found)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """It writes progress bars and reports of its own, past logging's switches."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
