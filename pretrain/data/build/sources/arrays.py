"""Data sets that torchvision knows: `torchvision:cifar10`, `cifar100`, `stl10`, `imagenette`.

torchvision fetches and reads them, into `--download-dir`. CIFAR's files are Python pickles: torchvision reads
them, and only after their MD5 sums agree with the published ones. Pixels that come as arrays are stored as
PNG, without loss; Imagenette's JPEG files are taken as they are.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.data.build.listing import NO_LABEL, ListingWriter
from pretrain.data.build.settings import TORCHVISION_PREFIX, BuildRequest
from pretrain.data.build.sources import folder
from pretrain.data.build.sources.source import Source, refuse_split
from pretrain.errors import DataError, nearest

# name -> (torchvision's class, split -> arguments, bytes of its images as PNG, rounded up)
DATASETS: dict[str, tuple[str, dict[str, dict[str, Any]], int]] = {
    "cifar10": ("CIFAR10", {"train": {"train": True}, "test": {"train": False}}, 180 << 20),
    "cifar100": ("CIFAR100", {"train": {"train": True}, "test": {"train": False}}, 180 << 20),
    "stl10": (
        "STL10",
        {"train": {"split": "train"}, "test": {"split": "test"}, "unlabeled": {"split": "unlabeled"}},
        3 << 30,
    ),
    "imagenette": ("Imagenette", {"train": {"split": "train"}, "val": {"split": "val"}}, 0),
}
IMAGENETTE_FOLDER = "imagenette2"


def find(request: BuildRequest) -> Source:
    name = request.source.removeprefix(TORCHVISION_PREFIX).lower()
    if name not in DATASETS:
        raise DataError(f"{request.source}: unknown data set; {nearest(name, DATASETS)}")
    if request.download_dir is None:
        raise DataError(f"{request.source}: give --download-dir, the folder where torchvision keeps its data")
    class_name, splits, spool_bytes = DATASETS[name]
    refuse_split(request, list(splits))
    root = request.download_dir
    if name == "imagenette" and not request.labels:
        raise DataError(f"{request.source}: for --no-labels build from the folder {root / IMAGENETTE_FOLDER}")
    fill = _list_files if name == "imagenette" else _list_arrays

    def list_items(writer: ListingWriter) -> None:
        fill(writer, class_name, splits, root, request.labels)

    notes = () if name == "imagenette" else ("pixels are stored as PNG, without loss",)
    return Source("torchvision", root, tuple(splits), list_items, spool_bytes=spool_bytes, notes=notes)


def _list_arrays(
    writer: ListingWriter, class_name: str, splits: dict[str, dict[str, Any]], root: Path, labels: bool
) -> None:
    for split, arguments in splits.items():
        dataset = _open(class_name, root, arguments)
        if labels:
            writer.class_names = tuple(dataset.classes)
        writer.begin_split(split)
        for index in range(len(dataset)):
            image, label = dataset[index]
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = buffer.getvalue()
            place, offset = writer.spool(data)
            number = int(label) if labels and label is not None and label >= 0 else NO_LABEL
            writer.add(f"{split}#{index}", len(data), place=place, offset=offset, label=number)


def _list_files(
    writer: ListingWriter, class_name: str, splits: dict[str, dict[str, Any]], root: Path, _labels: bool
) -> None:
    for arguments in splits.values():
        _open(class_name, root, {**arguments, "size": "full"})
    files = root / IMAGENETTE_FOLDER
    writer.class_names = tuple(folder.class_folders(files / "train"))
    for split in splits:
        writer.begin_split(split)
        folder.list_classes(writer, files / split, follow_symlinks=False)


def _open(class_name: str, root: Path, arguments: dict[str, Any]) -> Any:
    from torchvision import datasets

    create: Callable[..., Any] = getattr(datasets, class_name)
    try:
        return create(root=root, download=False, **arguments)
    except RuntimeError:
        pass  # absent, or its MD5 sums differ
    try:
        root.mkdir(parents=True, exist_ok=True)
        return create(root=root, download=True, **arguments)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{root}: {class_name} is not there as published and cannot be fetched ({reason}); "
            "copy its archive there, or run this where there is a network"
        ) from error
