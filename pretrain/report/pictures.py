"""Pixels as data URIs and as HTML pictures with their words."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretrain.report.markup import Markup, join, tag

Pixels = NDArray[np.uint8]  # (H, W, 3), or (H, W) of grey

SMALL_PX = 64  # up to this side pictures are kept without loss, and shown with their pixels visible
MAX_PX = 384  # longer sides are shrunk: what the page shows is not larger
JPEG_QUALITY = 86


def data_uri(pixels: Pixels) -> str:
    """PNG for small pictures and maps, JPEG for photographs."""
    image = Image.fromarray(pixels)
    if max(image.size) > MAX_PX:
        image.thumbnail((MAX_PX, MAX_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) <= SMALL_PX:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def picture(pixels: Pixels, alt: str) -> Markup:
    """An image that fills its box; a small one shows its pixels as squares."""
    height, width = pixels.shape[:2]
    is_small = max(height, width) <= SMALL_PX
    return tag(
        "img",
        src=data_uri(pixels),
        alt=alt,
        width=width,
        height=height,
        class_="pixels" if is_small else None,
    )


def panel(content: Markup, caption: str | Markup | None = None, **attributes: object) -> Markup:
    """A picture with a line of words below it."""
    below = tag("figcaption", caption) if caption is not None else None
    return tag("figure", content, below, class_="panel", **attributes)


def panels(parts: list[Markup], class_: str = "panels", columns: int | None = None) -> Markup:
    """Panels in a grid; columns: as many beside each other where there is room."""
    style = f"--n:{columns}" if columns else None
    return tag("div", join(parts), class_=class_, style=style)
