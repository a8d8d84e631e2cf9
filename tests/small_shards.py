"""Small shards for the tests of the data plane."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pretrain.data.indexing import index_folder
from pretrain.data.manifest import Manifest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def real_data(name: str) -> Path:
    """A folder of real shards, or a skip that says how to have one."""
    folder = Path(os.environ.get("PRETRAIN_TEST_DATA", SHARED_DATA)) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; PRETRAIN_TEST_DATA names a folder that holds {name}")
    return folder


def jpeg(seed: int, height: int = 40, width: int = 48) -> bytes:
    """A smooth picture, its colours from the seed."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, size=(2, 2, 3))
    down, right = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    top = corners[0, 0] * (1 - right) + corners[0, 1] * right
    bottom = corners[1, 0] * (1 - right) + corners[1, 1] * right
    pixels = (top * (1 - down) + bottom * down).astype(np.uint8)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95))


Member = tuple[str, bytes]


def samples(first: int, count: int, **size: int) -> list[Member]:
    """`count` samples of an image and its label (the sample's number modulo 10)."""
    members = []
    for number in range(first, first + count):
        members += [
            (f"{number:06d}.jpg", jpeg(number, **size)),
            (f"{number:06d}.cls", str(number % 10).encode()),
        ]
    return members


def tar_bytes(members: Iterable[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_shard(path: Path, members: Iterable[Member]) -> Path:
    data = tar_bytes(members)
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith("gz") else data)
    return path


def make_shards(folder: Path, sizes: Sequence[int], suffix: str = ".tar", **image_size: int) -> Manifest:
    """Shards of the given sample counts, indexed."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for index, size in enumerate(sizes):
        write_shard(folder / f"train-{index}{suffix}", samples(first, size, **image_size))
        first += size
    return index_folder(folder)
