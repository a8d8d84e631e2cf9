"""Other people's loaders on the same images, for `benchmarks/data.py`; see there for how to install them.

Each makes what SimCLR's transform asks for: two views of 224 px of one decoded image as normalised float32,
in batches of 64. Epochs are endless where the library lets them be, so that no worker restarts in a turn.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data_turns import BATCH_SIZE, MEAN, SCALE, SIZE_PX, STD, Make, Source, Stream, pin, serve

ENDLESS = 1 << 30
Transform = Callable[[Any], Any]
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}


def pil_transform() -> Transform:
    """SimCLR's view as torchvision's first transforms make it, from a PIL image."""
    from torchvision import transforms as v1

    return v1.Compose(
        [
            v1.RandomResizedCrop(SIZE_PX, scale=SCALE),
            v1.RandomHorizontalFlip(),
            v1.RandomApply([v1.ColorJitter(**JITTER)], p=0.8),
            v1.RandomGrayscale(0.2),
            v1.RandomApply([v1.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )


def uint8_transform() -> Transform:
    """The same with torchvision's second transforms, from a uint8 tensor (3, H, W)."""
    import torch
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE_PX, scale=SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(**JITTER)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


class TwoViews:
    """One view and another of the same image; a class, so that workers may be sent it."""

    def __init__(
        self, transform: Transform, decode: Transform | None = None, field: str | None = None
    ) -> None:
        self.transform, self.decode, self.field = transform, decode, field

    def __call__(self, image: Any) -> tuple[Any, Any]:
        if self.field is not None:
            image = image[self.field]
        if self.decode is not None:
            image = self.decode(image)
        return self.transform(image), self.transform(image)


def decode_pil(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def decode_tensor(data: bytes) -> Any:
    """With torchvision's libjpeg-turbo, uint8 (3, H, W)."""
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.from_numpy(np.frombuffer(data, np.uint8).copy()), mode=ImageReadMode.RGB)


def read_tensor(path: str) -> Any:
    return decode_tensor(Path(path).read_bytes())


def _data_loader(
    dataset: Any, num_workers: int, is_map: bool = True, batch_size: int | None = BATCH_SIZE
) -> Any:
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=True, num_samples=ENDLESS) if is_map else None
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=batch_size is not None,
        persistent_workers=True,
    )


def _views(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Batches of (views, ...) or of the two views themselves."""
    for batch in batches:
        views = batch[0] if isinstance(batch[0], tuple | list) else batch
        yield len(views[0]), tuple(views[:2])


def _again(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _files(source: Source) -> list[str]:
    return sorted(str(path) for path in Path(source.images).glob("*/*.jpg"))


def _shard_paths(source: Source) -> list[str]:
    return sorted(str(path) for path in Path(source.tars).iterdir())


def _simple(loader: Callable[[Source], Iterable[Any]]) -> Make:
    """Of a function that opens a loader of two views: nothing to prepare."""

    def make(source: Source) -> Callable[[], Stream]:
        return lambda: Stream(_views(_again(loader(source))))

    return make


# --- loaders on the files as they are


def torchvision_pil(source: Source) -> Iterable[Any]:
    from torchvision.datasets import ImageFolder

    return _data_loader(ImageFolder(source.images, TwoViews(pil_transform())), source.num_cores)


def torchvision_v2(source: Source) -> Iterable[Any]:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(source.images, TwoViews(uint8_transform()), loader=read_tensor)
    return _data_loader(dataset, source.num_cores)


def timm_loader(source: Source) -> Iterable[Any]:
    """timm's folder reader and its own augmentation, as its training script writes it, once for each view."""
    from timm.data import create_dataset, create_transform

    transform = create_transform(
        SIZE_PX,
        is_training=True,
        scale=SCALE,
        interpolation="bilinear",
        color_jitter=(0.8, 0.8, 0.8, 0.2),
        color_jitter_prob=0.8,
        grayscale_prob=0.2,
        gaussian_blur_prob=0.5,
        mean=MEAN,
        std=STD,
    )
    dataset = create_dataset("", root=source.images, transform=TwoViews(transform))
    return _data_loader(dataset, source.num_cores)


def lightly_loader(source: Source) -> Iterable[Any]:
    from lightly.transforms import SimCLRTransform
    from torchvision.datasets import ImageFolder

    transform = SimCLRTransform(SIZE_PX, cj_strength=1.0, min_scale=SCALE[0], gaussian_blur=0.5)
    return _data_loader(ImageFolder(source.images, transform), source.num_cores)


def torchdata_nodes(source: Source) -> Iterable[Any]:
    from torch.utils.data import default_collate
    from torchdata.nodes import Batcher, IterableWrapper, Loader, ParallelMapper

    def paths() -> Iterator[str]:
        files = _files(source)
        while True:
            yield from random.sample(files, len(files))

    views = TwoViews(uint8_transform(), read_tensor)
    node = ParallelMapper(IterableWrapper(paths()), views, source.num_cores, method="process", in_order=False)
    return (default_collate(batch) for batch in Loader(Batcher(node, BATCH_SIZE)))


def spdl_pipeline(source: Source) -> Iterable[Any]:
    """SPDL's threads around torchvision's decoder and transforms; its own decoder wants FFmpeg."""
    import torch
    from spdl.pipeline import PipelineBuilder
    from torch.utils.data import default_collate

    transform = uint8_transform()
    torch.set_num_threads(1)

    def paths() -> Iterator[str]:
        files = _files(source)
        while True:
            yield from random.sample(files, len(files))

    def work(path: str) -> Any:
        pixels = read_tensor(path)
        return transform(pixels), transform(pixels)

    builder = PipelineBuilder().add_source(paths()).pipe(work, concurrency=source.num_cores)
    pipeline = (
        builder.aggregate(BATCH_SIZE).pipe(default_collate).add_sink(3).build(num_threads=source.num_cores)
    )

    def batches() -> Iterator[Any]:
        with pipeline.auto_stop():
            yield from pipeline

    return batches()


def grain_loader(source: Source) -> Iterable[Any]:
    import sys

    import grain
    from absl import flags

    flags.FLAGS(sys.argv[:1], known_only=True)
    views = TwoViews(uint8_transform(), read_tensor)
    dataset = grain.MapDataset.source(_files(source)).shuffle(seed=0).repeat()
    dataset = dataset.map(GrainViews(views)).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    )
    options = grain.multiprocessing.MultiprocessingOptions(source.num_cores, per_worker_buffer_size=1)
    return dataset.batch(BATCH_SIZE, drop_remainder=True).mp_prefetch(options)


class GrainViews:
    """Grain batches numpy arrays."""

    def __init__(self, views: TwoViews) -> None:
        self.views = views

    def __call__(self, path: str) -> tuple[Any, Any]:
        one, two = self.views(path)
        return one.numpy(), two.numpy()


# --- loaders on tar shards


def webdataset_loader(source: Source) -> Iterable[Any]:
    import webdataset

    dataset = (
        webdataset.WebDataset(_shard_paths(source), resampled=True, shardshuffle=False)
        .shuffle(100)
        .decode("pil")
        .to_tuple("jpg")
        .map(TwoViews(pil_transform(), field=0))  # type: ignore[arg-type]
    )
    return _data_loader(dataset.batched(BATCH_SIZE, partial=False), source.num_cores, False, None)


def hf_datasets(source: Source) -> Iterable[Any]:
    import datasets

    files = {"train": _shard_paths(source)}
    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    stream = (
        stream.cast_column("jpg", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=100).repeat(None)
    )
    views = TwoViews(uint8_transform(), lambda field: decode_tensor(field["bytes"]), "jpg")
    mapped = stream.map(lambda sample: {"views": views(sample)}, remove_columns=stream.column_names)
    return (batch["views"] for batch in _data_loader(mapped, source.num_cores, False))


# --- loaders on a format of their own; writing it is not timed


def mosaicml_streaming(source: Source) -> Callable[[], Stream]:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # of a run that was killed
    folder = str(Path(source.work) / "mds")
    with MDSWriter(out=folder, columns={"jpg": "bytes"}) as writer:
        for path in _files(source):
            writer.write({"jpg": Path(path).read_bytes()})

    class Views(StreamingDataset):
        views = TwoViews(uint8_transform(), decode_tensor, "jpg")

        def __getitem__(self, at: Any) -> Any:
            return self.views(super().__getitem__(at))

    def start() -> Stream:
        dataset = Views(local=folder, shuffle=True, batch_size=BATCH_SIZE, epoch_size=BATCH_SIZE * 2000)
        return Stream(_views(_data_loader(dataset, source.num_cores, False)))

    return start


def litdata_loader(source: Source) -> Callable[[], Stream]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = str(Path(source.work) / "litdata")
    writer = BinaryWriter(folder, chunk_bytes="16MB")
    files = _files(source)
    for index in range(8 * len(files)):  # an epoch of many batches, as its loader restarts after each
        writer.add_item(index, Path(files[index % len(files)]).read_bytes())
    writer.done()
    writer.merge()

    class Views(StreamingDataset):
        views = TwoViews(uint8_transform(), decode_tensor)

        def __getitem__(self, index: Any) -> Any:
            return self.views(super().__getitem__(index))

    def start() -> Stream:
        dataset = Views(folder, shuffle=True, drop_last=True)
        loader = StreamingDataLoader(
            dataset, batch_size=BATCH_SIZE, num_workers=source.num_cores, persistent_workers=True
        )
        return Stream(_views(_again(loader)))

    return start


def squirrel_loader(source: Source) -> Callable[[], Stream]:
    from squirrel.serialization import MessagepackSerializer
    from squirrel.store import SquirrelStore

    folder = str(Path(source.work) / "squirrel")
    store = SquirrelStore(folder, serializer=MessagepackSerializer())
    files = _files(source)
    for start in range(0, len(files), BATCH_SIZE):
        shard = [{"jpg": Path(path).read_bytes()} for path in files[start : start + BATCH_SIZE]]
        store.set(shard, key=f"{start:06d}")

    def begin() -> Stream:
        from squirrel.driver import MessagepackDriver

        views = TwoViews(uint8_transform(), decode_tensor, "jpg")
        samples = MessagepackDriver(folder).get_iter(shuffle_key_buffer=8, shuffle_item_buffer=100).loop()
        dataset = samples.split_by_worker_pytorch().map(views).to_torch_iterable()
        return Stream(_views(_data_loader(dataset, source.num_cores, False)))

    return begin


def ffcv_loader(source: Source) -> Callable[[], Stream]:
    """Its own pipeline has no colour jitter and no blur: two random crops with a flip, uint8."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.writer import DatasetWriter
    from PIL import Image

    class Images:
        files = _files(source)

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return np.asarray(Image.open(self.files[index]).convert("RGB")), 0

    path = str(Path(source.work) / "images.beton")
    fields = {"one": RGBImageField(write_mode="jpg", jpeg_quality=95), "label": IntField()}
    DatasetWriter(path, fields, num_workers=source.num_cores).from_indexed_dataset(Images())

    def start() -> Stream:
        def pipeline() -> list[Any]:
            return [
                RandomResizedCropRGBImageDecoder((SIZE_PX, SIZE_PX), scale=SCALE),
                RandomHorizontalFlip(),
                ToTensor(),
            ]

        loader = Loader(
            path,
            batch_size=BATCH_SIZE,
            num_workers=source.num_cores,
            order=OrderOption.RANDOM,
            pipelines={"one": pipeline(), "two": pipeline(), "label": None},
            custom_field_mapper={"two": "one"},
        )
        return Stream(_views(_again(loader)))

    return start


# --- DALI


def _dali_pipeline(source: Source, finish: bool) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    def view(image: Any) -> Any:
        image = fn.random_resized_crop(
            image,
            size=SIZE_PX,
            random_area=list(SCALE),
            random_aspect_ratio=[3 / 4, 4 / 3],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        mirror = fn.random.coin_flip()
        if not finish:
            return fn.flip(image, horizontal=mirror)
        if fn.random.coin_flip(probability=0.8, dtype=types.BOOL):
            image = fn.color_twist(
                image,
                brightness=fn.random.uniform(range=[0.2, 1.8]),
                contrast=fn.random.uniform(range=[0.2, 1.8]),
                saturation=fn.random.uniform(range=[0.2, 1.8]),
                hue=fn.random.uniform(range=[-72.0, 72.0]),
            )
        if fn.random.coin_flip(probability=0.2, dtype=types.BOOL):
            image = fn.hsv(image, saturation=0.0)
        if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
            image = fn.gaussian_blur(image, sigma=fn.random.uniform(range=[0.1, 2.0]), window_size=23)
        mean, std = ([255 * value for value in values] for values in (MEAN, STD))
        return fn.crop_mirror_normalize(image, mirror=mirror, mean=mean, std=std, output_layout="CHW")

    @pipeline_def(
        batch_size=BATCH_SIZE,
        num_threads=source.num_cores,
        device_id=None,
        enable_conditionals=True,
        prefetch_queue_depth=2,
    )
    def pipeline() -> Any:
        data, _ = fn.readers.file(files=_files(source), random_shuffle=True, initial_fill=100, name="reader")
        image = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        return view(image), view(image)

    return pipeline


def dali(finish: bool) -> Make:
    def make(source: Source) -> Callable[[], Stream]:
        def start() -> Stream:
            built = _dali_pipeline(source, finish)()
            built.build()

            def batches() -> Iterator[tuple[int, Any]]:
                import torch

                while True:
                    views = [torch.from_dlpack(part.as_tensor()) for part in built.run()]
                    yield len(views[0]), tuple(views)

            return Stream(batches(), even=False)

        return start

    return make


PEERS: dict[str, Make] = {
    "torchvision-pil": _simple(torchvision_pil),
    "torchvision-v2": _simple(torchvision_v2),
    "webdataset": _simple(webdataset_loader),
    "timm": _simple(timm_loader),
    "lightly": _simple(lightly_loader),
    "hf-datasets": _simple(hf_datasets),
    "mosaicml-streaming": mosaicml_streaming,
    "litdata": litdata_loader,
    "grain": _simple(grain_loader),
    "torchdata": _simple(torchdata_nodes),
    "squirrel": squirrel_loader,
    "spdl": _simple(spdl_pipeline),
    "dali": dali(finish=True),
    "dali-uint8": dali(finish=False),
    "ffcv-uint8": ffcv_loader,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=PEERS)
    for name in ("shards", "cifar", "images", "tars", "work"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--num-cores", type=int, default=2)
    arguments = vars(parser.parse_args())
    make = PEERS[arguments.pop("variant")]
    source = Source(**arguments)
    pin(source.num_cores)
    serve(make, source)


if __name__ == "__main__":
    main()
