"""Small models of every kind that a format must hold or refuse, as a run leaves them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from run_folder import TINY, random_state, tiny_config, write_checkpoint

from pretrain.export.parity import ParityError, rebuild
from pretrain.export.source import RunWeights, read_weights
from pretrain.models.backbone import Backbone, BackboneConfig

SWIN_ARGS: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2}
SWIN = BackboneConfig(name="swin_tiny_patch4_window7_224", img_px=32, patch_px=4, args=SWIN_ARGS)
# maps of 8 and 4 tokens per side are no whole windows of 3
ODD_MAPS = SWIN.model_copy(update={"args": SWIN_ARGS | {"window_size": 3, "depths": [1, 2]}})
EXTRAS = TINY | {"init_values": 0.5, "qkv_bias": False}  # layer scales; queries, keys, values without bias

KINDS: dict[str, tuple[BackboneConfig, tuple[str, ...]]] = {
    "class token": (tiny_config(), ()),
    "registers": (tiny_config(), ("rotation", "cluster")),
    "registers without positions of their own": (
        tiny_config(args=TINY | {"no_embed_class": True}),
        ("rotation", "cluster"),
    ),
    "patches only": (tiny_config(class_token=False), ()),
    "patches with fixed positions": (tiny_config(class_token=False, pos_embed="sincos"), ()),
    "one block": (tiny_config(args=TINY | {"depth": 1}), ()),
    "one block of patches": (tiny_config(class_token=False, args=TINY | {"depth": 1}), ()),
    "one register, no class token": (tiny_config(class_token=False), ("rotation",)),
    "class token, pooled by mean": (tiny_config(args=TINY | {"global_pool": "avg", "fc_norm": False}), ()),
    "wide images": (tiny_config(args=TINY | {"img_size": [32, 48]}), ()),
    "no positions": (tiny_config(pos_embed="none"), ()),
    "extras": (tiny_config(args=EXTRAS), ()),
    "swin": (SWIN, ()),
    "swin with odd maps": (ODD_MAPS, ()),
    "swin with small maps": (SWIN.model_copy(update={"args": SWIN_ARGS | {"window_size": 7}}), ()),
    "tokens to token": (BackboneConfig(name="t2t_vit_14", img_px=64, args={"depth": 1}), ()),
    "wide blocks": (tiny_config(args=TINY | {"mlp_ratio": 2.5}), ()),
    "other activation": (tiny_config(args=TINY | {"act_layer": "quick_gelu"}), ()),
    "norm before blocks": (tiny_config(args=TINY | {"pre_norm": True}), ()),
}


def load(kind: str, folder: Path) -> tuple[RunWeights, Backbone]:
    """What the exporters are handed: the weights of a checkpoint and the network rebuilt from them."""
    config, registers = KINDS[kind]
    write_checkpoint(
        folder / "run", config, registers, networks={"student": random_state(config, len(registers))}
    )
    source = read_weights(folder / "run")
    return source, rebuild(source)


def recorded_tensors(consumer: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a class of another library has, for "one block" or "swin".

    Recorded from the classes themselves: detectron2 at commit 02b5c4e2, mmpretrain 1.2.0, mmsegmentation
    1.2.2, mmdetection 3.3.0 (whose Swin has the names of the other two's).
    """
    recorded = json.loads((Path(__file__).parent / "consumer_tensors.json").read_text())[consumer]
    return {name: tuple(shape) for name, shape in recorded.items()}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def every_tensor_counts(
    module: ModuleType, kind: str, folder: Path, left_out: tuple[str, ...] = (), **options: Any
) -> None:
    """An export in which one tensor is another than the reference's must fail, whichever it is.

    One of each role: of the tensors of many blocks, those of the last. left_out: those that change nothing.
    """
    source, model = load(kind, folder)
    generator = torch.Generator().manual_seed(1)
    roles = {re.sub(r"\d+", "N", name): name for name in source.state}
    for number, name in enumerate(roles.values()):
        tensor = source.state[name]
        noise = 0.1 * torch.randn(tensor.shape, generator=generator)
        other = replace(source, state={**source.state, name: tensor + noise})
        if name in left_out:
            module.write(folder / str(number), other, model, **options)
        else:
            with pytest.raises(ParityError, match="differs by"):
                module.write(folder / str(number), other, model, **options)
