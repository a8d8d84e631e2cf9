"""A few pictures with bright shapes on a dark ground, and their objects in COCO's JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 64, 80
CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "brick"}]
Content = dict[str, list[dict[str, Any]]]


def disc(x: float, y: float, radius: float, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """uint8 (height, width), 1 where the middle of a pixel is inside"""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2).astype(np.uint8)


def brick(
    x: int, y: int, sides: tuple[int, int], height: int = HEIGHT, width: int = WIDTH
) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[y : y + sides[1], x : x + sides[0]] = 1
    return mask


def rle(mask: NDArray[np.uint8]) -> dict[str, Any]:
    packed = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": packed["counts"].decode()}


def box_of(mask: NDArray[np.uint8]) -> list[float]:
    """x, y, width, height"""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    left, top = columns[0], rows[0]
    return [float(side) for side in (left, top, columns[-1] + 1 - left, rows[-1] + 1 - top)]


def object_of(key: int, image_id: int, category_id: int, mask: NDArray[np.uint8]) -> dict[str, Any]:
    return {
        "id": key,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box_of(mask),
        "area": int(mask.sum()),
        "segmentation": rle(mask),
        "iscrowd": 0,
    }


def scenes(num_images: int, seed: int) -> tuple[Content, dict[str, NDArray[np.uint8]]]:
    """One disc and one brick in every image: the JSON, and pixels by file name. Ids begin at 0."""
    rng = np.random.default_rng(seed)
    content: Content = {"images": [], "annotations": [], "categories": CATEGORIES}
    pictures = {}
    for number in range(num_images):
        name = f"{number:03d}.jpg"
        picture = rng.integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        shapes = [
            (3, disc(rng.uniform(12, 28), rng.uniform(14, HEIGHT - 14), rng.uniform(7, 11)), (250, 220, 40)),
            (7, brick(int(rng.integers(44, 56)), int(rng.integers(4, 36)), (16, 22)), (60, 90, 250)),
        ]
        content["images"].append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for category_id, mask, colour in shapes:
            picture[mask > 0] = colour
            key = len(content["annotations"])
            content["annotations"].append(object_of(key, number, category_id, mask))
        pictures[name] = picture
    return content, pictures


def write_split(
    folder: Path, split: str, num_images: int, seed: int = 0, change: Callable[[Content], Any] | None = None
) -> Content:
    """instances_SPLIT.json and images/SPLIT/ in `folder`; `change` alters the JSON before it is written."""
    content, pictures = scenes(num_images, seed)
    images = folder / "images" / split
    images.mkdir(parents=True)
    for name, picture in pictures.items():
        (images / name).write_bytes(simplejpeg.encode_jpeg(picture, quality=95))
    content = json.loads(json.dumps(content))
    if change is not None:
        change(content)
    (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return content


def boxes_only(content: Content) -> None:
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
