"""Masks of objects: polygons and run lengths in, pixels and compressed run lengths out.

COCO counts the runs of a mask column by column, beginning with zeros. A compressed count is written in base
32, low digits first, with bit 5 for "more follows"; from the fourth run on it is the difference to the run
two before (https://github.com/cocodataset/cocoapi, common/maskApi.c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Polygons = Sequence[Sequence[float]]
Segmentation = Polygons | Mapping[str, Any]  # as COCO's JSON has it

FURTHEST_PX = 100_000  # of a polygon's corner; further out is no picture's


def runs_of(counts: str | Sequence[int]) -> list[int]:
    """The run lengths that `counts` of an RLE means, compressed or not; ValueError if it means none."""
    if not isinstance(counts, str):
        if not all(type(count) is int for count in counts):
            raise ValueError("counts are not whole numbers")
        return list(counts)
    runs: list[int] = []
    value = shift = 0
    more = False
    for character in counts.encode():
        digit = character - 48
        if not 0 <= digit < 64:
            raise ValueError("counts hold a foreign character")
        value |= (digit & 31) << shift
        shift += 5
        more = bool(digit & 32)
        if not more:
            if digit & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if more:
        raise ValueError("counts are cut short")
    return runs


def fault_of(segmentation: Segmentation, height: int, width: int) -> str | None:
    """What is wrong with the mask of an object in an image of this size, or None."""
    if isinstance(segmentation, Mapping):
        return _fault_of_runs(segmentation, height, width)
    if not all(isinstance(polygon, list) for polygon in segmentation):
        return "a polygon is not a list of x, y, x, y, ..."
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon has {len(polygon)} coordinates, not an even number from 6 on"
        try:
            corners = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            return "a polygon's coordinate is not a number"
        if corners.ndim != 1 or not np.isfinite(corners).all() or np.abs(corners).max() > FURTHEST_PX:
            return "a polygon's coordinate is not a number of pixels"
    return None


def _fault_of_runs(rle: Mapping[str, Any], height: int, width: int) -> str | None:
    if not isinstance(rle.get("counts"), (str, list)) or "size" not in rle:
        return "a mask in run lengths has `size` and `counts`"
    if rle["size"] != [height, width]:
        return f"the mask's size is {rle['size']}, the image's height and width are {[height, width]}"
    try:
        runs = runs_of(rle["counts"])
    except ValueError as error:
        return str(error)
    if min(runs, default=0) < 0:
        return "a run has a negative length"
    if sum(runs) != height * width:
        return f"the runs have {sum(runs)} pixels, the image {height * width}"
    return None if any(runs[1::2]) else "the mask is empty"


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """The mask as pycocotools wants it: `size`, and compressed `counts` as bytes."""
    if not isinstance(segmentation, Mapping):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], str):
        rle = {"size": [height, width], "counts": segmentation["counts"].encode("ascii")}
    else:
        rle = coco_mask.frPyObjects(dict(segmentation), height, width)
    return dict(rle)


def decode(segmentation: Segmentation, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 (height, width), 1 inside"""
    runs = runs_of(to_rle(segmentation, height, width)["counts"].decode("ascii"))
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    pixels: NDArray[np.uint8] = np.repeat(values, runs).reshape(width, height).T
    return pixels


def encode(mask: NDArray[np.uint8]) -> dict[str, Any]:
    """uint8 (H, W) of 0 and 1 -> `size` and compressed `counts` as text, ready for JSON"""
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def tight_boxes(masks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (N, H, W), none of them empty -> float32 (N, 4): x0, y0, x1, y1 around the pixels"""
    height, width = masks.shape[1:]
    in_column = np.asarray(masks.any(axis=1))  # (N, W)
    in_row = np.asarray(masks.any(axis=2))  # (N, H)
    ends = [
        in_column.argmax(axis=1),
        in_row.argmax(axis=1),
        width - in_column[:, ::-1].argmax(axis=1),
        height - in_row[:, ::-1].argmax(axis=1),
    ]
    return np.stack(ends, axis=1).astype(np.float32)
