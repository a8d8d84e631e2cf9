"""The table of sizes says what timm builds."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from pretrain.plan.backbone import encoder_of
from pretrain.plan.vits import NAMES, size_of


def settings_for(name: str) -> dict[str, object]:
    found = re.search(r"patch(\d+)_(\d+)", name)
    assert found is not None
    patch_px, img_px = map(int, found.groups())
    model = {
        "name": name,
        "img_px": img_px,
        "patch_px": patch_px,
        "class_token": True,
        "pos_embed": "learn",
        "freeze_patch_embed": False,
        "args": {},
    }
    view = {"size_px": img_px, "mask": None, "shift_px": 0, "shift_border": "black"}
    flags = ("corrupt", "patch_augment", "legacy_jitter_after_norm", "shuffle", "local")
    return {"model": model, "views": {"one": {**view, **dict.fromkeys(flags)}}, "tasks": {}}


@pytest.mark.parametrize("name", NAMES)
def test_a_vit_of_the_table_has_the_parameters_that_timm_gives_it(name: str) -> None:
    with torch.device("meta"):
        built = timm.create_model(name, num_classes=0)
    encoder = encoder_of(settings_for(name))
    assert encoder.cost.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert encoder.dim == built.embed_dim
    assert len(encoder.levels) == len(built.blocks)
    assert size_of(settings_for(name)["model"]).num_heads == built.blocks[0].attn.num_heads  # type: ignore[arg-type,union-attr]


def test_arguments_that_no_table_knows_are_not_guessed() -> None:
    model = {"name": "vit_small_patch16_224", "args": {"depth": 4, "embed_dim": 24, "num_heads": 2}}
    size = size_of(model)
    assert size is not None
    assert (size.dim, size.depth, size.num_heads, size.hidden) == (24, 4, 2, 96)
    assert size_of({**model, "args": {"init_values": 1e-5}}) is None
    assert size_of({**model, "name": "vit_small_patch16_dinov3"}) is None
    assert size_of({**model, "name": "swin_tiny_patch4_window7_224"}) is None
