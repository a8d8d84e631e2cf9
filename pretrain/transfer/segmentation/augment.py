"""What happens to a training image and its labels: scale, crop, mirror, colours, in SETR's order.

Each function takes the generator it draws from, so a sample is a pure function of (image, generator).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretrain.transfer.segmentation.recipe import AugmentRecipe
from pretrain.transfer.segmentation.scores import IGNORED

Pixels = NDArray[np.uint8]  # (H, W, 3)
Classes = NDArray[np.uint8]  # (H, W), 0..K-1 and IGNORED

CROP_TRIES = 10
BRIGHTNESS = 32.0  # added to values of 0..255
CONTRAST = SATURATION = (0.5, 1.5)
HUE_DEGREES = 36.0  # 18 of the 180 steps that OpenCV has for a turn


def fitted_size(size: tuple[int, int], fit_px: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of an image scaled, its shape kept, to just fit a longer and a shorter side."""
    if fit_px is None:
        return size
    factor = min(fit_px[0] / max(size), fit_px[1] / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def resize_image(
    image: Pixels, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Pixels:
    """Bilinear, antialiased. box: left, top, right, bottom of the part that is wanted, in px of `image`."""
    height, width = size
    picture = Image.fromarray(image)
    # a copy: Pillow lends memory that may only be read
    return np.array(picture.resize((width, height), Image.Resampling.BILINEAR, box))


def augmented(
    image: Pixels,
    classes: Classes,
    recipe: AugmentRecipe,
    crop_px: int,
    fit_px: tuple[int, int] | None,
    rng: np.random.Generator,
) -> tuple[Pixels, Classes]:
    """A crop of at most crop_px on a side; smaller where the scaled image is smaller."""
    height, width = fitted_size(classes.shape, fit_px)
    factor = rng.uniform(*recipe.scale)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    rows, columns = choose_crop(classes, size, crop_px, recipe.cat_max_ratio, rng)
    down, right = classes.shape[0] / size[0], classes.shape[1] / size[1]
    # only the crop is resized: the same pixels as cut out of the whole image resized, at a part of the work
    box = columns.start * right, rows.start * down, columns.stop * right, rows.stop * down
    image = resize_image(image, (rows.stop - rows.start, columns.stop - columns.start), box)
    classes = cut_nearest(classes, size, rows, columns)
    if rng.random() < recipe.flip_ratio:
        image, classes = image[:, ::-1], classes[:, ::-1]
    if recipe.photometric:
        image = distort_colours(image, rng)
    return np.ascontiguousarray(image), np.ascontiguousarray(classes)


def choose_crop(
    classes: Classes, size: tuple[int, int], crop_px: int, cat_max_ratio: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Rows and columns of the scaled image, in which no class should fill more than cat_max_ratio.

    A crop of one class, and one after ten tries, is taken as it comes. size: of the scaled image.
    """
    rows = columns = slice(0)
    for _ in range(CROP_TRIES):
        top, left = (int(rng.integers(0, max(0, side - crop_px) + 1)) for side in size)
        rows, columns = slice(top, min(top + crop_px, size[0])), slice(left, min(left + crop_px, size[1]))
        if cat_max_ratio == 1.0:
            break
        counts = np.bincount(cut_nearest(classes, size, rows, columns).ravel(), minlength=IGNORED + 1)
        counts = counts[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum():
            break
    return rows, columns


def cut_nearest(classes: Classes, size: tuple[int, int], rows: slice, columns: slice) -> Classes:
    """A part of the labels scaled to `size`: each pixel is the one that its centre falls into."""

    def sources(part: slice, scaled: int, original: int) -> NDArray[np.int64]:
        centres = (np.arange(part.start, part.stop) + 0.5) * (original / scaled)
        return np.minimum(centres.astype(np.int64), original - 1)

    down, right = sources(rows, size[0], classes.shape[0]), sources(columns, size[1], classes.shape[1])
    return classes[down[:, None], right]


def distort_colours(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness, contrast, saturation and hue, each with probability one half; contrast first or last."""

    def drawn(low: float, high: float) -> float | None:
        value = float(rng.uniform(low, high))
        return value if rng.random() < 0.5 else None

    brightness = drawn(-BRIGHTNESS, BRIGHTNESS)
    contrast_first = rng.random() < 0.5
    contrast = drawn(*CONTRAST)
    saturation = drawn(*SATURATION)
    hue = drawn(-HUE_DEGREES, HUE_DEGREES)

    if brightness is not None:
        image = _linear(image, 1.0, brightness)
    if contrast is not None and contrast_first:
        image = _linear(image, contrast, 0.0)
    if saturation is not None or hue is not None:
        image = _turn_colours(image, saturation or 1.0, hue or 0.0)
    if contrast is not None and not contrast_first:
        image = _linear(image, contrast, 0.0)
    return image


def _linear(values: Pixels, factor: float, offset: float) -> Pixels:
    table = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8)
    changed: Pixels = table[values]
    return changed


def _turn_colours(image: Pixels, saturation: float, hue_degrees: float) -> Pixels:
    hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
    hsv[..., 0] += np.uint8(round(hue_degrees / 360 * 256) % 256)  # a full turn is 256 steps, and wraps
    hsv[..., 1] = _linear(hsv[..., 1], saturation, 0.0)
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
