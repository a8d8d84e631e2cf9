from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from images import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    chunk,
    corrupted,
    encoded,
    exif,
    interlaced_png,
    jpeg_claiming,
    picture,
    png,
    png_claiming,
    png_of_zeros,
    with_segment,
    without_segment,
)
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from pretrain.data.decode import BadImage, crop_resize, decode, image_size, scale_box, shrink_for

Color = tuple[int, int, int]
RED = (200, 30, 40)
RGB_IMAGE = Image.new("RGB", (7, 5), RED)
BLACK = Image.new("RGB", (7, 5))
PALETTE_IMAGE = RGB_IMAGE.quantize(4)
CMYK_JPEG = encoded(Image.new("CMYK", (7, 5), (0, 217, 204, 55)), "JPEG", quality=100)


def flat_png(depth: int, color: int, samples: tuple[int, ...], *before: bytes) -> bytes:
    """A PNG of 7 x 5 px of one colour, packed by hand."""
    bits = "".join(f"{sample:0{depth}b}" for sample in samples) * 7
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return png(7, 5, depth, color, [row] * 5, before)


def transparent(*samples: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))


COLORS = chunk(b"PLTE", bytes((0, 0, 0, *RED)))

# Laid over grey of 128 by hand: 255 * color = alpha * color + (255 - alpha) * 128.
# CMYK (0, 217, 204, 55): 255 * red = 255 * 200, 255 * green = 38 * 200, 255 * blue = 51 * 200.
GOLDEN: dict[str, tuple[bytes, Color]] = {
    "jpeg": (encoded(RGB_IMAGE, "JPEG", quality=100), RED),
    "jpeg progressive": (encoded(RGB_IMAGE, "JPEG", quality=100, progressive=True), RED),
    "jpeg subsampled": (encoded(RGB_IMAGE, "JPEG", quality=100, subsampling="4:2:0"), RED),
    "jpeg stored as rgb": (encoded(RGB_IMAGE, "JPEG", quality=100, keep_rgb=True), RED),
    "jpeg grey": (encoded(Image.new("L", (7, 5), 99), "JPEG"), (99, 99, 99)),
    "jpeg cmyk, inverted": (CMYK_JPEG, (200, 30, 40)),
    # without Adobe's mark the same numbers are ink: 255 - (255, 38, 51) and K = 200 leave almost no light
    "jpeg cmyk, plain": (without_segment(CMYK_JPEG, 0xEE), (0, 47, 44)),
    "jpeg and something behind": (encoded(RGB_IMAGE, "JPEG", quality=100) + b"\xff\xd8\xff more", RED),
    "png": (encoded(RGB_IMAGE, "PNG"), RED),
    "png interlaced": (interlaced_png(np.full((5, 7, 3), RED, np.uint8)), RED),
    "png and something behind": (encoded(RGB_IMAGE, "PNG") + b"more", RED),
    "png 1 bit": (flat_png(1, GREY, (1,)), (255, 255, 255)),
    "png 2 bits": (flat_png(2, GREY, (2,)), (170, 170, 170)),
    "png 4 bits": (flat_png(4, GREY, (3,)), (51, 51, 51)),
    "png 1 bit, key": (flat_png(1, GREY, (1,), transparent(1)), (128, 128, 128)),
    "png 2 bits, key": (flat_png(2, GREY, (2,), transparent(2)), (128, 128, 128)),
    "png 2 bits, other key": (flat_png(2, GREY, (2,), transparent(1)), (170, 170, 170)),
    "png 4 bits, key": (flat_png(4, GREY, (3,), transparent(3)), (128, 128, 128)),
    "png grey": (flat_png(8, GREY, (99,)), (99, 99, 99)),
    "png grey, key": (flat_png(8, GREY, (99,), transparent(99)), (128, 128, 128)),
    "png grey, other key": (flat_png(8, GREY, (99,), transparent(98)), (99, 99, 99)),
    "png rgb, key": (flat_png(8, RGB, RED, transparent(*RED)), (128, 128, 128)),
    "png grey, alpha": (flat_png(8, GREY_ALPHA, (228, 51)), (148, 148, 148)),
    "png rgb, alpha": (flat_png(8, RGBA, (0, 100, 200, 128)), (64, 114, 164)),
    "png clear": (flat_png(8, RGBA, (*RED, 0)), (128, 128, 128)),
    "png palette": (flat_png(1, PALETTE, (1,), COLORS), RED),
    "png palette of 8 bits": (encoded(PALETTE_IMAGE, "PNG"), RED),
    "png palette, alpha": (flat_png(1, PALETTE, (1,), COLORS, chunk(b"tRNS", b"\xff\x80")), (164, 79, 84)),
    "png palette, clear": (flat_png(1, PALETTE, (1,), COLORS, chunk(b"tRNS", b"\xff\0")), (128, 128, 128)),
    "png grey of 16 bits": (flat_png(16, GREY, (25700,)), (100, 100, 100)),
    "png white of 16 bits": (flat_png(16, GREY, (65535,)), (255, 255, 255)),
    "png grey of 16 bits, key": (flat_png(16, GREY, (25700,), transparent(25700)), (100, 100, 100)),
    "png grey of 16 bits, alpha": (flat_png(16, GREY_ALPHA, (228 * 257, 51 * 257)), (148, 148, 148)),
    "png rgb of 16 bits": (flat_png(16, RGB, (200 * 257, 30 * 257, 40 * 257)), RED),
    "png rgb of 16 bits, key": (flat_png(16, RGB, (65535,) * 3, transparent(300, 400, 500)), (255, 255, 255)),
    # equal to the key only in 8 bits
    "png rgb of 16 bits, other key": (
        flat_png(16, RGB, (200 * 257, 30 * 257, 40 * 257), transparent(*RED)),
        RED,
    ),
    "png rgb of 16 bits, alpha": (flat_png(16, RGBA, (0, 100 * 257, 200 * 257, 128 * 257)), (64, 114, 164)),
    "png animated": (encoded(RGB_IMAGE, "PNG", save_all=True, append_images=[BLACK]), RED),
    "png animated, default image": (
        encoded(RGB_IMAGE, "PNG", save_all=True, default_image=True, append_images=[BLACK, RGB_IMAGE]),
        RED,
    ),
    "webp": (encoded(RGB_IMAGE, "WEBP", quality=100), RED),
    "webp lossless": (encoded(RGB_IMAGE, "WEBP", lossless=True), RED),
    "webp alpha": (
        encoded(Image.new("RGBA", (7, 5), (0, 100, 200, 128)), "WEBP", lossless=True),
        (64, 114, 164),
    ),
    "webp lossy, alpha": (
        encoded(Image.new("RGBA", (7, 5), (0, 100, 200, 128)), "WEBP", quality=100),
        (64, 114, 164),
    ),
    "webp clear": (encoded(Image.new("RGBA", (7, 5), (*RED, 0)), "WEBP", lossless=True), (128, 128, 128)),
    "webp animated": (encoded(RGB_IMAGE, "WEBP", save_all=True, append_images=[BLACK]), RED),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_every_kind_of_image_becomes_the_rgb_it_stands_for(kind: str) -> None:
    data, color = GOLDEN[kind]
    pixels = decode(data)
    assert image_size(data) == pixels.shape[:2] == (5, 7)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    is_lossy = kind.startswith("jpeg") or "lossy" in kind or kind in ("webp", "webp animated")
    assert np.abs(pixels.astype(int) - color).max() <= (3 if is_lossy else 0)


def test_an_interlaced_png_is_the_plain_one() -> None:
    pixels = np.asarray(picture(13, 11))
    assert (decode(interlaced_png(pixels)) == pixels).all()


ASYMMETRIC = picture(11, 17, seed=3)


def oriented(kind: str, orientation: int) -> bytes:
    block = exif(orientation)
    if kind == "JPEG":
        return with_segment(encoded(ASYMMETRIC, "JPEG", quality=100), 0xE1, b"Exif\0\0" + block)
    return encoded(ASYMMETRIC, kind, exif=block, lossless=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_turned_image_is_shown_upright_as_pillow_would(kind: str, orientation: int) -> None:
    data = oriented(kind, orientation)
    with Image.open(io.BytesIO(data)) as image:
        reference = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    pixels = decode(data)
    assert pixels.shape == reference.shape
    assert image_size(data) == pixels.shape[:2] == ((11, 17) if orientation < 5 else (17, 11))
    assert pixels.flags.c_contiguous
    assert np.abs(pixels - reference).max() <= (2 if kind == "JPEG" else 0)
    upright = np.asarray(ASYMMETRIC).astype(int)
    assert orientation == 1 or pixels.shape != upright.shape or np.abs(pixels - upright).max() > 20


PHOTO = picture(90, 120)
GOOD_JPEG = encoded(PHOTO, "JPEG", quality=90)
GOOD_PROGRESSIVE = encoded(PHOTO, "JPEG", quality=90, progressive=True)
GOOD_RESTARTS = encoded(PHOTO, "JPEG", quality=90, restart_marker_blocks=8)
GOOD_PNG = encoded(PHOTO, "PNG")
GOOD_WEBP = encoded(PHOTO, "WEBP")
GOOD_LOSSLESS = encoded(picture(20, 30), "WEBP", lossless=True)


def reason_to_refuse(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data)
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "unknown_format"),
        (encoded(RGB_IMAGE, "GIF"), "unknown_format"),
        (encoded(RGB_IMAGE, "BMP"), "unknown_format"),
        (encoded(RGB_IMAGE, "TIFF"), "unknown_format"),
        (b"\xff\xd8", "unknown_format"),
        (b"RIFF\x24\0\0\0WAVE" + bytes(40), "unknown_format"),
        (np.random.default_rng(0).bytes(1000), "unknown_format"),
        (flat_png(1, PALETTE, (1,)), "damaged"),
        (flat_png(1, PALETTE, (1,), chunk(b"IDAT", b""), COLORS), "damaged"),
        (flat_png(1, PALETTE, (1,)).replace(b"IDAT", b"IDAX"), "damaged"),
        (png_claiming(0, 5), "damaged"),
        (png_claiming(100, 100), "damaged"),
        (jpeg_claiming(0, 5), "damaged"),
        (jpeg_claiming(100, 100), "damaged"),
        (jpeg_claiming(60_000, 1), "too_large"),
        (png_claiming(16_385, 1), "too_large"),
        (png_claiming(1, 16_385), "too_large"),
        (png_claiming(8_000, 8_000), "too_large"),
    ],
)
def test_bad_images_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    assert reason_to_refuse(data) == reason


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(20, 30), "JPEG"),
        encoded(picture(20, 30), "JPEG", progressive=True),
        encoded(picture(20, 30), "JPEG", restart_marker_blocks=1),
        encoded(picture(20, 30), "PNG", exif=exif(6)),
        encoded(picture(20, 30), "WEBP"),
        encoded(picture(20, 30), "WEBP", exif=exif(6)),
        GOOD_LOSSLESS,
    ],
    ids=["jpeg", "progressive", "restarts", "png", "webp", "webp with exif", "lossless webp"],
)
def test_an_image_cut_anywhere_is_refused(data: bytes) -> None:
    decode(data)
    reasons = [reason_to_refuse(data[:length]) for length in range(len(data))]
    assert set(reasons) == {"empty", "unknown_format", "damaged"}
    assert set(reasons[16:]) == {"damaged"}


def test_any_wrong_byte_of_a_png_is_seen() -> None:
    data = encoded(picture(5, 7), "PNG", exif=exif(1), dpi=(72, 72))
    decode(data)
    for place in range(len(data)):
        reason_to_refuse(corrupted(data, place, num_bytes=1))


@pytest.mark.parametrize(
    ("good", "least_ratio"),
    [(GOOD_JPEG, 0.5), (GOOD_PROGRESSIVE, 0.6), (GOOD_RESTARTS, 0.5), (GOOD_PNG, 1.0)],
    ids=["jpeg", "progressive", "restarts", "png"],
)
def test_most_wrong_bytes_amid_the_pixels_are_seen(good: bytes, least_ratio: float) -> None:
    """Not all: a stream can stay valid with other pixels in it, which only a hash of the bytes can tell."""
    start = good.index(b"\xff\xda") + 14 if good.startswith(b"\xff\xd8") else 100
    num_seen = 0
    for place in np.linspace(start, len(good) - 25, 100).astype(int):
        try:
            assert decode(corrupted(good, place)).shape == (90, 120, 3)
        except BadImage as bad:
            num_seen += bad.reason == "damaged"
    assert num_seen >= 100 * least_ratio


@pytest.mark.parametrize(
    "good", [GOOD_JPEG, GOOD_PROGRESSIVE, GOOD_RESTARTS, GOOD_PNG, GOOD_WEBP, GOOD_LOSSLESS]
)
def test_a_mangled_image_is_decoded_to_its_size_or_refused(good: bytes) -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        place = int(rng.integers(len(good)) if rng.random() < 0.5 else rng.integers(60))
        data = good[:place] + rng.bytes(int(rng.integers(1, 8))) + good[place + int(rng.integers(0, 8)) :]
        try:
            size = image_size(data, max_pixels=10**6)
            assert decode(data, max_pixels=10**6).shape == (*size, 3)
        except BadImage:
            pass


def test_the_limit_of_pixels_is_the_callers() -> None:
    for data in (encoded(RGB_IMAGE, "JPEG"), encoded(RGB_IMAGE, "PNG"), encoded(RGB_IMAGE, "WEBP")):
        assert decode(data, max_pixels=35).shape == (5, 7, 3)
        assert image_size(data, max_pixels=35) == (5, 7)
        for refusing in (image_size, decode):
            with pytest.raises(BadImage, match="too_large"):
                refusing(data, max_pixels=34)


def test_pillows_own_limit_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # it warns above this and refuses above twice this
    for kind in ("PNG", "WEBP"):
        assert decode(encoded(RGB_IMAGE, kind)).shape == (5, 7, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(encoded(RGB_IMAGE, "PNG")).shape == (5, 7, 3)
    assert reason_to_refuse(encoded(RGB_IMAGE, "WEBP")) == "too_large"


# In a process of its own, where memory can be limited: this much over what it holds once all is imported.
WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from pretrain.data.decode import BadImage, decode
held_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held_bytes + (64 << 20), -1))
for name in sys.argv[1:]:
    try:
        print(Path(name).name, decode(Path(name).read_bytes()).shape)
    except BadImage as bad:
        print(Path(name).name, bad.reason)
    except MemoryError:
        print(Path(name).name, "out of memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_bombs_cost_less_than_64_mb(tmp_path: Path) -> None:
    zeros = zlib.compress(bytes(100 << 20))
    rows = [bytes(21)] * 5
    garbage = np.random.default_rng(0).bytes(65_000)
    tags = b"II*\0" + struct.pack("<IH", 8, 0xFFFF) + garbage[:60_000]
    bombs = {
        "png-12000": (png_of_zeros(12_000), "too_large"),
        "png-20000": (png_of_zeros(20_000), "too_large"),
        "jpeg-60000": (jpeg_claiming(60_000, 60_000), "too_large"),
        "webp-16777216": (b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + b"\xff" * 6, "too_large"),
        "png-zTXt": (png(7, 5, 8, RGB, rows, [chunk(b"zTXt", b"a\0\0" + zeros)]), "(5, 7, 3)"),
        "png-iTXt": (png(7, 5, 8, RGB, rows, [chunk(b"iTXt", b"a\0\1\0\0\0" + zeros)]), "(5, 7, 3)"),
        "png-iCCP": (png(7, 5, 8, RGB, rows, [chunk(b"iCCP", b"a\0\0" + zeros)]), "(5, 7, 3)"),
        "png-late": (png(7, 5, 8, RGB, rows, after=[chunk(b"zTXt", b"a\0\0" + zeros)]), "(5, 7, 3)"),
        "png-pixels": (png(7, 5, 8, RGB, [*rows, bytes(100 << 20)]), "(5, 7, 3)"),
        "jpeg-exif": (with_segment(GOOD_JPEG, 0xE1, b"Exif\0\0" + tags), "(90, 120, 3)"),
        "jpeg-garbage": (with_segment(GOOD_JPEG, 0xE1, b"Exif\0\0" + garbage), "(90, 120, 3)"),
        # the limit is real: an honest image of 49 megapixels does not fit into it
        "honest": (png_of_zeros(7_000), "out of memory"),
    }
    for name, (data, _) in bombs.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in bombs]
    ran = subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY, *paths], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == [f"{name} {result}" for name, (_, result) in bombs.items()]
    assert ran.stderr == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1)])
def test_images_of_extreme_shape_are_decoded_and_cropped(height: int, width: int, kind: str) -> None:
    data = encoded(Image.new("RGB", (width, height), (77, 77, 77)), kind)
    for shrink in (1, 8):
        image = decode(data, shrink)
        box = scale_box((0, 0, height, width), (height, width), image.shape[:2])
        assert box[2:] == image.shape[:2]
        assert (np.abs(crop_resize(image, box, 8, "bicubic") - 77.0) <= 2).all()


def test_many_threads_decode_as_one_does() -> None:
    images = [data for data, _ in GOLDEN.values()] * 4 + [
        GOOD_JPEG,
        GOOD_PROGRESSIVE,
        GOOD_PNG,
        GOOD_WEBP,
    ] * 8
    with ThreadPoolExecutor(8) as threads:
        at_once = list(threads.map(decode, images))
    assert all((pixels == decode(data)).all() for pixels, data in zip(at_once, images, strict=True))


LARGE = picture(600, 800)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decoding_lets_other_threads_run(kind: str) -> None:
    data = encoded(LARGE, kind)

    def seen_while_decoding() -> bool:
        started, finished = threading.Event(), threading.Event()

        def work() -> None:
            started.set()
            decode(data)
            finished.set()

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        seen = not finished.is_set()
        thread.join()
        return seen

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # from here on a thread runs until it gives way by itself
    try:
        assert any(seen_while_decoding() for _ in range(20))
    finally:
        sys.setswitchinterval(usual)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_a_jpeg_shrinks_to_exactly_its_share(shrink: int, orientation: int) -> None:
    for height, width in [(1, 1), (1, 40), (16, 16), (17, 33), (90, 7), (63, 65)]:
        jpeg = encoded(Image.new("RGB", (width, height), RED), "JPEG", quality=100)
        data = with_segment(jpeg, 0xE1, b"Exif\0\0" + exif(orientation))
        full_height, full_width = image_size(data)
        pixels = decode(data, shrink)
        assert pixels.shape == (-(-full_height // shrink), -(-full_width // shrink), 3)
        assert np.abs(pixels.astype(int) - RED).max() <= 3


def test_what_is_not_jpeg_does_not_shrink() -> None:
    for data in (GOOD_PNG, GOOD_WEBP):
        assert (decode(data, 4) == decode(data)).all()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("shrink", [2, 4])
@pytest.mark.parametrize(
    ("box", "limit"),
    [
        ((0, 0, 600, 800), 0.3),
        ((40, 80, 400, 480), 0.3),
        # its edges fall within px of the shrunk image, so it moves by up to a quarter of a px of the crop
        ((91, 137, 433, 519), 0.8),
    ],
)
def test_a_crop_of_the_shrunk_image_is_the_crop_within_a_grey_level(
    box: tuple[int, ...], limit: float, shrink: int, progressive: bool
) -> None:
    data = encoded(LARGE, "JPEG", quality=90, progressive=progressive)
    full, shrunk = decode(data), decode(data, shrink)
    size_px = min(box[2:]) // (2 * shrink)
    assert shrink_for([box], [size_px]) == shrink
    reference = crop_resize(full, box, size_px, "bicubic").astype(np.float32)
    crop = crop_resize(shrunk, scale_box(box, (600, 800), shrunk.shape[:2]), size_px, "bicubic")
    assert np.abs(crop - reference).mean() < limit


def test_the_shrink_leaves_every_crop_twice_its_size() -> None:
    assert shrink_for([(0, 0, 500, 375)], [224]) == 1
    assert shrink_for([(5, 9, 896, 896)], [224]) == 2  # 896 / 2 = 2 x 224
    assert shrink_for([(5, 9, 895, 4000)], [224]) == 1
    assert shrink_for([(0, 0, 3000, 4000), (0, 0, 900, 900)], [224, 96]) == 4  # 900 / 4 = 225 > 2 x 96
    assert shrink_for([(0, 0, 9000, 9000)], [32]) == 8
    assert shrink_for([(0, 0, 9000, 9000), (0, 0, 9000, 1)], [32, 32]) == 1


@pytest.mark.parametrize("full", [(600, 800), (601, 799), (31, 1000)])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_a_scaled_box_holds_the_same_part_of_the_image(shrink: int, full: tuple[int, int]) -> None:
    shrunk = (-(-full[0] // shrink), -(-full[1] // shrink))
    assert scale_box((0, 0, *full), full, shrunk) == (0, 0, *shrunk)
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left = (int(rng.integers(side)) for side in full)
        height, width = int(rng.integers(1, full[0] - top + 1)), int(rng.integers(1, full[1] - left + 1))
        scaled = scale_box((top, left, height, width), full, shrunk)
        begins, ends = np.array(scaled[:2]), np.array(scaled[:2]) + scaled[2:]
        assert (begins >= 0).all()
        assert (ends > begins).all()
        assert (ends <= shrunk).all()
        if min(height, width) >= 2 * shrink:  # smaller ones are widened to a px
            assert np.abs(begins - np.array((top, left)) / shrink).max() <= 0.5
            assert np.abs(ends - np.array((top + height, left + width)) / shrink).max() < 1
    aligned = tuple(shrink * number for number in (1, 2, 3, 4))
    assert scale_box(aligned, (64, 64), (64 // shrink, 64 // shrink)) == (1, 2, 3, 4)


BOXES = [(3, 5, 120, 90), (0, 0, 600, 800), (590, 790, 10, 10), (7, 9, 1, 180)]


def by_torchvision(image: np.ndarray, box: tuple[int, ...], interpolation: str) -> torch.Tensor:
    channels_first = torch.from_numpy(image).permute(2, 0, 1)
    crop = resized_crop(
        channels_first, *box, [64, 64], interpolation=InterpolationMode(interpolation), antialias=True
    )
    return crop.permute(1, 2, 0)


def by_pillow(image: np.ndarray, box: tuple[int, ...], interpolation: str) -> torch.Tensor:
    top, left, height, width = box
    cut = Image.fromarray(image[top : top + height, left : left + width])
    return torch.from_numpy(np.array(cut.resize((64, 64), Image.Resampling[interpolation.upper()])))


@pytest.mark.parametrize(("reference", "limit"), [(by_torchvision, 0), (by_pillow, 2)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", BOXES)
def test_a_crop_equals_torchvisions_and_pillows(
    box: tuple[int, ...],
    interpolation: str,
    reference: Callable[[np.ndarray, tuple[int, ...], str], torch.Tensor],
    limit: int,
) -> None:
    image = np.asarray(LARGE).copy()
    crop = crop_resize(image, box, 64, interpolation)
    assert crop.dtype == np.uint8
    assert (torch.from_numpy(crop).int() - reference(image, box, interpolation).int()).abs().max() <= limit
