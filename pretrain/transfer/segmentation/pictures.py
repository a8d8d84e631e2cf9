"""One picture per image: the image, its labels, the prediction and the errors side by side, over a legend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pretrain.transfer.segmentation.folders import Colour
from pretrain.transfer.segmentation.scores import IGNORED

WIDTH_PX = 480  # of one panel, at most
GAP_PX = 6
TEXT_PX = 15
TITLES = ("image", "ground truth", "prediction", "errors")
PAPER: Colour = (255, 255, 255)
INK: Colour = (30, 30, 30)
NO_LABEL: Colour = (0, 0, 0)
WRONG: Colour = (214, 39, 40)

Pixels = NDArray[np.uint8]  # (H, W, 3)


def coloured(classes: NDArray[np.uint8], colours: Sequence[Colour]) -> Pixels:
    """uint8 (H, W) of classes and IGNORED -> uint8 (H, W, 3)"""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(colours)] = colours
    table[IGNORED] = NO_LABEL
    return table[classes]


def errors(image: Pixels, labels: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> Pixels:
    """The image in pale grey, wrong pixels in red, pixels without a label in black."""
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    shown = np.repeat(160 + grey // 3, 3, axis=2).astype(np.uint8)
    shown[(labels != predicted) & (labels != IGNORED)] = WRONG
    shown[labels == IGNORED] = NO_LABEL
    return shown


def picture(
    image: Pixels,
    labels: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    classes: Sequence[str],
    colours: Sequence[Colour],
) -> Image.Image:
    """Four panels in a row. image: uint8 (H, W, 3); labels, predicted: uint8 (H, W)."""
    panels = [
        image,
        coloured(labels, colours),
        coloured(predicted, colours),
        errors(image, labels, predicted),
    ]
    height, width = labels.shape
    scale = min(1.0, WIDTH_PX / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    font = ImageFont.load_default(TEXT_PX)
    line = TEXT_PX + GAP_PX
    page_width = len(panels) * (size[0] + GAP_PX) + GAP_PX
    places, legend_height = _legend_places([*classes, "no label", "wrong"], page_width, font, line)
    page = Image.new("RGB", (page_width, line + size[1] + 2 * GAP_PX + legend_height), PAPER)
    draw = ImageDraw.Draw(page)
    for number, (panel, title) in enumerate(zip(panels, TITLES, strict=True)):
        left = GAP_PX + number * (size[0] + GAP_PX)
        draw.text((left, 2), title, INK, font)
        # classes have no values in between, so only the image is smoothed
        how = Image.Resampling.NEAREST if number else Image.Resampling.LANCZOS
        page.paste(Image.fromarray(panel).resize(size, how), (left, line))
    top = line + size[1] + GAP_PX
    for (x, y), name, colour in zip(
        places, [*classes, "no label", "wrong"], [*colours, NO_LABEL, WRONG], strict=True
    ):
        draw.rectangle((x, top + y + 3, x + TEXT_PX, top + y + TEXT_PX), colour, INK)
        draw.text((x + TEXT_PX + GAP_PX, top + y), name, INK, font)
    return page


def save_picture(page: Image.Image, folder: Path, name: str) -> Path:
    """Write FOLDER/NAME.png; slashes of the name become underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('/', '_')}.png"
    page.save(path, optimize=True)
    return path


def _legend_places(
    names: Sequence[str], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, line: int
) -> tuple[list[tuple[int, int]], int]:
    """Where the entries stand, as many in a row as fit, and the height of all."""
    places, x, y = [], GAP_PX, 0
    for name in names:
        wide = TEXT_PX + 2 * GAP_PX + round(font.getlength(name)) + 2 * GAP_PX
        if x + wide > width and x > GAP_PX:
            x, y = GAP_PX, y + line
        places.append((x, y))
        x += wide
    return places, y + line
