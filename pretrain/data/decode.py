"""Encoded image bytes to RGB pixels, or to a reason why not; and the cut of one crop.

The header is read first, so an image that claims too many pixels costs nothing. JPEG is decoded strictly by
libjpeg-turbo (damage is an error, never garbage), PNG and WebP by Pillow. Only an animation's first frame
is read, and EXIF orientation is not applied: every decoder gives the pixels as they are stored.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MAX_PIXELS = 50_000_000
MAX_SIDE_PX = 16_384

EMPTY = "empty"
UNKNOWN_FORMAT = "unknown_format"
TOO_LARGE = "too_large"
DAMAGED = "damaged"


class BadImage(Exception):
    """An image that cannot be used; `reason` is one of the codes above."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in px, from the header alone."""
    try:
        height, width = _header(data)
    except (ValueError, struct.error) as error:
        raise BadImage(DAMAGED, str(error)) from error
    if height < 1 or width < 1:
        raise BadImage(DAMAGED, f"{height} x {width} px")
    if max(height, width) > MAX_SIDE_PX or height * width > MAX_PIXELS:
        raise BadImage(TOO_LARGE, f"{height} x {width} px")
    return height, width


def decode(data: bytes) -> NDArray[np.uint8]:
    """RGB pixels: uint8 (H, W, 3). Transparency is laid over white, 16-bit grey is scaled to 8 bits."""
    height, width = image_size(data)
    if _is_jpeg(data):
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError as error:
            raise BadImage(DAMAGED, str(error)) from error
    else:
        pixels = _decode_with_pillow(data)
    if pixels.shape != (height, width, 3):
        raise BadImage(DAMAGED, f"decoded to {pixels.shape}, the header says {height} x {width} px")
    return pixels


def crop_resize(
    image: NDArray[np.uint8] | Tensor, box: Sequence[int], size_px: int, interpolation: str
) -> Tensor:
    """Cut one crop and resize it, antialiased: uint8 (H, W, 3) -> uint8 (S, S, 3).

    box: top, left, height, width in px. Channels stay last, which is what torch's fast uint8 kernel wants.
    """
    top, left, height, width = box
    pixels = torch.as_tensor(image)[top : top + height, left : left + width]
    channels_last = pixels.unsqueeze(0).permute(
        0, 3, 1, 2
    )  # in this order: torch then sees the memory format
    resized = F.interpolate(channels_last, (size_px, size_px), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0)


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8\xff")


def _header(data: bytes) -> tuple[int, int]:
    if not data:
        raise BadImage(EMPTY)
    if _is_jpeg(data):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return height, width
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack_from(">II", data, 16)
        return height, width
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_size(data)
    raise BadImage(UNKNOWN_FORMAT, f"begins with {data[:8]!r}; known: JPEG, PNG, WebP")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the three kinds of WebP: lossy, lossless, extended (RFC 9649)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        return (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1
    if kind == b"VP8X":
        width_low, width_high, height_low, height_high = struct.unpack_from("<HBHB", data, 24)
        return (height_low | height_high << 16) + 1, (width_low | width_high << 16) + 1
    raise ValueError(f"unknown kind of WebP: {kind!r}")


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            if image.format == "PNG":
                image.verify()  # the checksums, which loading skips; ends the use of this object
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            return _to_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadImage(DAMAGED, str(error)) from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would saturate
        grey = np.asarray(image).astype(np.int64)
        narrow = ((grey * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
        return np.repeat(narrow[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layers)
    return np.array(image.convert("RGB"))  # a copy: Pillow lends read-only memory
