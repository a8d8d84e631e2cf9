"""Encoded pictures for the tests: of every kind, lying, damaged."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GREY, GREY_ALPHA, RGB, RGBA, PALETTE = 0, 4, 2, 6, 3  # PNG's colour types
ADAM7 = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Like a photograph: structure of every size, weaker as it gets finer. No two corners are alike."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128.0)
    cells = 2
    while cells < 2 * max(height, width):
        for channel in range(3):
            coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
            fine = coarse.resize((width, height), Image.Resampling.BICUBIC)
            total[:, :, channel] += 80 * cells**-0.7 * np.asarray(fine)
        cells *= 2
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def exif(orientation: int, order: str = "<", value_format: str = "H") -> bytes:
    """A block of EXIF that holds one tag."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    value_type = {"H": 3, "I": 4}[value_format]
    value = struct.pack(order + value_format, orientation).ljust(4, b"\0")
    return mark + struct.pack(order + "IHHHI", 8, 1, 0x0112, value_type, 1) + value + bytes(4)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    depth: int,
    color: int,
    rows: Sequence[bytes],
    before: Sequence[bytes] = (),
    after: Sequence[bytes] = (),
    is_interlaced: bool = False,
) -> bytes:
    """A PNG of packed rows, with further chunks before and after the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, is_interlaced))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    end = chunk(b"IEND", b"")
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *before, pixels, *after, end])


def interlaced_png(pixels: NDArray[np.uint8]) -> bytes:
    """RGB pixels (H, W, 3) in the seven passes of Adam7."""
    passes = [pixels[top::down, left::right] for top, down, left, right in ADAM7]
    rows = [row.tobytes() for one in passes if one.size for row in one]
    return png(pixels.shape[1], pixels.shape[0], 8, RGB, rows, is_interlaced=True)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header promises an image of any size."""
    return png(width, height, 8, RGB, [bytes(999)])


def png_of_zeros(side_px: int) -> bytes:
    """A true black PNG of one bit per pixel: a few KB, whatever its side."""
    return png(side_px, side_px, 1, GREY, [bytes(side_px // 8)] * side_px)


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture(40, 48), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def with_segment(jpeg: bytes, code: int, payload: bytes) -> bytes:
    """A JPEG with one more segment after its first one (which is JFIF's or Adobe's)."""
    (length,) = struct.unpack_from(">H", jpeg, 4)
    place = 4 + length
    return jpeg[:place] + struct.pack(">BBH", 0xFF, code, 2 + len(payload)) + payload + jpeg[place:]


def without_segment(jpeg: bytes, code: int) -> bytes:
    place = jpeg.index(bytes((0xFF, code)))
    (length,) = struct.unpack_from(">H", jpeg, place + 2)
    return jpeg[:place] + jpeg[place + 2 + length :]


def corrupted(data: bytes, place: int | None = None, num_bytes: int = 20) -> bytes:
    """The same with a run of wrong bytes, in the middle if not told where."""
    start = len(data) // 2 if place is None else place
    wrong = bytes(byte ^ 0x5A for byte in data[start : start + num_bytes])
    return data[:start] + wrong + data[start + num_bytes :]
