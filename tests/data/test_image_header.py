from __future__ import annotations

import struct

import numpy as np
import pytest
from images import RGB, chunk, encoded, exif, picture, png, with_segment
from PIL import Image

from pretrain.data.image_header import exif_orientation, png_without_metadata, read_header

SMALL = picture(5, 7)
JPEG = encoded(SMALL, "JPEG")
ROWS = [bytes(21)] * 5
APP1, COMMENT = 0xE1, 0xFE


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value_format", ["H", "I"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_the_orientation_is_read_in_either_byte_order_and_width(
    order: str, value_format: str, prefix: bytes
) -> None:
    read = [exif_orientation(prefix + exif(number, order, value_format)) for number in range(1, 9)]
    assert read == list(range(1, 9))


def test_the_orientation_is_found_among_other_tags() -> None:
    tags = Image.Exif()
    tags[0x010E], tags[0x0112], tags[0x011A], tags[0x0131] = "a picture", 7, 72.0, "a program"
    assert exif_orientation(tags.tobytes()) == 7


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0" + struct.pack("<IH", 8, 0xFFFF),  # promises tags and ends
        exif(6)[:-8],  # ends in the value
        exif(6).replace(b"II", b"IM"),
        exif(0),
        exif(9),
        exif(65536 + 6, value_format="I"),
        exif(6).replace(b"\x12\x01\x03\0\x01\0", b"\x12\x01\x03\0\x02\0"),  # two orientations
        exif(6).replace(b"\x12\x01\x03\0", b"\x12\x01\x02\0"),  # as a text
        *(np.random.default_rng(seed).bytes(60) for seed in range(5)),
        *(b"MM\0*\0\0\0\x08" + np.random.default_rng(seed).bytes(600) for seed in range(5)),
    ],
)
def test_malformed_exif_counts_as_upright(block: bytes) -> None:
    assert exif_orientation(block) == 1
    assert read_header(with_segment(JPEG, APP1, b"Exif\0\0" + block)) == read_header(JPEG)


def test_the_first_exif_segment_counts_wherever_it_stands() -> None:
    third = with_segment(JPEG, APP1, b"Exif\0\0" + exif(3))
    xmp_first = with_segment(third, APP1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
    many_first = xmp_first
    for _ in range(300):
        many_first = with_segment(many_first, COMMENT, bytes(1000))
    filled = third.replace(
        b"\xff\xe1", b"\xff\xff\xff\xff\xe1"
    )  # a marker may be preceded by any number of ff
    sixth_first = with_segment(third, APP1, b"Exif\0\0" + exif(6))
    headers = [read_header(data) for data in (third, xmp_first, many_first, filled, sixth_first)]
    assert [header and header.orientation for header in headers] == [3, 3, 3, 3, 6]


def test_exif_counts_before_and_after_the_pixels_of_a_png() -> None:
    block = chunk(b"eXIf", exif(8))
    for data in (png(7, 5, 8, RGB, ROWS, before=[block]), png(7, 5, 8, RGB, ROWS, after=[block])):
        header = read_header(data)
        assert header is not None
        assert (header.kind, header.height, header.width, header.orientation) == ("PNG", 5, 7, 8)


@pytest.mark.parametrize("num_profile_bytes", [0, 1, 2, 3])
def test_exif_is_found_behind_webp_chunks_of_any_length(num_profile_bytes: int) -> None:
    data = encoded(SMALL, "WEBP", icc_profile=bytes(num_profile_bytes), exif=exif(5))
    header = read_header(data)
    assert header is not None
    assert (header.kind, header.height, header.width, header.orientation) == ("WebP", 5, 7, 5)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    progressive = encoded(SMALL, "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert read_header(progressive) is not None
    with pytest.raises(ValueError, match="scans"):
        read_header(progressive[:-2] + 100 * last_scan + b"\xff\xd9")


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:3],
        JPEG[: JPEG.index(b"\xff\xda")],
        b"\xff\xd8\xff\xd9" + JPEG[2:],
        JPEG.replace(b"\xff\xdb", b"\x00\xdb", 1),
        b"\xff\xd8" + JPEG[JPEG.index(b"\xff\xda") :],
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", bytes(13)) + chunk(b"IEND", b""),
        png(7, 5, 8, RGB, ROWS)[:-12],
        b"RIFF\0\0\0\0WEBP",
        encoded(SMALL, "WEBP")[:-2],
        b"RIFF\0\0\0\0WEBPVP9 " + bytes(40),
    ],
)
def test_a_damaged_header_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_header(data)


def test_only_the_chunks_that_make_pixels_are_kept() -> None:
    before = [chunk(b"iCCP", b"x\0\0" + bytes(9)), chunk(b"tRNS", bytes(6)), chunk(b"acTL", bytes(8))]
    after = [chunk(b"fdAT", bytes(50)), chunk(b"zTXt", bytes(50))]
    kept = png(7, 5, 8, RGB, ROWS, before=[chunk(b"tRNS", bytes(6))])
    assert png_without_metadata(png(7, 5, 8, RGB, ROWS, before, after) + b"behind the end") == kept
