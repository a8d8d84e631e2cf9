"""Average precision as COCO defines it, by pycocotools; and what a detector that sees nothing would get.

All figures are in percent. pycocotools has traps that are avoided here: a match with annotation 0 counts as
none, AP under another limit than 100 detections is printed as -1, and a result with both a box and a mask is
counted as small or large by its box.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pretrain.transfer.detection.coco import CocoSet
from pretrain.transfer.detection.config import STANDARD_DETECTIONS
from pretrain.transfer.detection.masks import encode, to_rle

KINDS = ("bbox", "segm")  # pycocotools' names for boxes and masks
AREAS = ("all", "small", "medium", "large")  # in the order of pycocotools; limits at 32^2 and 96^2 px
FEW_DETECTIONS = (1, 10)  # an image, for the first two recalls


def score(
    found: CocoSet, detections: Sequence[dict[str, Any]], kind: str, limit: int = STANDARD_DETECTIONS
) -> dict[str, Any]:
    """COCO's twelve numbers for boxes ("bbox") or masks ("segm"), None where there is nothing to find.

    limit: detections of an image that count, best first; with another than 100 the numbers stand once more
    under "at_limit". AP of each category stands in "per_category".
    """
    limits = sorted({*FEW_DETECTIONS, STANDARD_DETECTIONS, limit})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_truth(found, kind), _results(found, detections, kind), kind)
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoU thresholds, recalls, categories, areas, limits) and the same without recalls; -1: nothing to find
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    standard = limits.index(STANDARD_DETECTIONS)
    scores: dict[str, Any] = _twelve(precision, recall, limits, standard)
    scores["per_category"] = {
        name: _percent(precision[:, :, number, 0, standard])
        for number, name in enumerate(found.category_names)
    }
    if limit != STANDARD_DETECTIONS:
        scores["at_limit"] = {"limit": limit, **_twelve(precision, recall, limits, limits.index(limit))}
    return scores


def _twelve(
    precision: NDArray[np.float64], recall: NDArray[np.float64], limits: list[int], at: int
) -> dict[str, float | None]:
    numbers = {
        "AP": _percent(precision[..., 0, at]),
        "AP50": _percent(precision[0, ..., 0, at]),
        "AP75": _percent(precision[5, ..., 0, at]),
    }
    numbers |= {f"AP{area[0]}": _percent(precision[..., AREAS.index(area), at]) for area in AREAS[1:]}
    numbers |= {f"AR{few}": _percent(recall[..., 0, limits.index(few)]) for few in FEW_DETECTIONS}
    numbers |= {f"AR{limits[at]}": _percent(recall[..., 0, at])}
    return numbers | {f"AR{area[0]}": _percent(recall[..., AREAS.index(area), at]) for area in AREAS[1:]}


def _percent(values: NDArray[np.float64]) -> float | None:
    """The mean of what is not -1; rounded, as pycocotools adds 2e-16 to denominators."""
    there = values[values > -1]
    return round(100 * float(there.mean()), 9) if there.size else None


def _truth(found: CocoSet, kind: str) -> COCO:
    annotations = []
    for place in range(len(found)):
        height, width = found.sizes[place].tolist()
        for row in found.rows(place):
            left, top, right, bottom = found.boxes[row].tolist()
            annotation = {
                "image_id": int(found.image_ids[place]),
                "category_id": found.categories[found.labels[row] - 1].id,
                "bbox": [left, top, right - left, bottom - top],
                "area": float(found.areas[row]),
                "iscrowd": int(found.crowds[row]),
            }
            if kind == "segm":
                annotation["segmentation"] = to_rle(found.segmentation(row) or [], height, width)
            annotations.append(annotation)
    return _coco(found, annotations)


def _results(found: CocoSet, detections: Sequence[dict[str, Any]], kind: str) -> COCO:
    annotations = []
    for detection in detections:
        annotation = {key: detection[key] for key in ("image_id", "category_id", "score")} | {"iscrowd": 0}
        if kind == "segm":
            rle = detection["segmentation"]
            annotation |= {"segmentation": rle, "area": float(coco_mask.area(rle))}
        else:
            annotation |= {"bbox": detection["bbox"], "area": detection["bbox"][2] * detection["bbox"][3]}
        annotations.append(annotation)
    return _coco(found, annotations)


def _coco(found: CocoSet, annotations: list[dict[str, Any]]) -> COCO:
    """What pycocotools works on; its ids begin at 1."""
    made = COCO()
    made.dataset = {
        "images": [
            {"id": key, "height": height, "width": width}
            for key, (height, width) in zip(found.image_ids.tolist(), found.sizes.tolist(), strict=True)
        ],
        "categories": [{"id": category.id, "name": category.name} for category in found.categories],
        "annotations": [{**one, "id": number} for number, one in enumerate(annotations, start=1)],
    }
    made.createIndex()
    return made


def single_boxes(train: CocoSet, val: CocoSet, has_masks: bool) -> dict[str, list[dict[str, Any]]]:
    """One box of the commonest category in every image, unseen: the whole of it, or the train set's mean."""
    height, width = np.repeat(train.sizes, np.diff(train.starts), axis=0).T  # (N,) each
    objects = ~train.crowds
    shares = train.boxes[objects] / np.stack([width, height, width, height], axis=1)[objects]
    label = int(np.bincount(train.labels[objects]).argmax())
    category_id = train.categories[label - 1].id
    return {
        name: _everywhere(val, share, category_id, has_masks)
        for name, share in (("full_image", np.array([0.0, 0.0, 1.0, 1.0])), ("mean_box", shares.mean(axis=0)))
    }


def _everywhere(
    found: CocoSet, share: NDArray[np.float64], category_id: int, has_masks: bool
) -> list[dict[str, Any]]:
    detections = []
    for key, (height, width) in zip(found.image_ids.tolist(), found.sizes.tolist(), strict=True):
        left, top, right, bottom = (share * np.array([width, height] * 2)).tolist()
        detection = {
            "image_id": key,
            "category_id": category_id,
            "bbox": [left, top, right - left, bottom - top],
            "score": 1.0,
        }
        if has_masks:
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[round(top) : round(bottom), round(left) : round(right)] = 1
            detection["segmentation"] = encode(mask)
        detections.append(detection)
    return detections
