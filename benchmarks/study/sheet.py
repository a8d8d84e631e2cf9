"""One PNG of many small pictures in rows and columns, each pixel a square; the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pretrain.report.palette import heat

WIDTH_PX = 1000  # that pictures are enlarged to fill, by a whole number
GAP_PX, GROUP_GAP_PX, MARGIN_PX = 8, 26, 10
FONT_PX, SMALL_PX, LINE_PX = 15, 12, 19
INK, QUIET = "#1a1a1a", "#555555"
BAR_PX = (120, 12)  # of the scale of colours


@dataclass(frozen=True)
class Outline:
    """Patches, row by row, that are framed in a colour; `size_px` of the picture itself."""

    color: str
    patches: tuple[int, ...]
    columns: int  # patches in a row
    size_px: int
    width_px: int = 2  # of the frame, as drawn


@dataclass(frozen=True)
class Cell:
    """A picture, perhaps with frames on it and a few words below."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    outlines: tuple[Outline, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A name of a line or two, and a cell for each row."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Columns under one heading."""

    name: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Legend:
    """What the colours of frames are, and the ends of the scale of colours."""

    frames: tuple[tuple[str, str], ...]  # colour, words
    scale: tuple[str, str]


def draw(groups: Sequence[Group], rows: Sequence[str], legend: Legend) -> bytes:
    """A PNG. Cells are of one size, (H, W, 3), and there are as many in each column as rows."""
    columns = [column for group in groups for column in group.columns]
    height, width = columns[0].cells[0].pixels.shape[:2]
    side = max(_width(row, FONT_PX) for row in rows) + 2 * GAP_PX
    gaps = (len(columns) - len(groups)) * GAP_PX + (len(groups) - 1) * GROUP_GAP_PX
    times = max(1, (WIDTH_PX - side - gaps - 2 * MARGIN_PX) // (len(columns) * width))
    lefts = _lefts(groups, MARGIN_PX + side, times * width)
    name_lines = max(column.name.count("\n") + 1 for column in columns)
    top = MARGIN_PX + LINE_PX + 6 + name_lines * LINE_PX + 4
    has_notes = any(cell.note for column in columns for cell in column.cells)
    step = times * height + GAP_PX + (LINE_PX if has_notes else 0)
    bottom = top + len(rows) * step
    size = (lefts[-1] + times * width + MARGIN_PX, bottom + LINE_PX + MARGIN_PX)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    _heads(pen, groups, lefts, times * width, top)
    for place, row in enumerate(rows):
        at = top + place * step
        pen.text((MARGIN_PX, at + times * height / 2), row, INK, _font(FONT_PX), anchor="lm")
        for left, column in zip(lefts, columns, strict=True):
            cell = column.cells[place]
            sheet.paste(_enlarged(cell, times), (left, at))
            middle = left + times * width / 2
            pen.text((middle, at + times * height + 3), cell.note, QUIET, _font(SMALL_PX), anchor="ma")
    _legend(sheet, pen, legend, bottom + LINE_PX // 2 + 2)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def enlarge(weights: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A map (rows, columns) as colours from 0 to its largest, a square for each weight: uint8 (H, W, 3)"""
    colors = heat(weights / max(float(weights.max()), 1e-12))
    return np.asarray(Image.fromarray(colors).resize(size[::-1], Image.Resampling.NEAREST))


def _lefts(groups: Sequence[Group], start: int, width: int) -> list[int]:
    found = []
    for group in groups:
        found += [start + place * (width + GAP_PX) for place in range(len(group.columns))]
        start = found[-1] + width + GROUP_GAP_PX
    return found


def _heads(
    pen: ImageDraw.ImageDraw, groups: Sequence[Group], lefts: Sequence[int], width: int, top: int
) -> None:
    place = 0
    for group in groups:
        first, last = lefts[place], lefts[place + len(group.columns) - 1] + width
        pen.text(((first + last) / 2, MARGIN_PX), group.name, INK, _font(FONT_PX, bold=True), anchor="ma")
        pen.line((first, MARGIN_PX + LINE_PX + 2, last, MARGIN_PX + LINE_PX + 2), "#bbbbbb")
        for column in group.columns:
            words = (lefts[place] + width / 2, top - 5)
            pen.multiline_text(
                words, column.name, INK, _font(SMALL_PX), anchor="md", align="center", spacing=2
            )
            place += 1


def _enlarged(cell: Cell, times: int) -> Image.Image:
    height, width = cell.pixels.shape[:2]
    image = Image.fromarray(cell.pixels).resize((times * width, times * height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for outline in cell.outlines:
        side = times * outline.size_px
        for patch in outline.patches:
            top, left = (side * place for place in divmod(patch, outline.columns))
            box = (left, top, left + side - 1, top + side - 1)
            pen.rectangle(box, outline=outline.color, width=outline.width_px)
    return image


def _legend(sheet: Image.Image, pen: ImageDraw.ImageDraw, legend: Legend, middle: int) -> None:
    left = MARGIN_PX

    def write(words: str) -> None:
        nonlocal left
        pen.text((left, middle), words, INK, _font(SMALL_PX), anchor="lm")
        left += _width(words, SMALL_PX)

    for color, words in legend.frames:
        pen.rectangle((left, middle - 6, left + 12, middle + 6), outline=color, width=3)
        left += 18
        write(words)
        left += 14
    write(legend.scale[0])
    left += 6
    bar = np.broadcast_to(heat(np.linspace(0, 1, BAR_PX[0])), (BAR_PX[1], BAR_PX[0], 3))
    sheet.paste(Image.fromarray(np.ascontiguousarray(bar)), (left, middle - BAR_PX[1] // 2))
    left += BAR_PX[0] + 6
    write(legend.scale[1])


@cache
def _font(size_px: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The one that matplotlib brings along, so that it is the same everywhere."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(fonts / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size_px)


def _width(words: str, size_px: int) -> int:
    return round(_font(size_px).getlength(words))
