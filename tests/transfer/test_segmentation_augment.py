"""Images and labels are scaled, cut and mirrored as one, and colours change within their bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_scenes import COLOURS, scene, write_folder

from pretrain.transfer.segmentation import augment
from pretrain.transfer.segmentation.augment import (
    augmented,
    choose_crop,
    cut_nearest,
    distort_colours,
    fitted_size,
    resize_image,
)
from pretrain.transfer.segmentation.folders import find_data
from pretrain.transfer.segmentation.recipe import AugmentRecipe, DataRecipe, SegmentationRecipe
from pretrain.transfer.segmentation.samples import Samples, normalised
from pretrain.transfer.segmentation.scenes import open_scenes
from pretrain.transfer.segmentation.scores import IGNORED

GEOMETRY = AugmentRecipe(photometric=False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.0, 1.9])
def test_a_part_resized_is_that_part_of_the_whole_resized(factor: float) -> None:
    image, classes = scene(0, 40, 60)
    size = round(40 * factor), round(60 * factor)
    rows, columns = slice(size[0] // 4, size[0] // 4 + 9), slice(size[1] // 3, size[1] // 3 + 11)
    down, right = 40 / size[0], 60 / size[1]
    box = columns.start * right, rows.start * down, columns.stop * right, rows.stop * down
    part, whole = resize_image(image, (9, 11), box), resize_image(image, size)
    assert np.abs(part.astype(int) - whole[rows, columns].astype(int)).max() <= 1  # of rounding
    nearest = np.array(Image.fromarray(classes).resize(size[::-1], Image.Resampling.NEAREST))
    assert np.array_equal(cut_nearest(classes, size, rows, columns), nearest[rows, columns])


@pytest.mark.parametrize("seed", range(20))
def test_labels_stay_with_their_pixels(seed: int) -> None:
    """Nearly every pixel of a class still has the colour of that class."""
    image, classes = scene(seed, 64, 96)
    image, classes = augmented(image, classes, GEOMETRY, 32, None, rng(seed))
    assert image.shape == (*classes.shape, 3)
    assert max(classes.shape) <= 32
    there = classes != IGNORED
    distances = np.abs(image[there][:, None].astype(int) - COLOURS.astype(int)).sum(axis=2)
    assert (distances.argmin(axis=1) == classes[there]).mean() > 0.9


def test_scales_are_drawn_from_their_range_and_small_images_are_not_stretched_to_the_crop() -> None:
    image, classes = scene(1, 40, 60)
    sizes = np.array(
        [augmented(image, classes, GEOMETRY, 1000, None, rng(seed))[1].shape for seed in range(60)]
    )
    factors = sizes[:, 0] / 40
    assert 0.5 <= factors.min() < 0.65
    assert 1.8 < factors.max() <= 2.0
    assert factors.mean() == pytest.approx(1.25, abs=0.2)
    np.testing.assert_allclose(sizes[:, 1] / 60, factors, atol=0.02)


def test_half_of_the_images_are_mirrored() -> None:
    image, classes = scene(2, 20, 30)
    recipe = replace_recipe(scale=(1.0, 1.0))
    mirrored = 0
    for seed in range(200):
        found, labels = augmented(image, classes, recipe, 30, None, rng(seed))
        is_mirrored = not np.array_equal(found, image)
        assert np.array_equal(found, image[:, ::-1] if is_mirrored else image)
        assert np.array_equal(labels, classes[:, ::-1] if is_mirrored else classes)
        mirrored += is_mirrored
    assert 75 < mirrored < 125


def replace_recipe(**changes: object) -> AugmentRecipe:
    return GEOMETRY.model_copy(update=changes)


def test_a_crop_that_one_class_fills_is_drawn_again() -> None:
    """Two classes in halves: crops of 10 across 100 hold both only near the border."""
    classes = np.zeros((10, 100), dtype=np.uint8)
    classes[:, 50:] = 1
    classes[0] = IGNORED  # counts for nothing

    def num_mixed(cat_max_ratio: float) -> int:
        crops = (choose_crop(classes, (10, 100), 10, cat_max_ratio, rng(seed)) for seed in range(300))
        shares = [(classes[1:, columns] == 1).mean() for _, columns in crops]
        return sum(0.25 < share < 0.75 for share in shares)

    plain, drawn_again = num_mixed(1.0), num_mixed(0.75)
    assert plain < 0.15 * 300  # 5 of 91 places
    assert drawn_again > 0.35 * 300  # 1 - (86 / 91) ** 10 of them


def test_a_crop_of_one_class_is_taken_after_ten_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    plain = cut_nearest
    monkeypatch.setattr(augment, "cut_nearest", lambda *a: tries.append(0) or plain(*a))
    rows, columns = choose_crop(np.zeros((20, 20), np.uint8), (20, 20), 8, 0.75, rng())
    assert len(tries) == 10
    assert (rows.stop - rows.start, columns.stop - columns.start) == (8, 8)


def test_colours_change_within_their_bounds_and_each_kind_half_of_the_time() -> None:
    grey = np.full((2, 2, 3), 100, dtype=np.uint8)
    values = np.array([distort_colours(grey, rng(seed))[0, 0].astype(int) for seed in range(600)])
    assert (values.max(axis=1) - values.min(axis=1) <= 1).all()  # saturation and hue leave grey grey
    bright = values[:, 0]
    # neither brightness nor contrast: a quarter; the darkest and brightest by both
    assert np.isclose((np.abs(bright - 100) <= 1).mean(), 0.25, atol=0.07)
    assert bright.min() >= (100 - 32) * 0.5 - 1
    assert bright.max() <= (100 + 32) * 1.5 + 1
    assert bright.min() < 50
    assert bright.max() > 165


def test_hue_turns_and_saturation_stretches_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "BRIGHTNESS", 0.0)
    monkeypatch.setattr(augment, "CONTRAST", (1.0, 1.0))  # so that nothing is clipped
    red = np.full((1, 1, 3), (200, 100, 100), dtype=np.uint8)
    found = np.array([distort_colours(red, rng(seed))[0, 0] for seed in range(600)])
    hsv = np.array(Image.fromarray(found[None]).convert("HSV"))[0].astype(int)
    turned = ((hsv[:, 0] + 128) % 256 - 128) * 360 / 256
    assert np.abs(turned).max() <= 36 + 3
    assert np.isclose((np.abs(turned) > 3).mean(), 0.5 * 33 / 36, atol=0.07)
    assert turned.min() < -25
    assert turned.max() > 25
    assert hsv[:, 1].max() > 1.3 * 127
    assert hsv[:, 1].min() < 0.7 * 127


def test_images_are_fitted_with_their_shape_kept() -> None:
    assert fitted_size((1024, 2048), (2049, 1025)) == (1025, 2049)
    assert fitted_size((360, 480), (240, 180)) == (180, 240)
    assert fitted_size((480, 360), (240, 180)) == (240, 180)
    assert fitted_size((100, 400), (200, 200)) == (50, 200)
    assert fitted_size((5, 7), None) == (5, 7)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    labels, splits = find_data(write_folder(tmp_path_factory.mktemp("data")), DataRecipe())
    return Samples(open_scenes(splits["train"], labels), SegmentationRecipe(crop_px=56))


def test_a_sample_follows_from_its_generator_alone(samples: Samples) -> None:
    one, again, other = (samples.load(1, rng(seed)) for seed in (5, 5, 6))
    for name, value in one.items():
        assert torch.equal(value, again[name])
    assert not torch.equal(one["pixels"], other["pixels"])


def test_what_an_image_does_not_fill_has_the_mean_colour_and_no_label(samples: Samples) -> None:
    small = replace(
        samples, recipe=samples.recipe.model_copy(update={"augment": replace_recipe(scale=(1.0, 1.0))})
    )
    batch = small.collate([small.load(0, rng(0)), small.load(1, rng(1))])
    assert batch["pixels"].shape == (2, 3, 56, 56)
    assert batch["size"].tolist() == [[32, 48], [32, 48]]
    assert (batch["classes"][:, 32:] == IGNORED).all()
    assert (batch["classes"][:, :, 48:] == IGNORED).all()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    pixels = normalised(batch["pixels"], batch["size"], mean, std)
    assert not pixels[:, :, 32:].any()
    assert not pixels[:, :, :, 48:].any()
    expected = (batch["pixels"][1, 2, 3, 4].item() / 255 - 0.6) / 0.25
    assert pixels[1, 2, 3, 4].item() == pytest.approx(expected, abs=1e-6)


def test_ranges_that_stand_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match="reads \\[least, most\\]"):
        AugmentRecipe(scale=(2.0, 0.5))
    with pytest.raises(ValueError, match="longer side"):
        DataRecipe(fit_px=(100, 200))
