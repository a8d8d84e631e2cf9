"""What the header of a JPEG, PNG or WebP says: its size and its EXIF orientation, without decoding a pixel.

The kind is told by the first bytes, never by a name. The orientation is the EXIF tag 0x0112 of the first APP1
Exif segment (JPEG), of the eXIf chunk (PNG) or of the EXIF chunk (WebP); anything malformed there counts as
upright, and XMP is not read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

JPEG, PNG, WEBP = "JPEG", "PNG", "WebP"
UPRIGHT = 1
MAX_SCANS = 100  # an encoder writes about 10; each scan costs a pass over all pixels, however few its bytes

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_PREFIX = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_PROGRESSIVE_FRAMES = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_JPEG_APP1, _JPEG_APP14, _JPEG_SCAN = 0xE1, 0xEE, 0xDA
_two_shorts = struct.Struct(">HH").unpack_from


class ImageHeader(NamedTuple):  # made once per image, and a frozen dataclass takes three times as long
    """What is known before decoding; height and width are those of the stored rows and columns."""

    kind: str
    height: int
    width: int
    orientation: int = UPRIGHT  # 1..8
    is_plain_cmyk: bool = False  # a four-colour JPEG not marked by Adobe, so not inverted


def read_header(data: bytes) -> ImageHeader | None:
    """The header, or None if this is none of the three kinds; ValueError if it is damaged."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg_header(data)
        if data.startswith(_PNG_SIGNATURE):
            return _png_header(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp_header(data)
    except (IndexError, struct.error) as error:
        raise ValueError("the header is cut short") from error
    return None


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk up to IEND; its bytes include the length, the type and the CRC."""
    start = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, start)
        end = start + 12 + length
        if end > len(data):
            raise ValueError("the last chunk is cut short")
        kind = data[start + 4 : start + 8]
        yield kind, start, end
        start = end


def png_without_metadata(data: bytes) -> bytes:
    """The chunks that make the default image and no others, every checksum of the file verified.

    Texts, profiles and animation never reach a decoder, so a bomb in one of them is just skipped bytes.
    Pillow compares the transparent colour with values of 8 bits: the colour of a 2 or 4 bit grey image is
    scaled to them, that of a 16 bit image is dropped.
    """
    depth, color = data[24], data[25]
    view = memoryview(data)
    kept: list[bytes | memoryview] = [_PNG_SIGNATURE]
    has_palette, has_pixels = color != 3, False
    for kind, start, end in png_chunks(data):
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ValueError(f"wrong checksum of chunk {kind!r}")
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(view[start:end])
            has_palette = has_palette or kind == b"PLTE"
            has_pixels = has_pixels or kind == b"IDAT"
            if has_pixels and not has_palette:
                raise ValueError("pixels before their palette")
        elif kind == b"tRNS" and depth in (2, 4) and color == 0 and end - start == 14:
            level = int.from_bytes(view[start + 8 : start + 10], "big") * 255 // (2**depth - 1)
            payload = kind + struct.pack(">H", level & 0xFFFF)
            kept.append(struct.pack(">I", 2) + payload + struct.pack(">I", zlib.crc32(payload)))
        elif kind == b"tRNS" and depth < 16:
            kept.append(view[start:end])
    if not has_pixels:
        raise ValueError("no pixels")
    return b"".join(kept)


def exif_orientation(block: bytes) -> int:
    """The orientation 1..8 in a TIFF block of EXIF; 1 if there is none, or it makes no sense."""
    block = block.removeprefix(_EXIF_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return UPRIGHT
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (num_tags,) = struct.unpack_from(order + "H", block, start)
        for place in range(start + 2, start + 2 + 12 * num_tags, 12):
            tag, value_type, count = struct.unpack_from(order + "HHI", block, place)
            if tag == _ORIENTATION_TAG:
                value_format = {3: "H", 4: "I"}.get(value_type)  # SHORT; some write LONG
                if value_format is None or count != 1:
                    return UPRIGHT
                (value,) = struct.unpack_from(order + value_format, block, place + 8)
                return value if 1 <= value <= 8 else UPRIGHT
    except struct.error:
        pass
    return UPRIGHT


def _jpeg_header(data: bytes) -> ImageHeader:
    """Walk the segments up to the first scan."""
    frame = orientation = height = width = num_components = 0
    is_by_adobe = False
    at = 2
    while True:
        marker, length = _two_shorts(data, at)
        if marker == 0xFFFF:  # a fill byte
            at += 1
            continue
        code = marker - 0xFF00
        if code < 0xC0 or 0xD0 <= code <= 0xD9:  # no segment stands here: garbage, a restart, the end
            raise ValueError(f"marker {marker:04x} before the first scan")
        if code == _JPEG_SCAN:
            break
        if code in _JPEG_FRAMES:
            if frame:
                raise ValueError("two frames")
            frame, num_components = code, data[at + 9]
            height, width = _two_shorts(data, at + 5)
        elif code == _JPEG_APP1:
            if not orientation and data.startswith(_EXIF_PREFIX, at + 4):
                orientation = exif_orientation(data[at + 4 : at + 2 + length])
        elif code == _JPEG_APP14:
            is_by_adobe = is_by_adobe or data.startswith(b"Adobe", at + 4)
        at += 2 + length
    if not frame:
        raise ValueError("a scan before its frame")
    has_more_scans = frame in _PROGRESSIVE_FRAMES or data[at + 4] < num_components
    if has_more_scans and data.count(b"\xff\xda", at) > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")
    return ImageHeader(JPEG, height, width, orientation or UPRIGHT, num_components == 4 and not is_by_adobe)


def _png_header(data: bytes) -> ImageHeader:
    if data[8:16] != b"\0\0\0\x0dIHDR":
        raise ValueError("the first chunk is not IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    orientation = UPRIGHT
    for kind, start, end in png_chunks(data):  # to the end, as eXIf may follow the pixels
        if kind == b"eXIf":
            orientation = exif_orientation(data[start + 8 : end - 4])
    return ImageHeader(PNG, height, width, orientation)


def _webp_header(data: bytes) -> ImageHeader:
    """The three kinds of WebP: lossy, lossless, extended (RFC 9649); only the last holds EXIF."""
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    end = 8 + riff_bytes
    if end > len(data):
        raise ValueError(f"{len(data)} of {end} bytes")
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader(WEBP, height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        return ImageHeader(WEBP, (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise ValueError(f"unknown kind of WebP: {kind!r}")
    width_low, width_high, height_low, height_high = struct.unpack_from("<HBHB", data, 24)
    orientation = UPRIGHT
    start = 12
    while start + 8 <= end:
        (length,) = struct.unpack_from("<I", data, start + 4)
        if data.startswith(b"EXIF", start):
            orientation = exif_orientation(data[start + 8 : start + 8 + length])
            break
        start += 8 + length + length % 2
    height, width = (height_low | height_high << 16) + 1, (width_low | width_high << 16) + 1
    return ImageHeader(WEBP, height, width, orientation)
