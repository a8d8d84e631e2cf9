"""From what heads give to pixels: every step against its definition."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from pages import parse
from PIL import Image

from pretrain.report.hog_picture import CELL_PX, hog_picture
from pretrain.report.palette import heat
from pretrain.report.pictures import SMALL_PX, data_uri, picture
from pretrain.report.restorations import (
    colored_tiles,
    difference_map,
    grey_to_lightness,
    hide,
    lab_to_rgb,
    mean_difference,
    paste,
    patches_to_pixels,
    restore_statistics,
    tiles_of,
    to_pixels,
    true_tiles,
    unnormalize,
)
from pretrain.tasks.hidden_patches import normalize_patches
from pretrain.views.hog import hog
from pretrain.views.pixels import normalize, patchify, rgb_to_lab_ab, to_gray

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(count: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_normalisation_of_the_data_is_undone() -> None:
    clean = images()
    torch.testing.assert_close(unnormalize(normalize(clean, MEAN, STD), MEAN, STD), clean)
    assert unnormalize(torch.full((1, 3, 1, 1), 99.0), MEAN, STD).max() == 1


def test_norm_pix_is_undone_patch_by_patch() -> None:
    """A perfect answer to a normalised target gives the picture back; any other is scaled as its patch."""
    patches = patchify(images(), 4)
    target = normalize_patches(patches)
    torch.testing.assert_close(restore_statistics(target, patches), patches, rtol=1e-4, atol=1e-5)
    zero = restore_statistics(torch.zeros_like(patches), patches)
    torch.testing.assert_close(zero, patches.mean(dim=2, keepdim=True).expand_as(patches))
    one = restore_statistics(torch.ones_like(patches), patches)[1, 5, 0]
    assert float(one) == pytest.approx(float(patches[1, 5].mean() + patches[1, 5].std()), rel=1e-4)


def test_pasting_replaces_the_patches_of_the_index_and_no_other_pixel() -> None:
    clean, side = images(), 4
    index = torch.tensor([[5, 2], [0, 15]])
    answers = torch.rand(2, 2, 3 * side**2)
    pasted = paste(clean, tiles_of(answers, side), index, side)
    wanted = clean.clone()
    for row in range(2):
        for place in range(2):
            patch = int(index[row, place])
            top, left = patch // 4 * side, patch % 4 * side
            block = answers[row, place].view(side, side, 3).permute(2, 0, 1)  # a pixel's channels together
            wanted[row, :, top : top + side, left : left + side] = block
    torch.testing.assert_close(pasted, wanted, rtol=0, atol=0)
    own = true_tiles(clean, index, side)
    torch.testing.assert_close(paste(clean, own, index, side), clean, rtol=0, atol=0)


def test_hidden_patches_turn_grey_and_only_they() -> None:
    clean = images(1)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, [3, 8]] = True
    shown = hide(clean, hidden, 4)
    where = patches_to_pixels(hidden[0], (4, 4), 4)
    assert where.sum() == 32
    assert where[0, 12]
    assert where[8, 0]
    assert (shown[0][:, where] == 0.5).all()
    assert torch.equal(shown[0][:, ~where], clean[0][:, ~where])


def test_lab_goes_there_and_back() -> None:
    colors = images(4)
    linear = torch.where(colors > 0.04045, ((colors + 0.055) / 1.055) ** 2.4, colors / 12.92)
    luminance = (linear * torch.tensor([0.2126729, 0.7151522, 0.0721750]).view(3, 1, 1)).sum(
        dim=1, keepdim=True
    )
    lightness = torch.where(luminance > (6 / 29) ** 3, 116 * luminance ** (1 / 3) - 16, luminance * 903.2963)
    back = lab_to_rgb(lightness, rgb_to_lab_ab(colors))
    torch.testing.assert_close(back, colors, rtol=0, atol=2e-3)
    greys = torch.tensor([0.0, 0.5, 1.0])
    assert grey_to_lightness(greys).tolist() == pytest.approx([0.0, 53.389, 100.0], abs=1e-2)


def test_the_colours_of_a_patch_come_back_when_the_answer_is_right() -> None:
    """Lightness is that of the grey that was shown, so colours are near the true ones, not equal to them."""
    tiles = images(1, 8).view(1, 1, 3, 8, 8)
    shown = to_gray(tiles.flatten(0, 1)).view_as(tiles)
    right = colored_tiles(rgb_to_lab_ab(tiles.flatten(0, 1)).view(1, 1, 2, 8, 8), shown)
    grey = colored_tiles(torch.zeros(1, 1, 2, 8, 8), shown)
    torch.testing.assert_close(grey, shown, rtol=0, atol=2e-3)
    assert (right - tiles).abs().mean() < 0.3 * (shown - tiles).abs().mean()


def test_differences_are_shown_in_order_and_only_where_something_was_asked() -> None:
    target = torch.zeros(3, 2, 2)
    restored = torch.zeros(3, 2, 2)
    restored[:, 0, 1], restored[:, 1, 0] = 0.25, 0.5
    asked = torch.tensor([[True, True], [True, False]])
    shown = difference_map(restored, target, asked)
    assert shown[0, 0].tolist() == heat(np.array(0.0)).tolist()
    assert shown[0, 1].tolist() == heat(np.array(0.5)).tolist()
    assert shown[1, 0].tolist() == heat(np.array(1.0)).tolist()
    assert shown[1, 1].tolist() == [128, 128, 128]
    assert mean_difference(restored, target, asked) == pytest.approx(0.25)
    assert mean_difference(restored, target, None) == pytest.approx(0.1875)


def test_heat_rises_in_lightness() -> None:
    """So that a map survives a grey printer and any kind of colour vision."""
    colors = heat(np.linspace(0, 1, 50)).astype(float)
    light = colors @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()
    assert heat(np.array([-1.0, np.nan, 7.0])).tolist() == heat(np.array([0.0, 0.0, 1.0])).tolist()


@pytest.mark.parametrize(("angle", "is_upright"), [("upright", True), ("level", False)])
def test_strokes_of_a_gradient_picture_lie_along_the_edges(angle: str, is_upright: bool) -> None:
    """Stripes of one direction, from pixels to the picture: in a cell with an edge, bright pixels spread
    along the edge and not across it."""
    stripes = (torch.arange(32) // 4 % 2).float()
    image = stripes.expand(32, 32) if is_upright else stripes.view(32, 1).expand(32, 32)
    values = hog(image.expand(1, 3, 32, 32), 8)[0]
    shown = hog_picture(values, (4, 4))
    assert shown.shape == (4 * 2 * CELL_PX, 4 * 2 * CELL_PX, 3)
    bright = shown[..., 0] > 150
    cells = bright.reshape(8, CELL_PX, 8, CELL_PX).transpose(0, 2, 1, 3).reshape(64, CELL_PX, CELL_PX)
    found = [np.nonzero(cell) for cell in cells if cell.any()]
    extents = np.array([[np.ptp(rows), np.ptp(columns)] for rows, columns in found])
    assert len(extents) > 30
    down, across = extents.mean(axis=0)
    assert (down > 3 * across) if is_upright else (across > 3 * down)


def test_hidden_patches_of_a_gradient_picture_have_another_ground() -> None:
    hidden = torch.tensor([True, False, False, False])
    shown = hog_picture(torch.zeros(4, 108), (2, 2), hidden)
    side = 2 * CELL_PX
    assert (shown[:side, :side] == shown[0, 0]).all()
    assert (shown[side:] == shown[-1, -1]).all()
    assert (shown[0, 0] != shown[-1, -1]).any()


def decoded(uri: str) -> np.ndarray:
    import base64

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_small_pictures_keep_every_pixel_and_large_ones_stay_small() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(data_uri(small)), small)
    large = np.full((900, 600, 3), 77, np.uint8)
    assert decoded(data_uri(large)).shape == (384, 256, 3)
    assert len(data_uri(large)) < 5000
    (image,) = parse(picture(small, 'a "map"')).all("img")
    assert (image.attributes["alt"], image.attributes["class"]) == ('a "map"', "pixels")
    (image,) = parse(picture(np.zeros((SMALL_PX + 1, 9, 3), np.uint8), "photograph")).all("img")
    assert "class" not in image.attributes


def test_pixels_round_to_the_nearest() -> None:
    image = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.2]).view(1, 1, 4).expand(3, 1, 4)
    assert to_pixels(image)[0, :, 0].tolist() == [0, 0, 1, 255]
