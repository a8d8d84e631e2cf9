"""Patch-level corruptions: what the patch tasks of a `ViewPlan` do to the pixels of their own patches.

Patches outside the sets stay bit-identical, which is why one forward pass can serve all tasks at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.tokens import take
from pretrain.views.pixels import color_jitter, crop_resize_tiles, join_patches, split_patches, to_gray
from pretrain.views.plan import TilePlan, ViewPlan, tile_crop_px


def put(values: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """Replace what `take` would pick: values (M, N, ...), index int64 (M, K), new (M, K, ...)."""
    return values.scatter(1, index.view(index.shape + (1,) * (values.dim() - 2)).expand_as(new), new)


def augment_tiles(tiles: Tensor, plan: TilePlan, normalized: bool = False) -> Tensor:
    """Crop and resize back, jitter and grey each patch, so that borders and colours give no neighbour away.

    tiles: (M, T, 3, P, P) in [0, 1], the patches that go to `plan.index`. `normalized` says that they are not
    in [0, 1]; jittered ones are clamped to it then all the same, as in RelViT's release.
    """
    images = tiles.flatten(0, 1)  # (M * T, 3, P, P)
    images = crop_resize_tiles(images, plan.offset_px.flatten(0, 1), tile_crop_px(tiles.shape[-1]))
    jittered = color_jitter(images, plan.jitter)
    images = torch.where(plan.jitter.apply.view(-1, 1, 1, 1), jittered, images) if normalized else jittered
    images = torch.where(plan.gray.view(-1, 1, 1, 1), to_gray(images), images)
    return images.view_as(tiles)


def corrupt(clean: Tensor, plan: ViewPlan, patch_px: int, inpaint_pixels: Tensor | None = None) -> Tensor:
    """Apply the patch tasks: colorization patches turn grey, pairs are augmented, jigsaw patches also moved.

    clean: (M, 3, H, W) in [0, 1], already turned; returns the same shape and range. Inpainting patches take
    the colour `inpaint_pixels`, (3,), such as the mean, which normalises to zero; None leaves them as they
    are, for a mask token to replace. Where sets overlap, tasks work in this order on what is shown by then:
    colorization, inpainting, pairs and jigsaw.
    """
    sets = plan.patches
    patches = split_patches(clean, patch_px)  # (M, N, 3, P, P)
    colored = take(patches, sets.colorization)
    corrupted = put(patches, sets.colorization, to_gray(colored.flatten(0, 1)).view_as(colored))
    if inpaint_pixels is not None:
        blank = inpaint_pixels.to(clean.dtype).view(3, 1, 1)
        corrupted = put(corrupted, sets.inpainting, blank.expand(*sets.inpainting.shape, *patches.shape[2:]))
    if plan.tiles.index.shape[1]:
        source = torch.cat(
            [sets.pairs.flatten(1), sets.jigsaw_source], dim=1
        )  # as plan.tiles.index, but moved
        tiles = augment_tiles(take(corrupted, source), plan.tiles)
        num_paired = sets.pairs.flatten(1).shape[1]
        if sets.overlapping:  # a scatter to the same place twice has no order
            corrupted = put(corrupted, plan.tiles.index[:, :num_paired], tiles[:, :num_paired])
            corrupted = put(corrupted, plan.tiles.index[:, num_paired:], tiles[:, num_paired:])
        else:
            corrupted = put(corrupted, plan.tiles.index, tiles)
    return join_patches(corrupted, clean.shape[3] // patch_px)


def augment_patches(images: Tensor, plan: TilePlan, patch_px: int, normalized: bool = False) -> Tensor:
    """Augment every patch of an image on its own, where `plan` lists all of them in order. Same shape."""
    patches = split_patches(images, patch_px)  # (M, N, 3, P, P)
    return join_patches(augment_tiles(patches, plan, normalized), images.shape[3] // patch_px)


def shuffle_patches(images: Tensor, source: Tensor, patch_px: int) -> Tensor:
    """Show at place i the patch `source[:, i]`, int64 (M, N). Same shape as the images."""
    return join_patches(take(split_patches(images, patch_px), source), images.shape[3] // patch_px)


def relative_position_label(first: Tensor, second: Tensor, columns: int) -> Tensor:
    """The direction of patch `second` as seen from patch `first`: [LU, U, RU, L, R, LD, D, RD] = 0..7.

    first, second: int64 patch indices (row by row), different from each other. For patches that are not
    neighbours, the direction is that of the signs of both distances.
    """
    down = (second // columns - first // columns).sign()
    right = (second % columns - first % columns).sign()
    cell = 3 * (down + 1) + right + 1  # 0..8 of a 3 x 3 block around `first`, which is 4 itself
    return cell - (cell > 4).long()
