"""Histograms of oriented gradients: as a slow loop computes them, and blind to contrast."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.views.hog import HOG_DIM, hog


def _images(num_images: int = 2, height: int = 32, width: int = 48) -> Tensor:
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(0))


def _slow_hog(image: np.ndarray, patch_px: int) -> np.ndarray:
    """One image, float64 (3, H, W), pixel by pixel: (N, 108)."""
    _, height, width = image.shape
    cell = patch_px // 2
    sobel = [[1, 0, -1], [2, 0, -2], [1, 0, -1]]
    histogram = np.zeros((3, 9, height // cell, width // cell))
    for channel in range(3):
        padded = np.pad(image[channel], 1, mode="reflect")
        for y in range(height):
            for x in range(width):
                gx = sum(sobel[i][j] * padded[y + i, x + j] for i in range(3) for j in range(3))
                gy = sum(sobel[j][i] * padded[y + i, x + j] for i in range(3) for j in range(3))
                place = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
                histogram[channel, place, y // cell, x // cell] += math.hypot(gx, gy)
    rows, columns = height // patch_px, width // patch_px
    result = np.zeros((rows * columns, 108))
    for patch in range(rows * columns):
        values = []
        for channel in range(3):
            for place in range(9):
                for i in range(2):
                    for j in range(2):
                        row, column = 2 * (patch // columns) + i, 2 * (patch % columns) + j
                        length = np.linalg.norm(histogram[channel, :, row, column])
                        values.append(histogram[channel, place, row, column] / max(length, 1e-12))
        result[patch] = values
    return result


@pytest.mark.parametrize("patch_px", [4, 8, 16])
def test_histograms_are_those_of_a_slow_loop(patch_px: int) -> None:
    """In the order (channel, bin, cell row, cell column), also for small patches."""
    images = _images(1)
    features = hog(images, patch_px)
    assert features.dtype == torch.float32
    assert features.shape == (1, 32 * 48 // patch_px**2, HOG_DIM)
    slow = torch.from_numpy(_slow_hog(images[0].double().numpy(), patch_px)).float()
    torch.testing.assert_close(features[0], slow, rtol=0, atol=1e-5)


def test_predicting_zero_costs_one_ninth() -> None:
    """T-MF-2: where no cell is empty, the nine bins of each have squares that sum to 1"""
    features = hog(_images(), 16)
    torch.testing.assert_close(features.square().mean(), torch.tensor(1 / 9), rtol=0, atol=1e-6)
    lengths = features.view(2, -1, 3, 9, 2, 2).norm(dim=3)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_a_contrast_that_is_inverted_or_stronger_changes_nothing() -> None:
    """T-MF-3"""
    images = _images()
    features = hog(images, 16)
    assert torch.equal(hog(-images, 16), features)
    assert torch.equal(hog(8 * images, 16), features)
    torch.testing.assert_close(hog(0.3 * images, 16), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(hog(images + 0.7, 16), features, rtol=0, atol=1e-3)  # sums of rounded numbers


@pytest.mark.parametrize("rising", [1.0, -1.0])
def test_edges_have_their_bins(rising: float) -> None:
    """T-MF-3: a vertical edge is in bin 4 only, a horizontal one in bin 0 only"""
    step = torch.zeros(1, 3, 32, 32)
    step[..., 4:20] = rising * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1)
    for images, expected in ((step, 4), (step.mT, 0)):
        features = hog(images, 16).view(4, 3, 9, 2, 2)
        others = features.index_fill(2, torch.tensor([expected]), 0.0)
        assert (others == 0).all()
        assert features[:, :, expected].unique().tolist() == [0.0, 1.0]


def test_a_diagonal_edge_is_in_the_bin_of_45_degrees() -> None:
    place = torch.arange(32.0)
    falling = (place + place.unsqueeze(1)).expand(1, 3, 32, 32)
    inner = hog(falling, 16).view(2, 2, 3, 9, 2, 2)[0, 0, :, :, 1, 1]  # away from the reflected border
    assert inner.argmax(dim=1).tolist() == [2, 2, 2]  # 45 of 180 degrees are 2.25 of 9 bins
    inner = hog(falling.flip(3), 16).view(2, 2, 3, 9, 2, 2)[0, 0, :, :, 1, 1]
    assert inner.argmax(dim=1).tolist() == [6, 6, 6]


@pytest.mark.parametrize("level", [0.0, 0.1, -2.7])
def test_an_image_without_edges_has_no_target(level: float) -> None:
    """T-MF-3"""
    features = hog(torch.full((2, 3, 32, 32), level), 8)
    assert torch.equal(features, torch.zeros(2, 16, 108))


def test_an_edge_moves_only_the_patches_and_the_channel_it_is_in() -> None:
    images = _images(1, 32, 32)
    other = images.clone()
    other[:, 1, 20:28, 4:12] += torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    changed = (hog(images, 16) != hog(other, 16)).view(4, 3, -1).any(dim=2)
    assert changed.nonzero().tolist() == [[2, 1]]  # the lower left patch, the green channel


def test_histograms_are_float32_under_autocast() -> None:
    images = _images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = hog(images, 16)
        halved = hog(images.bfloat16(), 16)
    assert torch.equal(features, hog(images, 16))
    assert halved.dtype == torch.float32
    assert torch.equal(halved, hog(images.bfloat16().float(), 16))


def test_images_stay_as_they_are() -> None:
    images = _images()
    before = images.clone()
    hog(images, 16)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("side_px", "patch_px"), [(32, 5), (36, 8)])
def test_images_that_are_not_whole_patches_are_refused(side_px: int, patch_px: int) -> None:
    with pytest.raises(ValueError, match="not whole patches"):
        hog(torch.zeros(1, 3, side_px, side_px), patch_px)
