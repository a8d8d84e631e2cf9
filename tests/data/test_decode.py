from __future__ import annotations

import io
import resource
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_shards import jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from pretrain.data.decode import BadImage, crop_resize, decode, image_size


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header promises an image of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(jpeg(0))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


RED = (200, 30, 40)
RGB_IMAGE = Image.new("RGB", (7, 5), RED)
PALETTE = RGB_IMAGE.quantize(4)
CMYK = Image.new("CMYK", (7, 5), (0, 217, 204, 55))  # R = 255 - 55, G = 200 * (1 - 217 / 255), ...


@pytest.mark.parametrize(
    ("data", "color"),
    [
        (encoded(RGB_IMAGE, "JPEG", quality=100), RED),
        (encoded(RGB_IMAGE, "JPEG", quality=100, progressive=True), RED),
        (encoded(CMYK, "JPEG", quality=100), RED),
        (encoded(Image.new("L", (7, 5), 99), "JPEG"), (99, 99, 99)),
        (encoded(RGB_IMAGE, "PNG"), RED),
        (encoded(PALETTE, "PNG"), RED),
        (encoded(RGB_IMAGE, "WEBP", lossless=True), RED),
        (encoded(RGB_IMAGE, "WEBP", quality=100), RED),
        (encoded(Image.new("1", (7, 5), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("LA", (7, 5), (99, 255)), "PNG"), (99, 99, 99)),
        (encoded(Image.new("RGBA", (7, 5), (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (7, 5), (0, 100, 200, 128)), "PNG"), (127, 177, 227)),
        (encoded(Image.new("RGBA", (7, 5), (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
        (encoded(PALETTE, "PNG", transparency=PALETTE.getpixel((0, 0))), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((5, 7), 25700, np.uint16)), "PNG"), (100, 100, 100)),
        (encoded(RGB_IMAGE, "PNG", save_all=True, append_images=[Image.new("RGB", (7, 5))]), RED),
        (encoded(RGB_IMAGE, "WEBP", save_all=True, append_images=[Image.new("RGB", (7, 5))]), RED),
    ],
)
def test_every_kind_of_image_becomes_the_rgb_it_stands_for(data: bytes, color: tuple[int, int, int]) -> None:
    pixels = decode(data)
    assert image_size(data) == pixels.shape[:2] == (5, 7)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - color).max() <= 4


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(RGB_IMAGE, "JPEG", exif=exif)).shape == (5, 7, 3)


GOOD_JPEG = jpeg(1, 200, 300)
GOOD_PNG = encoded(Image.fromarray(decode(GOOD_JPEG)), "PNG")
GOOD_WEBP = encoded(Image.fromarray(decode(GOOD_JPEG)), "WEBP")


def corrupted(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0x5A for byte in data[middle : middle + 20]) + data[middle + 20 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "unknown_format"),
        (b"GIF89a" + bytes(20), "unknown_format"),
        (np.random.default_rng(0).bytes(1000), "unknown_format"),
        (GOOD_JPEG[:-2], "damaged"),
        (GOOD_JPEG[: len(GOOD_JPEG) // 2], "damaged"),
        (GOOD_JPEG[:10], "damaged"),
        (corrupted(GOOD_JPEG), "damaged"),
        (GOOD_PNG[: len(GOOD_PNG) // 2], "damaged"),
        (GOOD_PNG[:20], "damaged"),
        (corrupted(GOOD_PNG), "damaged"),
        (GOOD_WEBP[: len(GOOD_WEBP) // 2], "damaged"),
        (GOOD_WEBP[:20], "damaged"),
        (png_claiming(0, 5), "damaged"),
        (png_claiming(100, 100), "damaged"),
    ],
)
def test_bad_images_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "data",
    [
        png_claiming(20_000, 20_000),
        png_claiming(8_000, 8_000),
        png_claiming(20_000, 1),
        jpeg_claiming(60_000, 60_000),
        b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + b"\xff\xff\x0f\xff\xff\x0f",
    ],
)
def test_an_image_that_claims_too_many_pixels_costs_no_memory(data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason == "too_large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(3, 5, 120, 90), (0, 0, 200, 300), (190, 290, 10, 10), (7, 9, 1, 180)])
def test_a_crop_equals_torchvisions(box: tuple[int, ...], interpolation: str) -> None:
    image = decode(GOOD_JPEG)
    crop = crop_resize(image, box, 64, interpolation)
    channels_first = torch.from_numpy(image).permute(2, 0, 1)
    reference = resized_crop(
        channels_first, *box, [64, 64], interpolation=InterpolationMode(interpolation), antialias=True
    )
    assert crop.dtype == torch.uint8
    assert torch.equal(crop, reference.permute(1, 2, 0))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1)])
def test_images_of_extreme_shape_are_cropped(height: int, width: int) -> None:
    image = np.full((height, width, 3), 77, dtype=np.uint8)
    assert (crop_resize(image, (0, 0, height, width), 8, "bicubic") == 77).all()
