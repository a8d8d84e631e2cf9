"""Build the embedded sample: labelled pictures drawn by code alone, as tar shards to try everything with.

    python data_shards/embedded_sample.py OUT [--images 4000] [--test-images 800] [--size-px 64] [--seed 0]

Ten kinds of figures stand in varied places (see scenes.py). Every sample holds KEY.jpg, KEY.cls (the class of
the main figure), KEY.json (box and class of every figure) and KEY.mask.png (which figure a pixel belongs to,
from 1, in the order of the JSON). Beside the shards lie `classes.txt`, `instances_train.json` and
`instances_test.json` in the format of COCO, and the manifest. The same arguments give the same bytes, with
the same versions of Pillow and NumPy.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import CLASSES
from PIL import Image
from scenes import Scene, draw_scene

from pretrain.errors import EXIT_DONE, EXIT_USER_ERROR, DataError, UserError

SHARD_IMAGES = 500
RECEIPT = "sample.json"  # the recipe and the sha256 of every file; written last
DRAWING_VERSION = 1  # raise it whenever a picture changes
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Recipe:
    """What decides every byte of the sample."""

    images: int = 4000
    test_images: int = 800
    size_px: int = 64
    seed: int = 0
    drawing_version: int = DRAWING_VERSION

    def __post_init__(self) -> None:
        for option, least in (("images", 10), ("test_images", 10), ("size_px", 32), ("seed", 0)):
            value = getattr(self, option)
            if value < least:
                raise DataError(f"--{option.replace('_', '-')}: {value} is too small; use {least} or more")
        if self.size_px > 256:
            raise DataError(f"--size-px: {self.size_px} is too large to draw; use 256 or less")


@dataclass(frozen=True)
class Sample:
    """One picture of a split."""

    key: str
    label: int
    scene: Scene


def draw_samples(recipe: Recipe, split: str) -> Iterator[Sample]:
    """The pictures of "train" or "test", in order; every run of ten holds each class once."""
    number = ("train", "test").index(split)
    first_key, count = ((0, recipe.images), (recipe.images, recipe.test_images))[number]
    for index in range(count):
        shuffled = np.random.default_rng([recipe.seed, number, 0, index // len(CLASSES)]).permutation(
            len(CLASSES)
        )
        label = int(shuffled[index % len(CLASSES)])
        rng = np.random.default_rng([recipe.seed, number, 1, index])
        yield Sample(f"{first_key + index:06d}", label, draw_scene(rng, label, recipe.size_px))


def describe_objects(scene: Scene) -> list[dict[str, Any]]:
    """Box [x, y, width, height] px and class of every figure, the main one first."""
    return [{"box": box, "class": label} for box, label in zip(scene.boxes(), scene.labels, strict=True)]


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """The members of a sample by extension."""
    picture, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(sample.scene.image).save(picture, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    Image.fromarray(sample.scene.mask).save(mask, "PNG", compress_level=6)
    return {
        "jpg": picture.getvalue(),
        "cls": str(sample.label).encode(),
        "json": json.dumps({"objects": describe_objects(sample.scene)}).encode(),
        "mask.png": mask.getvalue(),
    }


def write_split(recipe: Recipe, split: str, folder: Path) -> None:
    """Write the shards of one split and its annotations."""
    samples = draw_samples(recipe, split)
    count = recipe.images if split == "train" else recipe.test_images
    coco = _empty_coco()
    for shard, start in enumerate(range(0, count, SHARD_IMAGES)):
        path = folder / f"sample-{split}-{shard:04d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(start, min(start + SHARD_IMAGES, count)):
                sample = next(samples)
                for extension, content in encode_sample(sample).items():
                    member = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid are 0
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                _add_to_coco(coco, sample)
    (folder / f"instances_{split}.json").write_text(json.dumps(coco))


def _empty_coco() -> dict[str, list[dict[str, Any]]]:
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    return {"images": [], "annotations": [], "categories": categories}


def _add_to_coco(coco: dict[str, list[dict[str, Any]]], sample: Sample) -> None:
    height, width = sample.scene.mask.shape
    image_id = int(sample.key)
    coco["images"].append(
        {"id": image_id, "file_name": f"{sample.key}.jpg", "height": height, "width": width}
    )
    for instance, described in enumerate(describe_objects(sample.scene), start=1):
        inside = sample.scene.mask == instance
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": described["class"] + 1,
                "bbox": described["box"],
                "area": int(inside.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": run_lengths(inside)},
            }
        )


def run_lengths(inside: np.ndarray[Any, np.dtype[np.bool_]]) -> list[int]:
    """Lengths of the runs of 0 and 1, in turn, of an (H, W) mask read column by column, 0 first."""
    flat = inside.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs: list[int] = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def build(recipe: Recipe, out: Path) -> bool:
    """Make `out` hold the sample; False when it already did. It appears complete or not at all."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; name a new folder for the sample")
    if out.is_dir() and any(out.iterdir()):
        if holds_sample(recipe, out):
            return False
        raise DataError(f"{out}: is not empty and holds something else; name another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "sample"
        folder.mkdir()
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        for split in ("train", "test"):
            write_split(recipe, split, folder)
        files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / RECEIPT).write_text(json.dumps({"recipe": asdict(recipe), "sha256": files}, indent=1))
        folder.replace(out)
    return True


def holds_sample(recipe: Recipe, out: Path) -> bool:
    """Whether `out` holds the sample of this recipe, every byte as it was written."""
    try:
        receipt = json.loads((out / RECEIPT).read_text())
        files = dict(receipt["sha256"])
        same_recipe = receipt["recipe"] == asdict(recipe)
        return same_recipe and all(_sha256(out / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(out: Path) -> None:
    """Index the shards, unless that is done."""
    from pretrain.data.indexing import index_folder

    if not (out / "index.json").exists():
        index_folder(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw a small labelled image set and write it as tar shards."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--images", type=int, default=Recipe.images, help="for training (default: %(default)s)"
    )
    parser.add_argument("--test-images", type=int, default=Recipe.test_images, help="default: %(default)s")
    parser.add_argument("--size-px", type=int, default=Recipe.size_px, help="side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="another seed, other pictures")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        recipe = Recipe(options.images, options.test_images, options.size_px, options.seed)
        built = build(recipe, options.out)
        write_manifest(options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    told = f"drawn in {time.monotonic() - started:.0f} s" if built else "already there, unchanged"
    print(f"{options.out}: {recipe.images} train and {recipe.test_images} test images, {told}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
