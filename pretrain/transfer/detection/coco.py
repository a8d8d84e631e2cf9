"""Pictures with objects in COCO's JSON: found, read into columns, and checked before anything is trained.

Two layouts of a folder are known:

    DIR/instances_train.json              DIR/images/train/000000.jpg
    DIR/annotations/instances_train2017.json   DIR/train2017/000000000009.jpg
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from pretrain.data.decode import BadImage, decode, image_size
from pretrain.errors import DataError, nearest
from pretrain.transfer.detection.masks import Segmentation, fault_of

YEAR = "2017"  # that COCO's own names end with
OVERSHOOT_PX = 1.0  # of a box over the image's edge that counts as rounding, and is cut off
HEADER_BYTES = 1 << 14  # of a file, that nearly always tell the image's size
NUM_THREADS = 16


@dataclass(frozen=True)
class Category:
    id: int  # in the JSON; labels count from 1 in the order of the ids
    name: str


@dataclass(frozen=True)
class CocoSet:
    """The images of a split and their objects, row by row in the order of the images.

    I images, N objects. Everything but names is a column, so that worker processes share the memory.
    """

    split: str
    annotations: Path
    folder: Path  # of the images
    categories: tuple[Category, ...]  # label k means categories[k - 1]
    image_ids: NDArray[np.int64]  # (I,)
    file_names: tuple[str, ...]
    sizes: NDArray[np.int64]  # (I, 2): height, width
    starts: NDArray[np.int64]  # (I + 1,): first row of each image, and N
    boxes: NDArray[np.float64]  # (N, 4): x0, y0, x1, y1 in px
    labels: NDArray[np.int64]  # (N,)
    areas: NDArray[np.float64]  # (N,): as the JSON has it, which decides on small, medium and large
    crowds: NDArray[np.bool_]  # (N,)
    shapes: NDArray[np.uint8]  # the masks as JSON, one after another
    shape_starts: NDArray[np.int64]  # (N + 1,): places in `shapes`; an object without a mask takes none
    has_masks: bool  # every object that is no crowd has one
    num_skipped: int  # objects that were left out as invalid

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def category_names(self) -> tuple[str, ...]:
        """In the order of the labels; with the id where a name stands twice."""
        names = [category.name for category in self.categories]
        return tuple(
            f"{category.name} ({category.id})" if names.count(category.name) > 1 else category.name
            for category in self.categories
        )

    def rows(self, index: int) -> NDArray[np.int64]:
        """Places of the objects of an image."""
        return np.arange(self.starts[index], self.starts[index + 1])

    def segmentation(self, row: int) -> Segmentation | None:
        """The mask of an object as the JSON has it."""
        start, end = self.shape_starts[row : row + 2]
        return json.loads(self.shapes[start:end].tobytes()) if end > start else None

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 (H, W, 3)"""
        path = self.folder / self.file_names[index]
        try:
            pixels = decode(path.read_bytes())
        except (OSError, BadImage) as error:
            raise DataError(f"{path}: cannot be read ({error}); restore the file") from None
        if pixels.shape[:2] != tuple(self.sizes[index]):
            raise DataError(
                f"{path}: {pixels.shape[:2]} px, but {tuple(self.sizes[index])} when it was checked"
            )
        return pixels

    def describe(self) -> dict[str, Any]:
        return {
            "annotations": str(self.annotations),
            "split": self.split,
            "num_images": len(self),
            "num_objects": int((~self.crowds).sum()),
            "num_crowds": int(self.crowds.sum()),
            "num_skipped": self.num_skipped,
            "categories": [category.name for category in self.categories],
            "has_masks": self.has_masks,
        }


class _Faults:
    """What is wrong with a file, kind by kind: how many, and the first."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, first: str) -> None:
        count, told = self.found.get(kind, (0, first))
        self.found[kind] = (count + 1, told)

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.found.values())

    def __str__(self) -> str:
        return "; ".join(f"{count} {kind} (first: {first})" for kind, (count, first) in self.found.items())


def find_split(folder: Path, split: str) -> tuple[Path, Path]:
    """The JSON file and the folder of images of a split, in one of the two layouts."""
    if not folder.is_dir():
        raise DataError(f"--data {folder}: is no folder")
    for name in (split, split + YEAR):
        file_name = f"instances_{name}.json"
        for path in (folder / file_name, folder / "annotations" / file_name):
            if not path.is_file():
                continue
            places = (folder / "images" / name, folder / name)
            for images in places:
                if images.is_dir():
                    return path, images
            raise DataError(f"{path}: its images are neither in {places[0]} nor in {places[1]}")
    there = [*folder.glob("instances_*.json"), *folder.glob("annotations/instances_*.json")]
    names = [path.stem.removeprefix("instances_") for path in there]
    hint = f"; {nearest(split, names)}" if names else ""
    raise DataError(
        f"{folder}: has no split '{split}': neither instances_{split}.json nor "
        f"annotations/instances_{split}{YEAR}.json{hint}"
    )


def read_coco(folder: Path, split: str, skip_invalid: bool = False, masks: bool | None = None) -> CocoSet:
    """Read and check a split; the images themselves are checked by `check_images`.

    skip_invalid: leave out objects whose box or mask cannot be, instead of refusing the file. masks: False
    does without them, True wants one for every object, None takes them if there are any. Raises DataError
    that says how many objects are wrong in which way, and the first of each.
    """
    path, images_folder = find_split(folder, split)
    content = _content(path)
    images = _images(content["images"], path)
    categories = _categories(content["categories"], path)
    found, num_skipped = _objects(content["annotations"], images, categories, path, skip_invalid, masks)
    objects = [one for one in found if not one.is_crowd]
    if not objects:
        raise DataError(
            f"{path}: has no object to learn or to find, of {len(content['annotations'])} annotations"
        )
    num_masks = sum(bool(one.shape) for one in objects)
    if (masks or num_masks) and num_masks < len(objects):
        first = next(one for one in objects if not one.shape)
        raise DataError(
            f"{path}: {len(objects) - num_masks} of {len(objects)} objects have no mask (first: annotation "
            f"{first.id}); model.masks=false learns boxes only"
        )
    found.sort(key=lambda one: one.place)  # stable: within an image as in the file
    return CocoSet(
        split=split,
        annotations=path,
        folder=images_folder,
        categories=categories,
        image_ids=np.array([image.id for image in images], dtype=np.int64),
        file_names=tuple(image.file_name for image in images),
        sizes=np.array([(image.height, image.width) for image in images], dtype=np.int64),
        starts=np.searchsorted([one.place for one in found], np.arange(len(images) + 1)),
        boxes=np.array([one.box for one in found], dtype=np.float64),
        labels=np.array([one.label for one in found], dtype=np.int64),
        areas=np.array([one.area for one in found], dtype=np.float64),
        crowds=np.array([one.is_crowd for one in found], dtype=np.bool_),
        shapes=np.frombuffer(b"".join(one.shape for one in found), dtype=np.uint8),
        shape_starts=np.cumsum([0, *(len(one.shape) for one in found)], dtype=np.int64),
        has_masks=bool(num_masks),
        num_skipped=num_skipped,
    )


def check_same_categories(train: CocoSet, val: CocoSet) -> None:
    """What is learnt and what is looked for must have the same names and ids."""
    if train.categories == val.categories:
        return
    known = {category.id: category.name for category in train.categories}
    for category in val.categories:
        if known.get(category.id) != category.name:
            told = f"'{known[category.id]}'" if category.id in known else "absent"
            raise DataError(
                f"{val.annotations}: category {category.id} is '{category.name}', in {train.annotations} "
                f"{told}; list the same categories in both"
            )
    missing = next(category for category in train.categories if category not in val.categories)
    raise DataError(
        f"{val.annotations}: lacks category {missing.id} '{missing.name}' of {train.annotations}; "
        "list the same categories in both"
    )


def check_images(found: CocoSet) -> None:
    """Look at every header; DataError if an image is missing, damaged, or not as large as the JSON says."""
    faults = _Faults()

    def fault(place: int) -> tuple[str, str] | None:
        path = found.folder / found.file_names[place]
        try:
            size = _size_of(path)
        except FileNotFoundError:
            return "images are missing", str(path)
        except (OSError, BadImage) as error:
            return "images cannot be read", f"{path}: {error}"
        height, width = found.sizes[place].tolist()
        if size != (height, width):
            return "images are not of the size in the JSON", (
                f"{path}: {size[1]}x{size[0]} px, the JSON says {width}x{height}"
            )
        return None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for told in pool.map(fault, range(len(found))):
            if told:
                faults.add(*told)
    if faults.total:
        raise DataError(
            f"{found.annotations}: of {len(found)} images {faults}; restore them, or correct the JSON"
        )


def _size_of(path: Path) -> tuple[int, int]:
    """(height, width) of the upright picture"""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        try:
            return image_size(head)
        except BadImage:  # perhaps only cut short
            return image_size(head + file.read())


@dataclass(frozen=True)
class _Image:
    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class _Object:
    id: int
    place: int  # of its image
    box: tuple[float, float, float, float]
    label: int
    area: float
    is_crowd: bool
    shape: bytes  # JSON; empty: no mask


def _content(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"{path}: has no list '{key}'; COCO's JSON has images, annotations and categories"
            )
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise DataError(f"{path}: '{key}' holds something else than JSON objects")
        if not content[key]:
            raise DataError(f"{path}: '{key}' is empty; there is nothing to learn or to find")
    return content  # type: ignore[no-any-return]


def _images(entries: Iterable[dict[str, Any]], path: Path) -> list[_Image]:
    images, faults, seen = [], _Faults(), set()
    for place, entry in enumerate(entries):
        key, name, height, width = (entry.get(name) for name in ("id", "file_name", "height", "width"))
        if not (_is_count(key) and isinstance(name, str) and name and _is_count(height) and _is_count(width)):
            faults.add("images lack a whole-number id, width or height, or a file_name", f"images[{place}]")
        elif height == 0 or width == 0:
            faults.add("images have no pixels", f"image {key}, {width}x{height} px")
        elif key in seen:
            faults.add("image ids stand twice", str(key))
        else:
            seen.add(key)
            images.append(_Image(key, name, height, width))
    if faults.total:
        raise DataError(f"{path}: {faults}")
    return images


def _categories(entries: Sequence[dict[str, Any]], path: Path) -> tuple[Category, ...]:
    for place, entry in enumerate(entries):
        if not _is_count(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise DataError(f"{path}: categories[{place}] lacks a whole-number id or a name")
    ids = [entry["id"] for entry in entries]
    twice = [key for key in ids if ids.count(key) > 1]
    if twice:
        raise DataError(f"{path}: {len(set(twice))} category ids stand twice (first: {twice[0]})")
    return tuple(sorted((Category(entry["id"], entry["name"]) for entry in entries), key=lambda one: one.id))


def _objects(
    entries: Iterable[dict[str, Any]],
    images: Sequence[_Image],
    categories: Sequence[Category],
    path: Path,
    skip_invalid: bool,
    masks: bool | None,
) -> tuple[list[_Object], int]:
    """The objects that can be, and how many were left out."""
    place_of = {image.id: place for place, image in enumerate(images)}
    label_of = {category.id: label for label, category in enumerate(categories, start=1)}
    objects: list[_Object] = []
    wrong, impossible = _Faults(), _Faults()
    seen = set()
    for number, entry in enumerate(entries):
        key, image_id, category_id = (entry.get(name) for name in ("id", "image_id", "category_id"))
        if not _is_count(key):
            wrong.add("annotations lack a whole-number id", f"annotations[{number}]")
        elif key in seen:
            wrong.add("annotation ids stand twice", str(key))
        elif not _is_count(image_id) or image_id not in place_of:
            wrong.add("annotations are of an unknown image", f"annotation {key}, image_id {image_id}")
        elif not _is_count(category_id) or category_id not in label_of:
            wrong.add(
                "annotations are of an unknown category", f"annotation {key}, category_id {category_id}"
            )
        elif entry.get("iscrowd", 0) not in (0, 1):
            wrong.add("annotations have an iscrowd other than 0 and 1", f"annotation {key}")
        else:
            image = images[place_of[image_id]]
            segmentation = (entry.get("segmentation") or None) if masks is not False else None
            fault = _fault_of_box(entry.get("bbox"), image)
            area = entry.get("area")
            if not fault and area is not None and not (_is_number(area) and area >= 0):
                fault = ("areas are no number", f"area {area!r}")
            if not fault and segmentation is not None:
                told = (
                    fault_of(segmentation, image.height, image.width)
                    if isinstance(segmentation, (list, dict))
                    else "is neither polygons nor run lengths"
                )
                fault = ("masks are invalid", told) if told else None
            if fault:
                impossible.add(fault[0], f"annotation {key}, {fault[1]}")
            else:
                left, top, width, height = entry["bbox"]
                box = (
                    max(0.0, left),
                    max(0.0, top),
                    min(float(image.width), left + width),
                    min(float(image.height), top + height),
                )
                objects.append(
                    _Object(
                        id=key,
                        place=place_of[image_id],
                        box=box,
                        label=label_of[category_id],
                        area=float(width * height if area is None else area),
                        is_crowd=bool(entry.get("iscrowd", 0)),
                        shape=b"" if segmentation is None else json.dumps(segmentation).encode(),
                    )
                )
        seen.add(key if _is_count(key) else None)
    if wrong.total:
        raise DataError(f"{path}: {wrong}")
    if impossible.total and not skip_invalid:
        raise DataError(f"{path}: {impossible}; correct them, or leave them out with data.skip_invalid=true")
    return objects, impossible.total


def _fault_of_box(box: Any, image: _Image) -> tuple[str, str] | None:
    """The kind of what is wrong with x, y, width, height in px, and the box itself."""
    told = f"bbox {box}"
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return "boxes are not x, y, width, height", told[:80]
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return "boxes have no area", told
    right, bottom = left + width, top + height
    inside = -OVERSHOOT_PX <= left < image.width and -OVERSHOOT_PX <= top < image.height
    if not inside or right > image.width + OVERSHOOT_PX or bottom > image.height + OVERSHOOT_PX:
        return "boxes reach out of their image", f"{told} in {image.width}x{image.height} px"
    if right <= 0 or bottom <= 0:
        return "boxes reach out of their image", f"{told} in {image.width}x{image.height} px"
    return None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
