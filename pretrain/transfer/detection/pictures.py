"""Pictures of what was to be found, on the left, and what was found, on the right."""

from __future__ import annotations

import colorsys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pretrain.transfer.detection.coco import CocoSet
from pretrain.transfer.detection.masks import Segmentation, decode

LEAST_PX, MOST_PX = 480, 800  # of the longer side of a panel
GAP_PX, CAPTION_PX = 8, 22
MANY = 25  # objects in a panel, above which words would cover them
GOLDEN = 0.618034  # of the circle of hues: neighbours in number are far apart in colour
TINT = 0.45  # share of the colour in a mask
JPEG_QUALITY = 88


@dataclass(frozen=True)
class _Shown:
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in px of the image
    mask: Segmentation | None
    text: str


def draw_predictions(
    found: CocoSet, detections: Sequence[dict[str, Any]], folder: Path, count: int, threshold: float
) -> list[Path]:
    """Write `count` images of the split, spread evenly over it, with all detections above a score."""
    of_image = defaultdict(list)
    for detection in detections:
        if detection["score"] >= threshold:
            of_image[detection["image_id"]].append(detection)
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place in dict.fromkeys(places.tolist()):
        picture = draw(found, place, of_image[int(found.image_ids[place])], threshold)
        path = folder / f"{Path(found.file_names[place]).stem}.jpg"
        picture.save(path, quality=JPEG_QUALITY)
        paths.append(path)
    return paths


def draw(found: CocoSet, place: int, detections: Sequence[dict[str, Any]], threshold: float) -> Image.Image:
    """Ground truth and detections of one image side by side, each object in a colour of its own."""
    image = found.image(place)
    rows = found.rows(place)
    names = found.category_names if len(found.categories) > 1 else ("",)  # one name says nothing
    name_of = dict(zip((category.id for category in found.categories), names, strict=True))
    truth = [
        _Shown(
            tuple(found.boxes[row].tolist()),
            found.segmentation(row) if found.has_masks else None,
            "crowd" if found.crowds[row] else names[found.labels[row] - 1],
        )
        for row in rows
    ]
    predicted = []
    for one in detections:
        left, top, width, height = one["bbox"]
        said = f"{name_of[one['category_id']]} {100 * one['score']:.0f}".strip()
        predicted.append(_Shown((left, top, left + width, top + height), one.get("segmentation"), said))
    num_crowds = int(found.crowds[rows].sum())
    crowds = f" and {num_crowds} crowds" if num_crowds else ""
    panels = [
        _panel(image, truth, f"{found.file_names[place]}: {len(truth) - num_crowds} objects{crowds}"),
        _panel(image, predicted, f"{len(predicted)} found with a score of {100 * threshold:.0f} % or more"),
    ]
    width, height = panels[0].size
    picture = Image.new("RGB", (2 * width + GAP_PX, height), "white")
    picture.paste(panels[0], (0, 0))
    picture.paste(panels[1], (width + GAP_PX, 0))
    return picture


def _panel(image: NDArray[np.uint8], shown: Sequence[_Shown], caption: str) -> Image.Image:
    height, width = image.shape[:2]
    tinted = image.astype(np.float32)
    colours = [_colour(number) for number in range(len(shown))]
    for one, colour in zip(shown, colours, strict=True):
        if one.mask:
            inside = decode(one.mask, height, width).astype(bool)
            tinted[inside] = (1 - TINT) * tinted[inside] + TINT * np.array(colour)
    longer = max(width, height)
    scale = min(MOST_PX, max(LEAST_PX, longer)) / longer
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = Image.fromarray(tinted.round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    panel = Image.new("RGB", (size[0], size[1] + CAPTION_PX), "white")
    panel.paste(resized, (0, CAPTION_PX))
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
    pen.text((2, 4), _fitted(caption, size[0] - 4, font), fill="black", font=font)
    for one, colour in zip(shown, colours, strict=True):
        left, top, right, bottom = (side * scale for side in one.box)
        pen.rectangle((left, top + CAPTION_PX, right, bottom + CAPTION_PX), outline=colour, width=1)
        if len(shown) <= MANY:
            corner = (left + 2, max(CAPTION_PX, top + CAPTION_PX - 13))
            pen.text(corner, one.text, fill=colour, font=font, stroke_width=1, stroke_fill="black")
    return panel


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _fitted(text: str, width_px: int, font: Any) -> str:
    while text and font.getlength(text) > width_px:
        text = text[:-1]
    return text
