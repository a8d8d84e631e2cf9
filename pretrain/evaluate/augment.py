"""What happens to training images before the network sees them: crops, flips, RandAugment, erasing, mixing.

All randomness follows from (seed, epoch, image or step), so nothing depends on workers or on where a run was
resumed. Padded crops with flips are tensor operations on the device; what needs one image at a time is timm's
own chain on PIL images, run by worker processes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import RandomCrop

from pretrain import randomness
from pretrain.evaluate.encoder import Encoder
from pretrain.evaluate.image_set import ImageSet, prepare_images
from pretrain.evaluate.recipes import FinetuneRecipe
from pretrain.evaluate.shards import decode_whole

ORDER_STREAM, CROP_STREAM, CHAIN_STREAM, STEP_STREAM = range(4)  # of the counter-based generator


def seeded(seed: int, epoch: int, number: int, stream: int) -> contextlib.AbstractContextManager[None]:
    """Seed Python's, NumPy's and torch's generators, which timm draws from; the CPU's come back as before."""
    return keyed(int(randomness.bits(seed, epoch, number, stream, 1)))


@contextlib.contextmanager
def keyed(key: int) -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    # what torch.manual_seed does, without the look at the stack that takes it longer than all the rest
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor, pad_px: int) -> Tensor:
    """Cut a window of the same size out of the images with a black border, and mirror some left to right.

    images: uint8 (B, 3, S, S); shifts: int64 (B, 2), rows and columns in 0..2 * pad_px; flips: bool (B,).
    """
    size = images.shape[-1]
    padded = F.pad(images, [pad_px] * 4)
    along = torch.arange(size, device=images.device)
    rows = shifts[:, :1] + along  # (B, S)
    columns = shifts[:, 1:] + torch.where(flips[:, None], along.flip(0), along)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def padded_crops(images: Tensor, views: Tensor, epoch: int, seed: int, recipe: FinetuneRecipe) -> Tensor:
    """A random crop and flip of each image, drawn from its view number: uint8 (B, 3, S, S) -> the same.

    views: int64 (B,) on any device.
    """
    drawn = randomness.uniform(seed, epoch, views.to(images.device), CROP_STREAM, 3)  # (B, 3)
    shifts = (drawn[:, :2] * (2 * recipe.pad_px + 1)).long()
    return crop_and_flip(images, shifts, drawn[:, 2] < recipe.flip_ratio, recipe.pad_px)


def epoch_views(num_images: int, epoch: int, seed: int, repeats: int) -> Tensor:
    """The order of an epoch: int64 (num_images,) of `image * repeats + repeat`.

    repeats above 1: every image that comes comes so often in a row, and others not at all (repeated
    augmentation, Hoffer et al., 2019, arXiv:1901.09335), so the epoch keeps its length.
    """
    order = randomness.permutation(seed, epoch, 0, ORDER_STREAM, num_images)
    return (order[:, None] * repeats + torch.arange(repeats)).flatten()[:num_images]


class ChainedImages(torch.utils.data.Dataset[Tensor]):
    """Images through timm's chain; asked by (epoch, view), so that a worker needs no state."""

    def __init__(self, images: ImageSet, encoder: Encoder, recipe: FinetuneRecipe, seed: int) -> None:
        self.images = images
        self.repeats = recipe.repeats
        self.seed = seed
        self.is_padded = recipe.crops_padded(encoder.crop.size_px)
        # small images are decoded once, and not copied for the workers, which are forks of this process
        self.prepared = prepare_images(images, encoder.crop, torch.device("cpu")) if self.is_padded else None
        self._keys: tuple[int, Tensor] | None = None
        size_px = encoder.crop.size_px
        chain = transforms_imagenet_train(
            size_px,
            scale=recipe.crop_scale,
            hflip=recipe.flip_ratio,
            color_jitter=None,
            auto_augment=recipe.rand_augment,
            interpolation=encoder.crop.interpolation,
            mean=encoder.mean,
            use_prefetcher=True,  # ends with uint8 pixels: the device does the rest
        )
        if self.is_padded:
            chain.transforms[0] = RandomCrop(size_px, padding=recipe.pad_px)
        for step in chain.transforms:
            for operation in getattr(step, "ops", ()):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = posterize
        self.chain = chain

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        """uint8 (3, S, S)"""
        epoch, view = place
        if self.prepared is not None:
            image = self.prepared.take(torch.tensor([view // self.repeats]), torch.device("cpu"))[0]
            pixels = image.permute(1, 2, 0).numpy()
        else:
            pixels = decode_whole(self.images.sample(view // self.repeats))
        with keyed(int(self._keys_of(epoch)[view])):
            return torch.from_numpy(np.asarray(self.chain(Image.fromarray(pixels))))

    def _keys_of(self, epoch: int) -> Tensor:
        """The seed of every view of an epoch: one draw of all takes little longer than one of one."""
        if self._keys is None or self._keys[0] != epoch:
            views = torch.arange(len(self.images) * self.repeats)
            self._keys = epoch, randomness.bits(self.seed, epoch, views, CHAIN_STREAM, 1)[:, 0]
        return self._keys[1]


def posterize(image: Image.Image, num_bits: int, **_: Any) -> Image.Image:
    """Keep the upper bits of each colour; no bits give black (timm's own then fails with Pillow 13)."""
    return ImageOps.posterize(image, min(num_bits, 8)) if num_bits else Image.new("RGB", image.size)


@dataclass(frozen=True)
class Augmenter:
    """The part of the augmentation that works on whole batches, on the device."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    erase: RandomErasing | None
    mix: Mixup | None
    label_smoothing_ratio: float

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, S, S), int64 (B,) -> normalised float32, soft targets (B, K); to mix, B is even."""
        pixels = normalised(images, self.mean, self.std)
        if self.erase is not None:
            pixels = self.erase(pixels)
        if self.mix is not None:
            pixels, soft = self.mix(pixels, targets)
            return pixels, soft
        off = self.label_smoothing_ratio / self.num_classes
        soft = torch.full((len(targets), self.num_classes), off, device=targets.device)
        soft[torch.arange(len(targets), device=targets.device), targets] += 1 - self.label_smoothing_ratio
        return pixels, soft


def make_augmenter(
    encoder: Encoder, recipe: FinetuneRecipe, num_classes: int, device: torch.device
) -> Augmenter:
    erase = RandomErasing(recipe.erase_ratio, mode="pixel", device=device) if recipe.erase_ratio else None
    mix = None
    if recipe.mixup_alpha or recipe.cutmix_alpha:
        mix = Mixup(
            recipe.mixup_alpha,
            recipe.cutmix_alpha,
            label_smoothing=recipe.label_smoothing_ratio,
            num_classes=num_classes,
        )
    return Augmenter(encoder.mean, encoder.std, num_classes, erase, mix, recipe.label_smoothing_ratio)


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, 3, S, S) -> float32"""
    centre, scale = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - centre) / scale
