"""What other libraries' Vision Transformers hold of ours: one leading token, registers, positions, blocks.

Where the others have fewer parts, the arithmetic is moved, not changed: the position of a register is added
to the register, a layer scale is multiplied into the projection before it, an absent bias or position is
zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.export.source import RunWeights
from pretrain.models.backbone import Backbone

_TOKENS = ("cls_token", "reg_token", "pos_embed")
NORM_EPS = 1e-6  # of timm's ViT and of most others


@dataclass(frozen=True)
class PlainViT:
    """Sizes and tensors of a plain ViT of square images."""

    img_px: int
    patch_px: int
    dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    # the class token, else the first register, (1, 1, D); None where a sequence is patches only
    leader: Tensor | None
    leader_position: Tensor  # (1, 1, D), zero where it has none
    registers: Tensor  # the other prefix tokens with their positions, (1, R, D)
    patch_positions: Tensor  # (1, P, D), zero where the model has none
    has_class_token: bool
    is_pooled_by_token: bool  # its class token is the feature of an image
    blocks: dict[str, Tensor]  # all the rest by timm's names

    @property
    def positions(self) -> Tensor:
        """(1, 1 + P, D), the leader's first"""
        return torch.cat([self.leader_position, self.patch_positions], dim=1)


def plain_vit(format: str, source: RunWeights, model: Backbone) -> PlainViT:
    """Take a ViT apart; a part that only timm has raises `UserError`."""
    strange = "it is no Vision Transformer"
    if isinstance(model, VisionTransformer):
        strange = next(_strange_parts(model), "")
    if strange or not isinstance(model, VisionTransformer):
        raise UserError(
            f"--format {format}: cannot hold '{source.backbone.name}': {strange}; use --format timm or onnx"
        )
    state, dim = source.state, int(model.embed_dim)
    prefix = torch.cat(
        [state[name] for name in ("cls_token", "reg_token") if name in state] or [torch.zeros(1, 0, dim)],
        dim=1,
    )
    num_prefix, num_patches = prefix.shape[1], int(model.patch_embed.num_patches)
    prefix_positions, patch_positions = torch.zeros(1, num_prefix, dim), torch.zeros(1, num_patches, dim)
    if "pos_embed" in state:
        patch_positions = state["pos_embed"][:, -num_patches:]
        if not model.no_embed_class:
            prefix_positions = state["pos_embed"][:, :num_prefix]
    return PlainViT(
        img_px=int(model.patch_embed.img_size[0]),
        patch_px=source.backbone.patch_px,
        dim=dim,
        depth=len(model.blocks),
        num_heads=int(model.blocks[0].attn.num_heads),
        mlp_dim=int(model.blocks[0].mlp.fc1.out_features),
        leader=prefix[:, :1] if num_prefix else None,
        leader_position=prefix_positions[:, :1] if num_prefix else torch.zeros(1, 1, dim),
        registers=prefix[:, 1:] + prefix_positions[:, 1:],
        patch_positions=patch_positions,
        has_class_token=model.cls_token is not None,
        is_pooled_by_token=model.global_pool == "token",
        blocks=_blocks({name: state[name] for name in state if name not in _TOKENS}, len(model.blocks)),
    )


def refuse_registers(format: str, vit: PlainViT, source: RunWeights) -> None:
    """For formats that know a class token only."""
    if num_registers := vit.registers.shape[1]:
        raise UserError(
            f"--format {format}: has no place for the register tokens "
            f"({', '.join(source.registers[-num_registers:])}); add --drop-registers, which changes the "
            "features, or use --format timm, transformers, dino or onnx"
        )


def refuse_no_class_token(format: str, vit: PlainViT) -> None:
    if vit.leader is None:
        raise UserError(
            f"--format {format}: its Vision Transformer always has a class token, this one has none; use "
            "--format timm, transformers, mmpretrain, mmseg, detectron2 or onnx"
        )


def feature_of_image(vit: PlainViT) -> str:
    """For notes, where the consumer hands out the first token by itself."""
    if vit.is_pooled_by_token:
        return "the feature of an image is the class token"
    first = "class token" if vit.has_class_token else "first register, in the place of a class token"
    return f"the feature of an image is the mean of the patch tokens, not the first token (here the {first})"


def _strange_parts(model: VisionTransformer) -> Iterator[str]:
    """What no other library's plain ViT has, one phrase each; compared features are the last word."""
    if len(set(model.patch_embed.img_size)) > 1:
        yield f"it is for images of {' x '.join(map(str, model.patch_embed.img_size))} px, not square ones"
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.norm, nn.Identity):
        yield f"its patches are embedded by {type(model.patch_embed).__name__}"
    if not isinstance(model.norm_pre, nn.Identity):
        yield "it has a norm before the first block"
    if model.patch_embed.proj.bias is None:
        yield "its patch embedding has no bias"
    if not isinstance(model.norm, nn.LayerNorm) or not isinstance(model.fc_norm, nn.Identity):
        yield "its final norm is no layer norm, or comes after pooling"
    if model.attn_pool is not None:
        yield "its tokens are pooled by attention"
    if {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} != {NORM_EPS}:
        yield f"the epsilon of its layer norms is not {NORM_EPS:g}"
    for block in model.blocks:
        if type(block) is not Block or type(block.mlp) is not Mlp:
            yield f"its blocks are {type(block).__name__} with {type(block.mlp).__name__}"
        elif not isinstance(block.norm1, nn.LayerNorm):
            yield f"its norms are {type(block.norm1).__name__}"
        elif type(block.mlp.act) is not nn.GELU or block.mlp.act.approximate != "none":
            yield f"its activation is {type(block.mlp.act).__name__}"
        elif not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity):
            yield "its MLP has a norm inside"
        elif any(
            not isinstance(getattr(block.attn, part, None) or nn.Identity(), nn.Identity)
            for part in ("q_norm", "k_norm", "norm", "gate")
        ):
            yield "its attention has norms or gates inside"
        elif block.attn.qkv.out_features != 3 * model.embed_dim:
            yield "its heads are narrower or wider than their share of the tokens"
        elif block.attn.proj.bias is None:
            yield "its projections have no bias"


def _blocks(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Layer scales folded into the projections before them, absent biases of qkv as zeros."""
    tensors = dict(state)
    for number in range(depth):
        for scale, projection in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = tensors.pop(f"blocks.{number}.{scale}.gamma", None)  # (D,)
            if gamma is not None:
                for name in ("weight", "bias"):
                    tensor = tensors[f"blocks.{number}.{projection}.{name}"]
                    scaled = tensor * (gamma.unsqueeze(1) if name == "weight" else gamma)
                    tensors[f"blocks.{number}.{projection}.{name}"] = scaled
        bias = f"blocks.{number}.attn.qkv.bias"
        if bias not in tensors:
            tensors[bias] = torch.zeros(tensors[f"blocks.{number}.attn.qkv.weight"].shape[0])
    return tensors
