"""Encoded image bytes to RGB pixels, or to a reason why not; and the cut of one crop.

One policy for every decoder. JPEG, PNG and WebP, told by their first bytes. The header is read first, so an
image that claims too many pixels costs nothing, and no metadata reaches a decoder that would unpack it. EXIF
orientation is applied: sizes, boxes and pixels are those of the upright picture. Transparency is laid over
mid-grey, 16-bit colours keep their upper byte, and of an animation the first frame is read. JPEG is decoded
strictly by libjpeg-turbo, PNG and WebP by Pillow; all of them release the GIL.

Damage a decoder can see is an error, never garbage: any cut, any wrong byte of a PNG. Wrong bytes that leave
a valid stream of JPEG or WebP cannot be seen by decoding (of ImageNet's JPEGs with 20 wrong bytes amid the
pixels four in ten, with one wrong bit eight in ten): against those only a hash of the bytes helps.
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
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pretrain.data.image_header import JPEG, PNG, UPRIGHT, ImageHeader, png_without_metadata, read_header

MAX_PIXELS = 50_000_000
MAX_SIDE_PX = 16_384
SHRINKS = (8, 4, 2)  # what libjpeg-turbo skips cheaply, by transforming fewer coefficients per block
GREY = (128, 128, 128)

EMPTY = "empty"
UNKNOWN_FORMAT = "unknown_format"
TOO_LARGE = "too_large"
DAMAGED = "damaged"

# EXIF orientation -> (swap rows and columns, then turn the rows around, then the columns)
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class BadImage(Exception):
    """An image that cannot be used; `reason` is one of the codes above."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) in px of the upright picture, from the header alone."""
    header = _checked_header(data, max_pixels)
    upright = (header.height, header.width)
    return upright if header.orientation < 5 else upright[::-1]


def decode(data: bytes, shrink: int = 1, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """RGB pixels of the upright picture: uint8 (H, W, 3), in one piece of memory.

    shrink: 1, 2, 4 or 8. A JPEG is then decoded at ceil(side / shrink), which is cheaper; the others come
    at full size, so look at the shape.
    """
    assert shrink == 1 or shrink in SHRINKS, shrink
    header = _checked_header(data, max_pixels)
    try:
        if header.kind == JPEG:
            size = (-(-header.height // shrink), -(-header.width // shrink))
            pixels = _decode_jpeg(data, header, size)
        else:
            size = (header.height, header.width)
            pixels = _decode_with_pillow(data, header.kind)
    except Image.DecompressionBombError as error:  # a WebP above twice Pillow's own limit, if ours is higher
        raise BadImage(TOO_LARGE, str(error)) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise BadImage(DAMAGED, str(error)) from error
    if pixels.shape != (*size, 3):
        raise BadImage(DAMAGED, f"decoded to {pixels.shape}, the header says {size[0]} x {size[1]} px")
    return pixels if header.orientation == UPRIGHT else _turned(pixels, header.orientation)


def shrink_for(boxes: Sequence[Sequence[int]], sizes_px: Sequence[int]) -> int:
    """The largest shrink at which every crop keeps twice the sides of what it is resized to.

    boxes: per crop top, left, height, width at full size; sizes_px: per crop the side after resizing. So an
    antialiased resize follows, and it hides where the pixels came from.
    """
    room = [
        min(height, width) / (2 * size_px)
        for (_, _, height, width), size_px in zip(boxes, sizes_px, strict=True)
    ]
    return next((shrink for shrink in SHRINKS if shrink <= min(room)), 1)


def scale_box(
    box: Sequence[int], full_size: tuple[int, int], shrunk_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) of the full image, in px of the shrunk one; at least 1 x 1."""
    top, left, height, width = box
    top, height = _scale_span(top, height, full_size[0], shrunk_size[0])
    left, width = _scale_span(left, width, full_size[1], shrunk_size[1])
    return top, left, height, width


def crop_resize(
    image: NDArray[np.uint8], box: Sequence[int], size_px: int, interpolation: str
) -> NDArray[np.uint8]:
    """Cut one crop and resize it, antialiased: uint8 (H, W, 3) -> uint8 (S, S, 3).

    box: top, left, height, width in px. Channels stay last, which is what torch's fast uint8 kernel wants; a
    small crop costs more in calls than in pixels, so all but the resize is left to numpy.
    """
    top, left, height, width = box
    part = np.ascontiguousarray(image[top : top + height, left : left + width])
    channels_last = part.reshape(1, height, width, 3).transpose(0, 3, 1, 2)
    resized = F.interpolate(
        torch.from_numpy(channels_last), (size_px, size_px), mode=interpolation, antialias=True
    )
    pixels: NDArray[np.uint8] = resized.numpy()[0].transpose(1, 2, 0)
    return pixels


def _checked_header(data: bytes, max_pixels: int) -> ImageHeader:
    if not data:
        raise BadImage(EMPTY)
    try:
        header = read_header(data)
    except ValueError as error:
        raise BadImage(DAMAGED, str(error)) from error
    if header is None:
        raise BadImage(UNKNOWN_FORMAT, f"begins with {data[:8]!r}; known: JPEG, PNG, WebP")
    height, width = header.height, header.width
    if height < 1 or width < 1:
        raise BadImage(DAMAGED, f"{height} x {width} px")
    if height > MAX_SIDE_PX or width > MAX_SIDE_PX or height * width > max_pixels:
        raise BadImage(TOO_LARGE, f"{height} x {width} px")
    return header


def _decode_jpeg(data: bytes, header: ImageHeader, size: tuple[int, int]) -> NDArray[np.uint8]:
    height, width = size  # the decoder takes the smallest of its scales that is not below this
    colors = "CMYK" if header.is_plain_cmyk else "RGB"  # "RGB" takes four colours as inverted, as Adobe does
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data, colorspace=colors, min_height=height, min_width=width, strict=True
    )
    if header.is_plain_cmyk:
        light = 255 - pixels.astype(np.uint16)
        pixels = ((light[:, :, :3] * light[:, :, 3:] + 127) // 255).astype(np.uint8)
    return pixels


def _decode_with_pillow(data: bytes, kind: str) -> NDArray[np.uint8]:
    # the plugins themselves: Image.open would warn of large images, whatever limit was agreed here
    if kind == PNG:
        with PngImageFile(io.BytesIO(png_without_metadata(data))) as image:
            return _to_rgb(image)
    with WebPImageFile(io.BytesIO(data)) as image:
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would saturate
        upper_byte = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(upper_byte[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*GREY, 255)), layers)
    return np.array(image.convert("RGB"))  # a copy: Pillow lends read-only memory


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The upright picture of stored pixels (H, W, 3), in one piece of memory."""
    swap, turn_rows, turn_columns = _TURNS[orientation]
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    if turn_rows:
        pixels = pixels[::-1]
    if turn_columns:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _scale_span(first: int, length: int, full: int, shrunk: int) -> tuple[int, int]:
    """First and length, at least 1 px, along one side."""
    shrink = round(full / shrunk)  # whole, as the last shrunk px may stand for fewer than the others
    begin = min(round(first / shrink), shrunk - 1)
    end = shrunk if first + length == full else min(round((first + length) / shrink), shrunk)
    return begin, max(end - begin, 1)
