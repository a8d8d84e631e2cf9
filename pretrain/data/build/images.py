"""One encoded image on its way into a shard: checked, and shrunk where asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from pretrain.data.decode import SHRINKS, decode, image_size
from pretrain.data.image_header import JPEG, PNG, WEBP, read_header

_EXTENSIONS = {JPEG: "jpg", PNG: "png", WEBP: "webp"}
_SUBSAMPLINGS = {"420": "4:2:0", "422": "4:2:2", "444": "4:4:4"}
_DECODED_RATIO = (
    2  # a JPEG is decoded at this many times the wanted size at least: cheaper, and not to be seen
)


@dataclass(frozen=True)
class ImageSettings:
    check: bool
    max_side_px: int | None
    quality: int
    subsampling: str


@dataclass(frozen=True)
class PreparedImage:
    data: bytes
    extension: str
    is_reencoded: bool


def prepare(data: bytes, settings: ImageSettings) -> PreparedImage:
    """The bytes to store. Images that are small enough keep their own; BadImage says why one is left out."""
    longer_side_px = max(image_size(data))
    if settings.max_side_px is not None and longer_side_px > settings.max_side_px:
        return PreparedImage(_shrink(data, longer_side_px, settings.max_side_px, settings), "jpg", True)
    if settings.check:
        decode(data)
    header = read_header(data)
    assert header is not None  # else it had no size
    return PreparedImage(data, _EXTENSIONS[header.kind], False)  # names lie: ImageNet has a PNG called JPEG


def _shrink(data: bytes, longer_side_px: int, max_side_px: int, settings: ImageSettings) -> bytes:
    """Upright, longer side `max_side_px`, antialiased, as JPEG without metadata."""
    fast = (shrink for shrink in SHRINKS if longer_side_px >= shrink * _DECODED_RATIO * max_side_px)
    image = Image.fromarray(decode(data, next(fast, 1)))
    height, width = image_size(data)
    scale = max_side_px / longer_side_px
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    subsampling = _SUBSAMPLINGS[settings.subsampling]
    image.save(buffer, "JPEG", quality=settings.quality, subsampling=subsampling)
    return buffer.getvalue()
