"""What other libraries' Swin Transformers hold of ours: the tensors by the names of the authors' own code.

timm merges patches at the beginning of a stage, the authors (Liu et al., 2021, arXiv:2103.14030) and all
others at the end of the stage before, and they keep the index of the relative positions as a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.export.source import RunWeights

NORM_EPS = 1e-5  # of timm's Swin and of all others


@dataclass(frozen=True)
class PlainSwin:
    """Sizes and tensors of a Swin of square images."""

    img_px: int
    patch_px: int
    dim: int  # of the first stage
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: int
    window: int  # tokens per side
    large_image_px: int  # an image whose every map holds more than one window, and whole windows only
    tensors: dict[str, Tensor]  # by the authors' names, index buffers among them

    @property
    def last_stage(self) -> int:
        return len(self.depths) - 1


def plain_swin(format: str, source: RunWeights, model: SwinTransformer, any_maps: bool = False) -> PlainSwin:
    """Take a Swin apart; what the other libraries compute in another way raises `UserError`.

    any_maps: maps that are not whole windows are accepted, as long as all stages have windows of one size.
    """
    blocks = [block for stage in model.layers for block in stage.blocks]
    windows = sorted({side for block in blocks for side in block.window_size})
    maps = [stage.output_resolution[0] for stage in model.layers]
    strange = next(_strange_parts(blocks), "")
    if len(set(model.patch_embed.img_size)) > 1:
        strange = "its images are not square"
    if not strange and (len(windows) > 1 or not (any_maps or all(side % windows[0] == 0 for side in maps))):
        strange = (
            f"its maps of {', '.join(map(str, maps))} tokens per side are not whole windows of one size "
            f"({', '.join(map(str, windows))}), which others pad in another way"
        )
    if strange:
        raise UserError(
            f"--format {format}: cannot hold '{source.backbone.name}' at {source.backbone.img_px} px: "
            f"{strange}; use --format timm or onnx"
        )
    return PlainSwin(
        img_px=int(model.patch_embed.img_size[0]),
        patch_px=source.backbone.patch_px,
        dim=int(model.embed_dim),
        depths=tuple(len(stage.blocks) for stage in model.layers),
        num_heads=tuple(int(stage.blocks[0].attn.num_heads) for stage in model.layers),
        mlp_ratio=blocks[0].mlp.fc1.out_features // blocks[0].dim,
        window=windows[0],
        large_image_px=source.backbone.token_px * windows[0] * 2,
        tensors=original_names(source, model),
    )


def original_names(source: RunWeights, model: SwinTransformer) -> dict[str, Tensor]:
    """The authors' names: `layers.i.downsample` after the blocks of stage i, and index buffers."""
    tensors = {}
    for name, tensor in source.state.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        tensors[".".join(parts)] = tensor
    for name, index in model.named_buffers():
        if name.endswith(".relative_position_index"):
            tensors[name] = index
    return tensors


def _strange_parts(blocks: list[Any]) -> Iterator[str]:
    """What only timm's Swin has, one phrase each."""
    ratios = set()
    for block in blocks:
        if type(block) is not SwinTransformerBlock or type(block.mlp) is not Mlp:
            yield f"its blocks are {type(block).__name__}"
            continue
        ratios.add(block.mlp.fc1.out_features / block.dim)
        if block.attn.qkv.out_features != 3 * block.dim:
            yield "its heads are narrower or wider than their share of the channels"
        if block.attn.qkv.bias is None:
            yield "its queries, keys and values have no bias"
        if type(block.mlp.act) is not nn.GELU:
            yield f"its activation is {type(block.mlp.act).__name__}"
        if not isinstance(block.norm1, nn.LayerNorm) or block.norm1.eps != NORM_EPS:
            yield f"its norms are no layer norms with an epsilon of {NORM_EPS:g}"
        if block.always_partition:
            yield "it shifts windows over maps of one window"
    if len(ratios) != 1 or not min(ratios).is_integer():
        yield "its MLPs are not a whole multiple of the channels wide"
