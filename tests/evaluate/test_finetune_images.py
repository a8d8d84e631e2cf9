"""Shares of the labels are balanced, and images come in any order, held or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_shards import make_shards

from pretrain.errors import DataError, UserError
from pretrain.evaluate.encoder import CentreCrop
from pretrain.evaluate.image_set import balanced_rows, colours, open_images, prepare_images
from pretrain.evaluate.shards import find_split

LABELS = torch.tensor([0] * 100 + [1] * 300 + [5] * 3)[
    torch.randperm(403, generator=torch.Generator().manual_seed(0))
]
CPU = torch.device("cpu")


def test_a_share_takes_the_same_ratio_of_every_class_and_at_least_one() -> None:
    rows = balanced_rows(LABELS, 0.1, seed=0)
    assert torch.bincount(LABELS[rows]).tolist() == [10, 30, 0, 0, 0, 1]
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.bincount(LABELS[balanced_rows(LABELS, 0.001, 0)]).tolist() == [1, 1, 0, 0, 0, 1]
    assert balanced_rows(LABELS, 1.0, 0).tolist() == list(range(403))


def test_a_share_follows_the_seed_and_lies_within_every_larger_share() -> None:
    small, again, other = (balanced_rows(LABELS, 0.05, seed) for seed in (3, 3, 4))
    assert torch.equal(small, again)
    assert not torch.equal(small, other)
    assert set(small.tolist()) < set(balanced_rows(LABELS, 0.25, 3).tolist())


@pytest.mark.parametrize("ratio", [0.0, 1.5, -0.1, float("nan")])
def test_an_impossible_share_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="--fraction"):
        balanced_rows(LABELS, ratio, 0)


def test_the_share_of_a_split_holds_its_own_images(tmp_path: Path) -> None:
    make_shards(tmp_path, [20, 15])
    split = find_split(tmp_path, "train")
    whole, part = open_images(split), open_images(split, 0.4, seed=1)
    assert torch.bincount(part.labels).tolist() == [2, 2, 2, 2, 2] + [1] * 5  # of 4 and of 3 images
    crop = CentreCrop(8, 8)
    assert torch.equal(part.prepare(range(len(part)), crop), whole.prepare(part.rows.tolist(), crop))


def test_compressed_shards_that_do_not_fit_are_refused_with_the_remedy(tmp_path: Path) -> None:
    make_shards(tmp_path, [4], suffix=".tar.gz")
    split = find_split(tmp_path, "train")
    assert len(open_images(split)) == 4
    with pytest.raises(DataError, match="unpack them"):
        open_images(split, in_memory_bytes=0)


def test_prepared_images_are_the_same_held_and_not(tmp_path: Path) -> None:
    make_shards(tmp_path, [7])
    images = open_images(find_split(tmp_path, "train"))
    held = prepare_images(images, CentreCrop(8, 8), CPU)
    asked = prepare_images(images, CentreCrop(8, 8), CPU, in_memory_bytes=0)
    assert held.held is not None
    assert asked.held is None
    indices = torch.tensor([6, 0, 0, 3])
    assert torch.equal(held.take(indices, CPU), asked.take(indices, CPU))


def test_colours_are_those_of_all_pixels(tmp_path: Path) -> None:
    make_shards(tmp_path, [9])
    images = open_images(find_split(tmp_path, "train"))
    crop = CentreCrop(16, 16)
    pixels = images.prepare(range(9), crop).double() / 255
    mean, std = colours(images, crop)
    assert mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())
