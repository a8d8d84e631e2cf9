"""Training images in epochs, augmented: every process its share of every batch, whatever came before."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain.evaluate.augment import ChainedImages, epoch_views, padded_crops
from pretrain.evaluate.encoder import Encoder
from pretrain.evaluate.image_set import ImageSet, prepare_images
from pretrain.evaluate.recipes import FinetuneRecipe


@dataclass(frozen=True)
class Share:
    """This process's part of a global batch; padded, so that all processes have as many images."""

    views: Tensor  # int64 (B,): `image * repeats + repeat`
    weights: Tensor  # float32 (B,): 1 for an image of the batch, 0 for padding


def augmented_batches(
    encoder: Encoder,
    train: ImageSet,
    recipe: FinetuneRecipe,
    seed: int,
    accelerator: Accelerator,
    first_epoch: int,
    batch_size: int,
    num_workers: int | None,
) -> Iterator[tuple[Share, Tensor]]:
    """Every batch from an epoch on: this process's share, its images as uint8 (B, 3, S, S) on the device.

    num_workers: processes of this process that augment image by image, where a recipe asks for that; None
    takes the cores there are.
    """
    device = accelerator.device
    even = bool(recipe.mixup_alpha or recipe.cutmix_alpha)

    def shares() -> Iterator[tuple[int, Share]]:
        for epoch in range(first_epoch, recipe.num_epochs):
            for batch in torch.split(epoch_views(len(train), epoch, seed, recipe.repeats), batch_size):
                yield epoch, share_of(batch, accelerator.process_index, accelerator.num_processes, even)

    if recipe.crops_padded(encoder.crop.size_px) and recipe.rand_augment is None:
        prepared = prepare_images(train, encoder.crop, device)
        for epoch, share in shares():
            images = prepared.take(share.views // recipe.repeats, device)
            yield share, padded_crops(images, share.views, epoch, seed, recipe)
        return
    if num_workers is None:
        num_workers = min(16, max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    loader = DataLoader(
        ChainedImages(train, encoder, recipe, seed),
        batch_sampler=_Places(shares),
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # the encoded images are not copied
        pin_memory=device.type == "cuda",
    )
    for (_, share), images in zip(shares(), loader, strict=True):
        yield share, images.to(device, non_blocking=True)


class _Places:
    """What a DataLoader asks its dataset for: (epoch, view) of every image of every batch."""

    def __init__(self, shares: Callable[[], Iterator[tuple[int, Share]]]) -> None:
        self.shares = shares

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, share in self.shares():
            yield [(epoch, view) for view in share.views.tolist()]


def share_of(batch: Tensor, rank: int, world_size: int, even: bool) -> Share:
    """Every world-size-th view of a batch; all processes get as many, an even number if images mix in pairs.

    Padding repeats the batch's first view and weighs nothing.
    """
    size = math.ceil(len(batch) / world_size)
    size += size % 2 if even else 0
    own = batch[rank::world_size]
    padding = batch[:1].expand(size - len(own))
    weights = torch.cat([torch.ones(len(own)), torch.zeros(len(padding))])
    return Share(torch.cat([own, padding]), weights)
