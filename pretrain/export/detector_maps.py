"""Our own backbone run as detectors run theirs: on patches alone, or on large images."""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from pretrain.export.source import RunWeights
from pretrain.models.backbone import Backbone, create_backbone, encode, layout_of


@torch.inference_mode()
def patches_alone(source: RunWeights, model: Backbone, images: Tensor) -> Tensor:
    """The map after the last block, before the final norm, of a ViT that sees patches only: (B, D, h, w)"""
    args = source.backbone.args | {"reg_tokens": 0}
    config = source.backbone.model_copy(update={"class_token": False, "args": args})
    prefix = ("cls_token", "reg_token")
    state = {name: value for name, value in model.state_dict().items() if name not in prefix}
    layout = layout_of(config, ())
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][:, -layout.num_patches :]
    with torch.random.fork_rng(devices=[]):
        vit = create_backbone(config).eval()
    vit.load_state_dict(state)
    last = len(vit.blocks) - 1
    return encode(vit, images, layout, taps=(last,)).taps[last]


@torch.inference_mode()
def last_map(source: RunWeights, model: Backbone, images: Tensor) -> Tensor:
    """The map after the final norm, (B, D, h, w); a Swin is rebuilt for the size of the images."""
    assert isinstance(model, SwinTransformer)
    side_px = images.shape[-1]
    if side_px != source.backbone.img_px:
        config = source.backbone.model_copy(update={"img_px": side_px})
        with torch.random.fork_rng(devices=[]):
            larger = create_backbone(config).eval()
        larger.load_state_dict(model.state_dict())
        model = larger
    features: Tensor = model.forward_features(images)
    return features.permute(0, 3, 1, 2)
