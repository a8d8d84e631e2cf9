"""Augmentation follows from seed, epoch and image alone, and shares of a batch are exact."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_shards import make_shards
from torch import Tensor, nn
from torchvision.transforms.functional import crop, hflip, pad

from pretrain.evaluate.augment import (
    Augmenter,
    ChainedImages,
    crop_and_flip,
    epoch_views,
    make_augmenter,
    padded_crops,
    posterize,
    seeded,
)
from pretrain.evaluate.batches import share_of
from pretrain.evaluate.encoder import CentreCrop, Encoder
from pretrain.evaluate.image_set import ImageSet, open_images
from pretrain.evaluate.recipes import recipe_with
from pretrain.evaluate.shards import find_split

GREY = (0.5, 0.5, 0.5)
IMAGES = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder_of(size_px: int) -> Encoder:
    crop = CentreCrop(size_px, size_px, "bilinear")
    return Encoder("tiny", nn.Identity(), "pixels", crop, GREY, GREY, 1, {})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder, [6])
    return open_images(find_split(folder, "train"))


def test_crop_and_flip_is_what_torchvision_does_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    shifts = torch.randint(0, 9, (6, 2), generator=generator)
    flips = torch.tensor([True, False, True, False, True, False])
    found = crop_and_flip(IMAGES, shifts, flips, pad_px=4)
    for image, (top, left), is_flipped, one in zip(IMAGES, shifts.tolist(), flips, found, strict=True):
        expected = crop(pad(image, [4]), top, left, 8, 8)
        assert torch.equal(one, hflip(expected) if is_flipped else expected)


def test_padded_crops_depend_on_the_view_and_the_epoch_not_on_the_batch() -> None:
    recipe = recipe_with("relvit")
    views = torch.arange(6)
    whole = padded_crops(IMAGES, views, 3, 7, recipe)
    parts = [padded_crops(IMAGES[part], views[part], 3, 7, recipe) for part in (slice(4, 6), slice(0, 4))]
    assert torch.equal(torch.cat(parts[::-1]), whole)
    assert not torch.equal(padded_crops(IMAGES, views, 4, 7, recipe), whole)
    assert not torch.equal(padded_crops(IMAGES, views, 3, 8, recipe), whole)


def test_padded_crops_reach_every_shift_and_flip_half_of_the_images() -> None:
    recipe = recipe_with("relvit", ["pad_px=1"])
    marked = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    marked[0, 0, 1, 0] = 1
    found = padded_crops(marked.expand(3600, 1, 3, 3), torch.arange(3600), 0, 0, recipe)
    counts = found.float().sum(dim=(0, 1))
    # the mark is at row 1, column 0 of the image: it ends in column 0 or 1 (or out), mirrored in 2 or 1
    torch.testing.assert_close(counts[:, 1], torch.full((3,), 400.0), rtol=0.2, atol=0)
    torch.testing.assert_close(counts[:, 0], torch.full((3,), 200.0), rtol=0.3, atol=0)
    torch.testing.assert_close(counts[:, 2], torch.full((3,), 200.0), rtol=0.3, atol=0)


def test_an_epoch_takes_every_image_once_in_an_order_of_its_own() -> None:
    first, second = (epoch_views(50, epoch, 0, 1) for epoch in (0, 1))
    assert first.sort().values.tolist() == list(range(50))
    assert not torch.equal(first, second)


def test_repeated_augmentation_keeps_the_length_and_repeats_a_third_of_the_images() -> None:
    views = epoch_views(30, 0, 0, 3)
    assert len(views.unique()) == 30
    shown, counts = (views // 3).unique(return_counts=True)
    assert len(shown) == 10
    assert set(counts.tolist()) == {3}


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("count", "world_size"), [(8, 2), (7, 2), (1, 2), (5, 3)])
def test_the_shares_of_a_batch_hold_every_view_once_and_are_of_one_size(
    count: int, world_size: int, even: bool
) -> None:
    batch = torch.arange(100, 100 + count)
    shares = [share_of(batch, rank, world_size, even) for rank in range(world_size)]
    counted = [v for share in shares for v, w in zip(share.views.tolist(), share.weights, strict=True) if w]
    assert sorted(counted) == batch.tolist()
    (size,) = {len(share.views) for share in shares}
    assert not (even and size % 2)


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_a_chained_image_is_the_same_whenever_it_is_asked_for(crop: str, images: ImageSet) -> None:
    recipe = recipe_with("deit", [f"crop={crop}"])
    dataset = ChainedImages(images, encoder_of(32), recipe, seed=5)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index, union-attr]
    first = [dataset[(2, view)] for view in range(6)]
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]  # type: ignore[index, union-attr]
    assert torch.equal(torch.get_rng_state(), state[2])
    random.seed(99)
    for view in (5, 0, 3):
        assert torch.equal(dataset[(2, view)], first[view])
    assert first[0].shape == (3, 32, 32)
    assert first[0].dtype == torch.uint8
    assert not torch.equal(dataset[(3, 0)], first[0])


def test_without_chance_a_padded_chain_shows_a_window_of_the_image(images: ImageSet) -> None:
    recipe = recipe_with("relvit", ["crop=padded", "flip_ratio=0"])
    whole = pad(images.prepare([0], CentreCrop(32, 32, "bilinear"))[0], [4])
    found = ChainedImages(images, encoder_of(32), recipe, seed=0)[(0, 0)]
    windows = [whole[:, t : t + 32, left : left + 32] for t in range(9) for left in range(9)]
    assert sum(torch.equal(found, window) for window in windows) == 1


def test_every_strength_of_rand_augment_works(images: ImageSet) -> None:
    """timm's magnitude 10 asks for pictures of 0 bits, which Pillow refuses."""
    recipe = recipe_with("deit", ["rand_augment=rand-m10-mstd0-n15-inc1"])
    dataset = ChainedImages(images, encoder_of(16), recipe, seed=0)
    for epoch in range(8):
        assert dataset[(epoch, 0)].shape == (3, 16, 16)
    picture = Image.fromarray(np.full((2, 2, 3), 0b10110111, np.uint8))
    assert np.asarray(posterize(picture, 0)).max() == 0
    assert np.asarray(posterize(picture, 2)).max() == 0b10000000
    assert np.asarray(posterize(picture, 8)).max() == 0b10110111


def augmenter_of(*overrides: str) -> Augmenter:
    recipe = recipe_with("deit", overrides)
    return make_augmenter(encoder_of(8), recipe, 5, torch.device("cpu"))


def test_without_mixing_the_targets_are_those_of_smoothed_cross_entropy() -> None:
    targets = torch.tensor([0, 4, 2, 2, 1, 3])
    pixels, soft = augmenter_of("mixup_alpha=0", "cutmix_alpha=0", "erase_ratio=0")(IMAGES, targets)
    torch.testing.assert_close(pixels, (IMAGES / 255 - 0.5) / 0.5)
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, soft), expected)


def mixed(seed: int) -> tuple[Tensor, Tensor]:
    with seeded(0, seed, 0, 0):
        return augmenter_of("erase_ratio=0", "label_smoothing_ratio=0")(
            IMAGES, torch.tensor([0, 1, 2, 3, 4, 0])
        )


def test_mixing_gives_each_image_a_share_of_its_mirror_in_the_batch() -> None:
    plain = (IMAGES / 255 - 0.5) / 0.5
    kinds = set()
    for seed in range(8):
        pixels, soft = mixed(seed)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
        own = float(soft[1, 1])  # of image 1; image 4 has the rest
        assert float(soft[1, 4]) == pytest.approx(1 - own, abs=1e-6)
        if torch.allclose(pixels, own * plain + (1 - own) * plain.flip(0), atol=1e-5):
            kinds.add("mixup")
        else:
            is_own = (pixels == plain).all(dim=1)[1].float().mean()  # a box of the other image
            assert float(is_own) == pytest.approx(own, abs=1e-5)
            kinds.add("cutmix")
    assert kinds == {"mixup", "cutmix"}
    assert torch.equal(mixed(0)[0], mixed(0)[0])


def test_a_quarter_of_the_images_is_erased_in_part() -> None:
    augmenter = augmenter_of("mixup_alpha=0", "cutmix_alpha=0")
    images = torch.full((800, 3, 8, 8), 51, dtype=torch.uint8)
    with seeded(0, 0, 0, 0):
        pixels, _ = augmenter(images, torch.zeros(800, dtype=torch.int64))
    erased = (pixels != (51 / 255 - 0.5) / 0.5).flatten(1)
    assert 0.2 < erased.any(dim=1).float().mean() < 0.3
    assert not erased.all(dim=1).any()


def test_images_are_read_alike_from_memory_and_on_request(tmp_path: Path) -> None:
    make_shards(tmp_path, [4, 3])
    split = find_split(tmp_path, "train")
    kept, read = open_images(split), open_images(split, in_memory_bytes=0)
    assert read.kept is None
    assert kept.labels.tolist() == read.labels.tolist() == [0, 1, 2, 3, 4, 5, 6]
    crop = CentreCrop(16, 16)
    order = [6, 0, 3, 4]
    assert torch.equal(kept.prepare(order, crop), read.prepare(order, crop))
