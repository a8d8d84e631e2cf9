"""What one image becomes: a row of blocks, each a token of the network at some depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pretrain.errors import UserError, nearest
from pretrain.tokens import TokenLayout

FeatureName = Literal[
    "class",  # the class token after the final norm
    "mean_patch",  # the mean of the patch tokens
    "tokens",  # class and task tokens, one after the other
    "class_last4",  # the class tokens of the last four blocks, each after the final norm
    "mean_patch_last4",
    "class_mean_patch",  # class token and mean of the patch tokens, one after the other
    "class_rotation",  # the two tokens of SiT, which has a head for each
    "pooled",  # timm's own pooling; of networks without the tokens of a ViT, all there is
    "pixels",
]
FEATURES: tuple[FeatureName, ...] = get_args(FeatureName)[:-1]


class Block(NamedTuple):
    """One token, or the mean of the patch tokens, as wide as a token."""

    token: Literal["class", "mean_patch", "rotation"]
    blocks_before_last: int = 0


def _last_four(token: Literal["class", "mean_patch"]) -> tuple[Block, ...]:
    return tuple(Block(token, before) for before in (3, 2, 1, 0))


BLOCKS: Mapping[str, tuple[Block, ...]] = {
    "class": (Block("class"),),
    "mean_patch": (Block("mean_patch"),),
    "class_last4": _last_four("class"),
    "mean_patch_last4": _last_four("mean_patch"),
    "class_mean_patch": (Block("class"), Block("mean_patch")),
    "class_rotation": (Block("class"), Block("rotation")),
}
TWO_HEADS = ("class_rotation",)  # features with a head for each block


def num_parts(feature: str) -> int:
    """How many heads read the feature, each a part of it."""
    return len(BLOCKS[feature]) if feature in TWO_HEADS else 1


def columns_in(feature: str, wanted: str, width: int) -> slice | None:
    """Where `wanted` stands among the columns of `feature`, None if it does not. width: of a token."""
    if feature == wanted:
        return slice(None)
    stored, asked = BLOCKS.get(feature, ()), BLOCKS.get(wanted, ())
    for first in range(len(stored) - len(asked) + 1) if asked else ():
        if stored[first : first + len(asked)] == asked:
            return slice(first * width, (first + len(asked)) * width)
    return None


def width_of(feature: str, layout: TokenLayout | None, token_width: int) -> int:
    """Numbers per image."""
    if feature == "tokens" and layout is not None:
        return layout.num_prefix * token_width
    return len(BLOCKS.get(feature, (None,))) * token_width


def usual(layout: TokenLayout | None) -> FeatureName:
    """What stands for an image where nothing else is known."""
    return "pooled" if layout is None else "class" if layout.has_class_token else "mean_patch"


def problem_of(feature: str, layout: TokenLayout | None, num_blocks: int) -> str | None:
    """Why a network cannot give a feature, and the remedy; None if it can."""
    if feature not in FEATURES:
        return nearest(feature, FEATURES)
    if feature == "pooled":
        return None
    if layout is None:
        return "this model has no tokens of that kind; use 'pooled'"
    wanted = {block.token for block in BLOCKS.get(feature, ())}
    if "class" in wanted and not layout.has_class_token:
        return "this model has no class token; use 'mean_patch'"
    if feature == "tokens" and not layout.num_prefix:
        return "this model has neither class nor task tokens; use 'mean_patch'"
    if "rotation" in wanted and "rotation" not in layout.registers:
        return "this model has no token of the rotation task; use 'class'"
    deepest = max((block.blocks_before_last for block in BLOCKS.get(feature, ())), default=0)
    if deepest >= num_blocks:
        return f"this model has {num_blocks} blocks only; use '{usual(layout)}'"
    return None


def check_feature(feature: str, layout: TokenLayout | None, num_blocks: int) -> None:
    problem = problem_of(feature, layout, num_blocks)
    if problem is not None:
        raise UserError(f"--feature {feature}: {problem}")


def read_features(
    model: Any, features: Sequence[FeatureName], layout: TokenLayout | None, pixels: Tensor
) -> Tensor:
    """Normalised images (B, 3, H, W) -> the model's features (B, D), one after the other.

    model: of timm; it runs once.
    """
    before = [block.blocks_before_last for feature in features for block in BLOCKS.get(feature, ())]
    tokens = _tokens(model, pixels, 1 + max(before, default=0))
    return torch.cat([_of_tokens(model, feature, layout, tokens) for feature in features], dim=1)


def _of_tokens(
    model: Any, feature: FeatureName, layout: TokenLayout | None, tokens: Sequence[Tensor]
) -> Tensor:
    """tokens: after the last blocks, as many as the feature reads, or more -> (B, D)"""
    if layout is None or feature == "pooled":
        pooled: Tensor = model.forward_head(tokens[-1], pre_logits=True)
        return pooled
    if feature == "tokens":
        return layout.prefix(tokens[-1]).flatten(1)
    found = []
    for block in BLOCKS[feature]:
        of_block = tokens[-1 - block.blocks_before_last]
        if block.token == "class":
            found.append(layout.class_token(of_block))
        elif block.token == "mean_patch":
            found.append(model.fc_norm(layout.patches(of_block).mean(dim=1)))
        else:
            found.append(layout.task_token(of_block, block.token))
    return torch.cat(found, dim=1)


def _tokens(model: Any, pixels: Tensor, num_blocks: int) -> list[Tensor]:
    """Tokens after the last blocks, the last one last, each after the final norm: (B, N, D) each"""
    if num_blocks == 1:
        return [model.forward_features(pixels)]
    found = model.forward_intermediates(
        pixels, num_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    # timm gives patches and prefix apart, or the patches alone where there is no prefix
    return [torch.cat([one[1], one[0]], dim=1) if isinstance(one, tuple) else one for one in found]
