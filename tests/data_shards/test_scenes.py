"""The pictures of the embedded sample: what they hold, and that only the figure tells the class."""

from __future__ import annotations

import numpy as np
import pytest
from embedded_sample import Recipe, draw_samples, run_lengths
from figures import CLASSES
from numpy.typing import NDArray
from scenes import Scene, draw_scene


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[tuple[int, Scene]]]:
    """Labels and scenes of a small sample, by split."""
    recipe = Recipe(images=300, test_images=150)
    return {
        split: [(sample.label, sample.scene) for sample in draw_samples(recipe, split)]
        for split in ("train", "test")
    }


def test_a_picture_follows_from_its_seed_alone() -> None:
    first, again, other = (draw_scene(np.random.default_rng([7, seed]), 3, 64) for seed in (1, 1, 2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)


def test_labels_are_balanced_in_every_hundred(drawn: dict[str, list[tuple[int, Scene]]]) -> None:
    labels = [label for label, _ in drawn["train"]]
    for start in range(0, len(labels), 100):
        assert np.bincount(labels[start : start + 100]).tolist() == [10] * len(CLASSES)


def test_the_first_figure_is_the_largest_and_gives_the_class(
    drawn: dict[str, list[tuple[int, Scene]]],
) -> None:
    for label, scene in drawn["train"]:
        assert scene.labels[0] == label
        areas = np.bincount(scene.mask.ravel(), minlength=len(scene.labels) + 1)[1:]
        assert areas.argmax() == 0


def test_there_are_one_to_three_figures(drawn: dict[str, list[tuple[int, Scene]]]) -> None:
    assert {len(scene.labels) for _, scene in drawn["train"]} == {1, 2, 3}


def test_boxes_lie_in_the_picture_and_touch_their_masks_on_every_side(
    drawn: dict[str, list[tuple[int, Scene]]],
) -> None:
    for _, scene in drawn["train"]:
        assert scene.mask.max() == len(scene.labels)
        for instance, (left, top, width, height) in enumerate(scene.boxes(), start=1):
            inside = scene.mask == instance
            assert inside.any()
            assert 0 <= left < left + width <= 64
            assert 0 <= top < top + height <= 64
            cut = inside[top : top + height, left : left + width]
            assert cut.sum() == inside.sum()
            assert cut[0].any()
            assert cut[-1].any()
            assert cut[:, 0].any()
            assert cut[:, -1].any()


def test_no_picture_is_flat_and_no_two_are_alike(drawn: dict[str, list[tuple[int, Scene]]]) -> None:
    images = [scene.image for split in drawn.values() for _, scene in split]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in images)
    assert min(image.std() for image in images) > 10
    assert len({image.tobytes() for image in images}) == len(images)


def test_pictures_have_an_upper_and_a_lower_side(drawn: dict[str, list[tuple[int, Scene]]]) -> None:
    images = np.stack([scene.image for _, scene in drawn["train"]]).astype(np.float32)
    background = np.stack([scene.mask == 0 for _, scene in drawn["train"]])[..., None]
    rough = np.abs(np.diff(images, axis=2)) * background[:, :, 1:]
    upper, lower = rough[:, :16].mean(axis=(1, 2, 3)), rough[:, 48:].mean(axis=(1, 2, 3))
    wrong = (upper > lower).mean()  # no single measurement tells the direction, each leans to one side
    assert 0.02 < wrong < 0.4


def test_figures_scale_with_the_picture() -> None:
    small, large = (draw_scene(np.random.default_rng(5), 0, size_px) for size_px in (32, 96))
    assert small.image.shape == (32, 32, 3)
    assert large.mask.shape == (96, 96)
    assert (small.mask == 1).mean() == pytest.approx((large.mask == 1).mean(), abs=0.02)


def test_colour_and_corners_hint_at_the_class_but_do_not_tell_it(
    drawn: dict[str, list[tuple[int, Scene]]],
) -> None:
    train, test = (_place_features([scene for _, scene in drawn[split]]) for split in ("train", "test"))
    labels = {split: np.array([label for label, _ in pairs]) for split, pairs in drawn.items()}
    targets = np.eye(len(CLASSES))[labels["train"]]
    weight = np.linalg.lstsq(train, targets, rcond=None)[0]
    guess = (test @ weight).argmax(axis=1)
    assert 0.12 < (guess == labels["test"]).mean() < 0.4  # chance is 0.1; figures have usual places


def _place_features(scenes: list[Scene]) -> NDArray[np.float64]:
    """(B, 16): a constant, the mean colour, and the colours of the four corners."""
    images = np.stack([scene.image for scene in scenes]) / 255
    corners = [images[:, row, column] for row in (0, -1) for column in (0, -1)]
    return np.concatenate([np.ones((len(images), 1)), images.mean(axis=(1, 2)), *corners], axis=1)


def test_run_lengths_read_a_mask_column_by_column() -> None:
    mask = np.array([[0, 1, 1], [1, 1, 0]], dtype=bool)  # column by column: 0 1 | 1 1 | 1 0
    assert run_lengths(mask) == [1, 4, 1]
    assert run_lengths(~mask) == [0, 1, 4, 1]
