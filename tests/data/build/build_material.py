"""Small sources for the tests of building, and a plain reading of what was built."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from small_shards import jpeg

from pretrain.data.build.run import build_shards
from pretrain.data.build.settings import BuildRequest, BuildResult
from pretrain.data.manifest import Manifest


def png(seed: int, height: int = 12, width: int = 14) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def class_folders(folder: Path, counts: dict[str, int], first: int = 0) -> dict[str, bytes]:
    """Class folders of JPEGs, written; gives what was written: name -> bytes."""
    files = {}
    for name, count in counts.items():
        for number in range(count):
            files[f"{name}/{number}.jpg"] = jpeg(first, 12, 14)
            first += 1
    write_files(folder, files)
    return files


def build(source: Path | str, out: Path, **settings: Any) -> tuple[BuildResult, list[str]]:
    lines: list[str] = []
    request = BuildRequest(**{"source": str(source), "out": out, "num_workers": 1, **settings})
    return build_shards(request, lines.append), lines


def stored(out: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    """key -> extension -> bytes of all shards of a split, read by the standard library alone."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob(f"*-{split}-*.tar")):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                plain = (member.mtime, member.uid, member.gid, member.mode, member.uname, member.gname)
                assert plain == (0, 0, 0, 0o644, "", "")
                assert re.fullmatch(r"[0-9]{6}\.[a-z0-9.]+", member.name)
                file = tar.extractfile(member)
                assert file is not None
                key, _, extension = member.name.partition(".")
                assert extension not in samples.setdefault(key, {})
                samples[key][extension] = file.read()
    return samples


def images_and_labels(out: Path, split: str = "train") -> list[tuple[bytes, int | None]]:
    """Sorted (image, label); the index must tell of as many samples."""
    samples = stored(out, split)
    assert Manifest.load(out).split(split).num_samples == len(samples)
    found = []
    for members in samples.values():
        (image,) = (members[name] for name in ("jpg", "png", "webp") if name in members)
        found.append((image, int(members["cls"]) if "cls" in members else None))
    return in_order(found)


def in_order(found: Iterable[tuple[bytes, int | None]]) -> list[tuple[bytes, int | None]]:
    return sorted(found, key=lambda pair: (pair[0], -1 if pair[1] is None else pair[1]))


def sums(folder: Path) -> dict[str, str]:
    """sha256 of each shard."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}
