"""Pixels, boxes and masks of a training image stay together, whatever is done to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_coco import HEIGHT, WIDTH, Content, brick, disc, write_split

from pretrain.transfer.detection.coco import CocoSet, read_coco
from pretrain.transfer.detection.config import AugmentConfig, EvaluateConfig
from pretrain.transfer.detection.geometry import Placement, place_for_testing, place_for_training
from pretrain.transfer.detection.samples import DetectionSamples, image_for_testing

KINDS = {
    "multi_scale": AugmentConfig(shortest_px=(48, 96), longest_px=140, crop_ratio=0.5),
    "jitter": AugmentConfig(kind="jitter", size_px=96, scale=(0.5, 2.0)),
    "crop": AugmentConfig(kind="crop", size_px=64, scale=(0.7, 1.5)),
}


@pytest.fixture
def found(tmp_path: Path) -> CocoSet:
    write_split(tmp_path, "train", 6)
    return read_coco(tmp_path, "train")


def test_a_part_is_resized_and_mirrored_as_worked_by_hand() -> None:
    placement = Placement(10, 20, 50, 40, width=80, height=40, flip=True)
    boxes = placement.boxes(np.array([[20.0, 25.0, 30.0, 35.0], [0.0, 0.0, 12.0, 22.0], [60, 50, 70, 60]]))
    # twice as large from (10, 20): x 20..40 becomes 40..60 from the right; the second is cut at the corner,
    # the third is not in the part
    assert boxes.tolist() == [[40, 10, 60, 30], [76, 0, 80, 4], [0, 40, 0, 40]]
    image = np.zeros((60, 60), np.uint8)
    image[25:35, 20:30] = 200
    moved = placement.pixels(image)
    assert moved.shape == (40, 80)
    assert moved[20, 50] == 200
    assert moved[20, [36, 63]].tolist() == [0, 0]


def test_testing_fits_the_shorter_side_unless_the_longer_would_be_too_long() -> None:
    coco = EvaluateConfig()
    assert (place_for_testing(480, 640, coco).height, place_for_testing(480, 640, coco).width) == (800, 1067)
    wide = place_for_testing(200, 1000, coco)
    assert (wide.height, wide.width) == (267, 1333)
    as_it_is = EvaluateConfig(shortest_px=None, longest_px=512)
    assert place_for_testing(256, 320, as_it_is).width == 320
    assert place_for_testing(1024, 1024, as_it_is).width == 512
    boxes = np.array([[3.0, 5.0, 100.0, 90.0]])
    assert np.allclose(wide.boxes_back(wide.boxes(boxes)), boxes)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_boxes_lie_where_the_pixels_of_their_objects_are(kind: str, found: CocoSet) -> None:
    """A disc is bright in red, a brick in blue: what the mask covers must be so in the augmented image."""
    samples = DetectionSamples(found, KINDS[kind], masks=True, skip_empty=True)
    seen = {1: 0, 2: 0}
    for draw in range(60):
        sample = samples.load(draw % 6, np.random.default_rng(draw))
        assert sample.masks is not None
        assert sample.masks.shape[1:] == sample.image.shape[1:]
        for box, label, mask in zip(sample.boxes, sample.labels, sample.masks, strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [float(side) for side in around]
            if mask.sum() > 60:
                channel = 0 if label == 1 else 2
                inside = sample.image[channel][mask > 0].float().mean()
                outside = sample.image[channel][sample.masks.sum(dim=0) == 0].float().mean()
                assert inside > outside + 100, (kind, draw)
                seen[int(label)] += 1
    assert min(seen.values()) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_without_masks_agree_with_the_boxes_of_masks(kind: str, found: CocoSet) -> None:
    of_masks = DetectionSamples(found, KINDS[kind], masks=True, skip_empty=True)
    of_boxes = DetectionSamples(found, KINDS[kind], masks=False, skip_empty=True)
    compared = 0
    for draw in range(20):
        one, other = (s.load(draw % 6, np.random.default_rng(draw)) for s in (of_masks, of_boxes))
        assert torch.equal(one.image, other.image)
        if one.labels.tolist() == other.labels.tolist():
            bricks = one.labels == 2  # a disc that is cut has a smaller box than its cut box
            torch.testing.assert_close(one.boxes[bricks], other.boxes[bricks], atol=1.01, rtol=0)
            compared += int(bricks.sum())
    assert compared > 8


def test_the_sizes_are_those_of_the_recipe() -> None:
    rng = np.random.default_rng(0)
    coco = AugmentConfig(crop_ratio=0.0)
    sizes = {(p.height, p.width) for p in (place_for_training(rng, 480, 640, coco) for _ in range(300))}
    assert {height for height, _ in sizes} == set(range(480, 801, 32))
    assert all(abs(width / height - 640 / 480) < 0.01 for height, width in sizes)
    cropped = [place_for_training(rng, 480, 640, AugmentConfig(crop_ratio=1.0)) for _ in range(300)]
    for placement in cropped:
        scale_x, scale_y = placement.scales
        assert scale_x == pytest.approx(scale_y, rel=0.01)
        assert 0 <= placement.left < placement.right <= 640
        assert 0 <= placement.top < placement.bottom <= 480
    assert min(placement.right - placement.left for placement in cropped) < 400
    jittered = [place_for_training(rng, 480, 640, KINDS["jitter"]) for _ in range(300)]
    assert max(placement.width for placement in jittered) == 96
    assert min(placement.width for placement in jittered) < 56  # 0.5 of the square


def test_half_of_the_images_are_mirrored() -> None:
    rng = np.random.default_rng(1)
    flips = sum(place_for_training(rng, 64, 64, AugmentConfig()).flip for _ in range(1000))
    assert 440 < flips < 560


def test_a_sample_follows_from_its_generator_alone(found: CocoSet) -> None:
    samples = DetectionSamples(found, KINDS["crop"], masks=True, skip_empty=True)
    one, same, other = (samples.load(2, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.image, same.image)
    assert torch.equal(one.boxes, same.boxes)
    assert one.image.shape != other.image.shape or not torch.equal(one.image, other.image)


def test_crowds_are_not_learnt_and_empty_images_only_on_request(tmp_path: Path) -> None:
    def change(content: Content) -> None:
        content["annotations"][0]["iscrowd"] = 1  # image 0 keeps its brick
        content["annotations"][2]["iscrowd"] = content["annotations"][3]["iscrowd"] = 1  # 1 has crowds only
        del content["annotations"][4:6]  # 2 has nothing

    write_split(tmp_path, "train", 4, change=change)
    found = read_coco(tmp_path, "train")
    kept = DetectionSamples(found, KINDS["jitter"], masks=True, skip_empty=True)
    assert kept.kept.tolist() == [0, 3]
    for seed in range(8):
        assert set(kept.load(0, np.random.default_rng(seed)).labels.tolist()) <= {2}
    every = DetectionSamples(found, KINDS["jitter"], masks=True, skip_empty=False)
    assert len(every) == 4
    empty = every.load(2, np.random.default_rng(0))
    assert empty.boxes.shape == (0, 4)
    assert empty.masks is not None
    assert empty.masks.shape == (0, *empty.image.shape[1:])


def test_a_crop_without_an_object_is_drawn_again(tmp_path: Path) -> None:
    """A crop of 24 px hits one of the two small objects about every third time."""
    write_split(tmp_path, "train", 1)
    found = read_coco(tmp_path, "train")
    config = AugmentConfig(kind="crop", size_px=24, scale=(1.0, 1.0))
    samples = DetectionSamples(found, config, masks=False, skip_empty=True)
    num_empty = sum(not len(samples.load(0, np.random.default_rng(seed)).labels) for seed in range(100))
    assert num_empty <= 2


def test_an_image_is_tested_whole_and_at_its_size(found: CocoSet) -> None:
    image, placement = image_for_testing(found, 1, EvaluateConfig(shortest_px=None))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), found.image(1))
    assert placement.scales == (1.0, 1.0)
    assert image.shape == (3, HEIGHT, WIDTH)


def test_a_mask_is_kept_where_half_a_pixel_is_inside() -> None:
    mask = brick(10, 10, (21, 21))
    halved = Placement(0, 0, WIDTH, HEIGHT, WIDTH // 2, HEIGHT // 2).mask(mask)
    assert halved.sum() in range(10 * 10, 11 * 11 + 1)
    doubled = Placement(0, 0, WIDTH, HEIGHT, WIDTH * 2, HEIGHT * 2).mask(disc(30, 30, 8))
    assert doubled.sum() == pytest.approx(4 * disc(30, 30, 8).sum(), rel=0.03)
