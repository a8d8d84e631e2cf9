"""Bare loops, and this project's loader, for `benchmarks/data.py`; see there.

A bare loop is what the cores can do with nothing around it: encoded images in memory, crops chosen
beforehand, results dropped.
"""

from __future__ import annotations

import argparse
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from data_turns import BATCH_SIZE, MEAN, SCALE, SIZE_PX, STD, Make, Source, Stream, pin, serve

from pretrain.data.decode import crop_resize, decode, image_size
from pretrain.data.loader import DataConfig, open_batches
from pretrain.data.manifest import Manifest
from pretrain.views.plan import BlurConfig, JitterConfig, PatchConfig, ViewConfig, crop_boxes
from pretrain.views.prepare import Recipe, prepare

SEED = 0
IMAGES_PER_TASK = 4
CIFAR_BATCH_SIZE = 256


def simclr_view(size_px: int = SIZE_PX) -> ViewConfig:
    """What the peers' transform asks for, in our words."""
    return ViewConfig(
        size_px=size_px,
        scale=SCALE,
        interpolation="bilinear",  # torchvision's default
        jitter=JitterConfig(prob=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        gray_prob=0.2,
        blur=BlurConfig(prob=0.5, sigma_px=(0.1, 2.0)),
        corrupt=False,
    )


def _in_threads(
    work: Callable[[int], object], num_images: int, num_threads: int
) -> Iterator[tuple[int, Any]]:
    """Do `work` on image after image, endlessly and without a pause at the end of a batch."""
    torch.set_num_threads(1)
    places = itertools.cycle(range(num_images))

    def task(chosen: list[int]) -> None:
        for place in chosen:
            work(place)

    begun: deque[Future[None]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            for _ in range(BATCH_SIZE // IMAGES_PER_TASK):
                while len(begun) < 4 * num_threads:
                    begun.append(pool.submit(task, list(itertools.islice(places, IMAGES_PER_TASK))))
                begun.popleft().result()
            yield BATCH_SIZE, None


def _encoded(source: Source) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(source.images).glob("*/*.jpg"))]


def bare_decode(source: Source) -> Callable[[], Stream]:
    images = _encoded(source)
    return lambda: Stream(_in_threads(lambda i: decode(images[i]), len(images), source.num_cores), even=False)


def bare_loop(source: Source) -> Callable[[], Stream]:
    images = _encoded(source)
    view = simclr_view()
    ids = torch.arange(len(images))
    heights, widths = torch.tensor([image_size(image) for image in images]).unbind(1)
    boxes = [
        crop_boxes(view, SEED, torch.zeros_like(ids), ids, index, heights, widths).tolist()
        for index in (0, 1)
    ]

    def work(place: int) -> None:
        pixels = decode(images[place])
        for of_view in boxes:
            crop_resize(pixels, of_view[place], view.size_px, view.interpolation)

    return lambda: Stream(_in_threads(work, len(images), source.num_cores), even=False)


def _lanes(num_samples: int, batch_size: int) -> int:
    """As many distant places as 16 images a lane allow, up to 8."""
    return next(lanes for lanes in (8, 4, 2, 1) if num_samples >= 16 * lanes and batch_size % lanes == 0)


def _opened(
    folder: str, view: ViewConfig, batch_size: int, num_threads: int, resident: bool = False
) -> Iterator[Any]:
    split = Manifest.load(Path(folder)).split("train")
    config = DataConfig(
        shards=folder,
        lanes=_lanes(split.num_samples, batch_size),
        decode_threads=num_threads,
        resident=resident,
        max_bad_ratio=0.0,
    )
    return iter(open_batches(config, [split], [view, view], seed=SEED, batch_size=batch_size))


def _batch_size(folder: str, most: int) -> int:
    """`most`, or for a tiny set what it can fill."""
    num_samples = Manifest.load(Path(folder)).split("train").num_samples
    return min(most, 2 ** (num_samples.bit_length() - 1))


def _crops(batches: Iterator[Any], batch_size: int) -> Iterator[tuple[int, Any]]:
    return ((batch_size, batch.crops[0]) for batch in batches)


def loader(source: Source) -> Callable[[], Stream]:
    def start() -> Stream:
        batch_size = _batch_size(source.shards, BATCH_SIZE)
        batches = _opened(source.shards, simclr_view(), batch_size, source.num_cores)
        return Stream(_crops(batches, batch_size), even=False)

    return start


def finished(source: Source) -> Callable[[], Stream]:
    def start() -> Stream:
        torch.set_num_threads(source.num_cores)
        view, batch_size = simclr_view(), _batch_size(source.shards, BATCH_SIZE)
        recipe = Recipe({"one": view, "two": view}, PatchConfig((1, 1), SIZE_PX), MEAN, STD)
        batches = _opened(source.shards, view, batch_size, source.num_cores)
        images = (
            prepare(recipe, SEED, batch.crops[0], batch.epochs, batch.sample_ids).images for batch in batches
        )
        return Stream(((batch_size, views.unflatten(0, (2, -1))) for views in images), even=False)

    return start


def cifar(resident: bool) -> Make:
    def make(source: Source) -> Callable[[], Stream]:
        def start() -> Stream:
            torch.set_num_threads(source.num_cores)
            batch_size = _batch_size(source.cifar, CIFAR_BATCH_SIZE)
            batches = _opened(source.cifar, simclr_view(32), batch_size, source.num_cores, resident)
            return Stream(_crops(batches, batch_size), even=False)

        return start

    return make


VARIANTS: dict[str, Make] = {
    "bare-decode": bare_decode,
    "bare-loop": bare_loop,
    "loader": loader,
    "finished": finished,
    "cifar-stream": cifar(resident=False),
    "cifar-resident": cifar(resident=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    for name in ("shards", "cifar", "images", "tars", "work"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--num-cores", type=int, default=2)
    arguments = vars(parser.parse_args())
    make = VARIANTS[arguments.pop("variant")]
    source = Source(**arguments)
    pin(source.num_cores)
    serve(make, source)


if __name__ == "__main__":
    main()
