"""Backbone, decoder and auxiliary heads as one network, put together from a recipe, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.export.source import WeightsName
from pretrain.transfer.hooks import TransferBackbone, backbone
from pretrain.transfer.segmentation.heads import (
    FcnAuxiliary,
    MlaAuxiliary,
    MlaHead,
    MlaNeck,
    NaiveHead,
    PupAuxiliary,
    PupHead,
    StageNorms,
    UperHead,
)
from pretrain.transfer.segmentation.recipe import VIT_HEADS, HeadKind, HeadRecipe, SegmentationRecipe
from pretrain.transfer.segmentation.scores import IGNORED

CHANNELS: dict[HeadKind, int] = {"naive": 256, "pup": 256, "mla": 256, "upernet": 512}
# blocks with an auxiliary head in SETR's release, by depth, from 0
AUX_LEVELS: dict[HeadKind, dict[int, tuple[int, ...]]] = {
    "naive": {12: (2, 5, 8), 24: (9, 14, 19)},
    "pup": {12: (4, 7, 9, 11), 24: (9, 14, 19, 23)},
}
NUM_MLA_LEVELS = 4
AUX_STAGE = 2  # of a Swin, from 0


@dataclass(frozen=True)
class Reads:
    """Which of the backbone's maps go where, as positions among those it gives."""

    levels: tuple[int, ...]  # that the backbone gives
    decoder: tuple[int, ...]
    auxiliary: tuple[int, ...]


class Segmenter(nn.Module):
    """Logits of the decoder and, while training, of the auxiliary heads."""

    def __init__(
        self,
        trunk: TransferBackbone,
        neck: nn.Module | None,
        decoder: nn.Module,
        auxiliary: Sequence[nn.Module],
        reads: Reads,
    ) -> None:
        super().__init__()
        self.backbone = trunk
        self.neck = neck
        self.decoder = decoder
        self.auxiliary = nn.ModuleList(auxiliary)
        self.reads = reads

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Normalised (B, 3, H, W) -> (B, K, H, W), the decoder's first"""
        size = (pixels.shape[2], pixels.shape[3])
        maps = self.backbone(pixels)
        if self.neck is not None:
            maps = self.neck(maps)
        read = [maps[place] for place in self.reads.decoder]
        single = isinstance(self.decoder, NaiveHead | PupHead)
        logits = [self.decoder(read[0] if single else read, size)]
        if self.training:
            logits += [
                head(maps[place], size)
                for head, place in zip(self.auxiliary, self.reads.auxiliary, strict=True)
            ]
        return logits


def build_segmenter(
    weights: str | Path,
    recipe: SegmentationRecipe,
    num_classes: int,
    network: WeightsName | None = None,
) -> Segmenter:
    """A pretrained backbone under a fresh head. Raises UserError where the two do not go together."""
    head = recipe.head
    trunk = backbone(
        weights, "maps", network=network, drop_path_ratio=recipe.drop_path_ratio, seed=recipe.seed
    )
    if trunk.is_swin and head.kind in VIT_HEADS:
        raise ConfigError(
            f"head.kind: '{head.kind}' reads the blocks of a Vision Transformer, and '{weights}' is a Swin; "
            "set head.kind=upernet"
        )
    if not trunk.is_swin and head.kind == "upernet":
        raise ConfigError(
            f"head.kind: 'upernet' reads the four stages of a Swin, and '{weights}' is a Vision Transformer; "
            "set head.kind=pup, naive or mla"
        )
    if recipe.crop_px % trunk.patch_px:
        below = recipe.crop_px // trunk.patch_px * trunk.patch_px
        legal = f"{below} or {below + trunk.patch_px}" if below else str(trunk.patch_px)
        raise ConfigError(
            f"crop_px: {recipe.crop_px} is not a whole number of the {trunk.patch_px} px patches of "
            f"'{weights}'; use {legal}"
        )
    if trunk.is_swin:
        reads = Reads((0, 1, 2, 3), (0, 1, 2, 3), (AUX_STAGE,))
        _refuse_levels(head)
    else:
        reads = _reads_of_vit(head, len(trunk.network.blocks))
        # the same network, tapped where the heads read it
        trunk = TransferBackbone(trunk.encoder, "maps", reads.levels, None, None)
    if not head.aux_weight:
        reads = replace(reads, auxiliary=())
    channels = head.channels or CHANNELS[head.kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        neck, decoder, auxiliary = _parts(head, trunk.num_channels, channels, num_classes, reads)
    return Segmenter(trunk, neck, decoder, auxiliary, reads)


def _parts(
    head: HeadRecipe, dims: Sequence[int], channels: int, num_classes: int, reads: Reads
) -> tuple[nn.Module | None, nn.Module, list[nn.Module]]:
    """Neck, decoder, auxiliary heads. dims: channels of the maps that the backbone gives."""
    if head.kind == "upernet":
        return (
            StageNorms(dims),
            UperHead(dims, channels, num_classes, head.dropout_ratio),
            [FcnAuxiliary(dims[stage], num_classes, head.dropout_ratio) for stage in reads.auxiliary],
        )
    if head.kind == "mla":
        return (
            MlaNeck(dims[0], channels, len(dims)),
            MlaHead(channels, num_classes, len(dims)),
            [MlaAuxiliary(channels, num_classes) for _ in reads.auxiliary],
        )
    main, extra = (NaiveHead, NaiveHead) if head.kind == "naive" else (PupHead, PupAuxiliary)
    return (
        None,
        main(dims[0], channels, num_classes),
        [extra(dims[0], channels, num_classes) for _ in reads.auxiliary],
    )


def _reads_of_vit(head: HeadRecipe, depth: int) -> Reads:
    if head.kind == "mla":
        levels = head.levels or tuple(depth * k // NUM_MLA_LEVELS - 1 for k in range(1, NUM_MLA_LEVELS + 1))
        if head.aux_levels is not None:
            raise ConfigError(
                "head.aux_levels: mla has an auxiliary head on each of head.levels; leave it out"
            )
        if head.levels is None and depth < NUM_MLA_LEVELS:
            raise ConfigError(
                f"head.kind: 'mla' joins {NUM_MLA_LEVELS} blocks, and this backbone has {depth}; use pup "
                "or naive"
            )
        _check_levels("head.levels", levels, depth)
        places = tuple(range(len(levels)))
        return Reads(levels, places, places)
    if head.levels is not None and len(head.levels) > 1:
        raise ConfigError(
            f"head.levels: {list(head.levels)}, but '{head.kind}' reads one block; give one, or head.kind=mla"
        )
    main = head.levels or (depth - 1,)
    auxiliary = head.aux_levels if head.aux_levels is not None else default_aux_levels(head.kind, depth)
    _check_levels("head.levels", main, depth)
    _check_levels("head.aux_levels", auxiliary, depth)
    if not head.aux_weight:
        auxiliary = ()
    levels = tuple(sorted({*main, *auxiliary}))
    return Reads(levels, (levels.index(main[0]),), tuple(levels.index(level) for level in auxiliary))


def default_aux_levels(kind: HeadKind, depth: int) -> tuple[int, ...]:
    """Blocks with an auxiliary head: as published for 12 and 24 blocks, else at the same shares of 12."""
    published = AUX_LEVELS[kind]
    if depth in published:
        return published[depth]
    return tuple(sorted({max(0, round((level + 1) * depth / 12) - 1) for level in published[12]}))


def _check_levels(where: str, levels: Sequence[int], depth: int) -> None:
    absent = [level for level in levels if level >= depth]
    if absent:
        raise ConfigError(f"{where}: this backbone has no block {absent[0]}; it has 0 to {depth - 1}")
    if list(levels) != sorted(set(levels)):
        raise ConfigError(f"{where}: {list(levels)}: name each once, from shallow to deep")


def _refuse_levels(head: HeadRecipe) -> None:
    for name in ("levels", "aux_levels"):
        if getattr(head, name) is not None:
            raise ConfigError(f"head.{name}: upernet reads all stages of a Swin, aux the third; leave it out")


def losses(logits: Sequence[Tensor], labels: Tensor, aux_weight: float) -> dict[str, Tensor]:
    """Cross-entropy of the decoder, and of each auxiliary head times its weight.

    logits: (B, K, H, W) each; labels: (B, H, W) of 0..K-1 and IGNORED. Summed over labelled pixels and
    divided by all pixels, as in SETR's release: so it does not matter how images are dealt to processes.
    """
    targets = labels.long()
    found = {}
    for number, each in enumerate(logits):
        total = F.cross_entropy(each.float(), targets, ignore_index=IGNORED, reduction="sum")
        loss = total / targets.numel()
        found["decoder" if number == 0 else f"auxiliary_{number}"] = loss * (aux_weight if number else 1.0)
    return found
