"""From a frozen encoder to a network that learns to classify: a fresh head, and what a recipe changes below.

The result is a plain timm model: `model(images)` gives logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.evaluate.encoder import CentreCrop, Encoder
from pretrain.evaluate.feature import problem_of
from pretrain.evaluate.recipes import FinetuneRecipe
from pretrain.export.timm_folder import crop_ratio
from pretrain.tokens import TokenLayout

EMBEDDING = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")  # layer 0 of a ViT


def build_classifier(
    encoder: Encoder, recipe: FinetuneRecipe, num_classes: int, seed: int, image_px: int | None = None
) -> Encoder:
    """The encoder, its model now trainable, with a head and the recipe's changes; new weights follow `seed`.

    image_px: another side of the images; None keeps the encoder's. The positional embedding is then resampled
    bicubically. The encoder's own model is changed in place.
    """
    if encoder.feature == "pixels":
        raise UserError("'pixels' has no network to fine-tune; name weights")
    model: Any = encoder.model  # timm's own methods; nn.Module tells nothing of them
    crop, layout = encoder.crop, encoder.layout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if image_px is not None and image_px != crop.size_px:
            _resize(model, image_px)
            crop = CentreCrop(image_px, int(image_px / crop_ratio(image_px)), crop.interpolation)
            layout = layout and replace(layout, grid=tuple(model.patch_embed.grid_size))
        if layout is not None and recipe.pos_embed == "add" and model.pos_embed is None:
            _add_positions(model)
        _add_head(model, layout, recipe, num_classes)
    set_drop_path(model, recipe.drop_path_ratio)
    trained = replace(encoder, model=model.requires_grad_(True), crop=crop, layout=layout)
    return trained.reading("pooled" if layout is None else recipe.pool)


def _resize(model: Any, image_px: int) -> None:
    if not hasattr(model, "set_input_size"):
        if hasattr(model, "pos_embed") or hasattr(model, "patch_embed"):
            raise UserError(f"--img-px {image_px}: timm cannot change the image size of this model")
        return  # a convolutional network takes any size
    if isinstance(model, VisionTransformer) and image_px % model.patch_embed.patch_size[0]:
        patch_px = model.patch_embed.patch_size[0]
        raise UserError(f"--img-px {image_px}: not whole patches of {patch_px} px; use a multiple of it")
    try:
        model.set_input_size(img_size=(image_px, image_px))
    except (AssertionError, ValueError) as error:
        raise UserError(f"--img-px {image_px}: this model refuses it ({error})") from error


def _add_positions(model: VisionTransformer) -> None:
    """The learned positional embedding that timm would have made."""
    num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    shape = (1, model.patch_embed.num_patches + num_prefix, model.embed_dim)
    model.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


class TokenHeads(nn.Module):
    """A linear head for the class token and one for the token of the rotation task, as in SiT."""

    def __init__(self, layout: TokenLayout, width: int, num_classes: int) -> None:
        super().__init__()
        self.layout = layout
        self.of_class = nn.Linear(width, num_classes)
        self.of_rotation = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> logits (B, 2, K)"""
        read = self.layout.class_token(tokens), self.layout.task_token(tokens, "rotation")
        return torch.stack([self.of_class(read[0]), self.of_rotation(read[1])], dim=1)


def _add_head(model: Any, layout: TokenLayout | None, recipe: FinetuneRecipe, num_classes: int) -> None:
    problem = layout and problem_of(recipe.pool, layout, len(model.blocks))
    if problem:
        raise UserError(f"--pool {recipe.pool}: {problem}")
    if layout is None:
        model.reset_classifier(num_classes)
    elif recipe.pool == "class":
        model.reset_classifier(num_classes, global_pool="token")
    elif recipe.pool == "class_rotation":
        model.reset_classifier(num_classes, global_pool="")  # all tokens go to the head
        model.head = TokenHeads(layout, model.embed_dim, num_classes)
    else:
        model.reset_classifier(num_classes, global_pool="avg")
        if recipe.norm_after_pool and isinstance(model.fc_norm, nn.Identity):
            model.fc_norm, model.norm = nn.LayerNorm(model.embed_dim, eps=1e-6), nn.Identity()
    for head in model.get_classifier().modules():
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=recipe.head_std)
            nn.init.zeros_(head.bias)


def set_drop_path(model: nn.Module, ratio: float) -> None:
    """Stochastic depth that rises linearly over the blocks, from 0 to `ratio`, as timm builds it."""
    names = ("drop_path", "drop_path1", "drop_path2")
    blocks = [module for module in model.modules() if any(hasattr(module, name) for name in names)]
    if not blocks and ratio:
        raise UserError(f"drop_path_ratio={ratio:g}: this model has no drop path; set drop_path_ratio=0")
    rates = torch.linspace(0, ratio, len(blocks)).tolist()
    for block, rate in zip(blocks, rates, strict=True):
        for name in names:
            if hasattr(block, name):
                setattr(block, name, DropPath(rate) if rate else nn.Identity())


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Parameter name -> layer: 0 the embedding, b + 1 block b, and above the last block all that follows it.

    As in arXiv:2111.06377: timm's own grouping of a ViT counts the final norm to the last block. Other
    networks are grouped as timm groups them.
    """
    if not isinstance(model, VisionTransformer):
        if not hasattr(model, "group_matcher"):
            raise UserError("layer_decay: timm knows no layers of this model; set layer_decay=1")
        matcher: Any = model.group_matcher
        ids: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
        return ids
    blocks: Any = model.blocks
    num_blocks, found = len(blocks), {}
    for name, _ in model.named_parameters():
        if name.startswith("blocks."):
            found[name] = int(name.split(".")[1]) + 1
        else:
            found[name] = 0 if name.startswith(EMBEDDING) else num_blocks + 1
    return found


def learning_groups(model: nn.Module, recipe: FinetuneRecipe) -> list[dict[str, Any]]:
    """Parameter groups of AdamW; `lr_scale` multiplies the schedule's learning rate.

    Layer i of L blocks has the scale layer_decay ** (L + 1 - i), so the head has 1.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    layers = layer_ids(model) if recipe.layer_decay < 1 else dict.fromkeys(parameters, 0)
    top = max(layers.values())
    names: Any = getattr(model, "no_weight_decay", set)  # as timm has it: positions, class token, registers
    spared = names()
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        is_spared = not recipe.decay_everything and (parameter.ndim <= 1 or name in spared)
        weight_decay = 0.0 if is_spared else recipe.weight_decay
        layer = layers[name]
        group = groups.setdefault(
            (layer, weight_decay),
            {
                "params": [],
                "weight_decay": weight_decay,
                "lr_scale": recipe.layer_decay ** (top - layer),
                "lr": 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
