"""AP is COCO's, exactly; a perfect detector has 100, and one that does not look has next to nothing."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_coco import Content, brick, object_of, rle, write_split
from small_shards import real_data

from pretrain.transfer.detection.coco import CocoSet, read_coco
from pretrain.transfer.detection.masks import decode, encode
from pretrain.transfer.detection.score import score, single_boxes

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def perfect(found: CocoSet) -> list[dict[str, Any]]:
    """Every object that is no crowd, as a detector would report it."""
    detections = []
    for place, key in enumerate(found.image_ids.tolist()):
        height, width = found.sizes[place].tolist()
        for row in found.rows(place)[~found.crowds[found.rows(place)]]:
            left, top, right, bottom = found.boxes[row].tolist()
            detection = {
                "image_id": key,
                "category_id": found.categories[found.labels[row] - 1].id,
                "bbox": [left, top, right - left, bottom - top],
                "score": 0.9,
            }
            if found.has_masks:
                detection["segmentation"] = encode(decode(found.segmentation(row) or [], height, width))
            detections.append(detection)
    return detections


def shaken(found: CocoSet, seed: int) -> list[dict[str, Any]]:
    """Detections of all sorts: near, too large, of another category, missing, twice; scores have ties."""
    rng = random.Random(seed)
    size_of = dict(zip(found.image_ids.tolist(), found.sizes.tolist(), strict=True))
    detections = []
    for one in perfect(found):
        for _ in range(rng.choice((0, 1, 1, 2))):
            left, top, width, height = one["bbox"]
            box = [left + rng.uniform(-2, 2), top + rng.uniform(-2, 2), width * rng.uniform(0.7, 1.2), height]
            mask = np.zeros(size_of[one["image_id"]], np.uint8)
            rows, columns = (
                slice(max(0, round(start)), round(start + side))
                for start, side in ((box[1], box[3]), (box[0], box[2]))
            )
            mask[rows, columns] = 1
            changed = {
                **one,
                "bbox": box,
                "score": round(rng.random(), 1),
                "category_id": rng.choice([one["category_id"]] * 4 + [found.categories[0].id]),
            }
            detections.append({**changed, "segmentation": encode(mask)} if found.has_masks else changed)
    return detections


def by_pycocotools(annotations: Path, results: Path, kind: str) -> list[float]:
    """The twelve numbers as anyone would compute them from the files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def iou(one: list[float], other: list[float]) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    both = max(0.0, width) * max(0.0, height)
    return both / (one[2] * one[3] + other[2] * other[3] - both)


def reference_ap(truth: list[dict[str, Any]], detections: list[dict[str, Any]], threshold: float) -> float:
    """AP of one category at one IoU threshold, from its definition: precision at 101 recalls."""
    taken: set[int] = set()
    hits = []
    for detection in sorted(detections, key=lambda one: -one["score"]):
        free = [
            (iou(detection["bbox"], one["bbox"]), number)
            for number, one in enumerate(truth)
            if one["image_id"] == detection["image_id"] and number not in taken
        ]
        best, number = max(free, default=(0.0, -1))
        hits.append(best >= threshold)
        taken |= {number} if best >= threshold else set()
    precisions = [sum(hits[: count + 1]) / (count + 1) for count in range(len(hits))]
    recalls = [sum(hits[: count + 1]) / len(truth) for count in range(len(hits))]
    at = [
        max((p for p, r in zip(precisions, recalls, strict=True) if r >= step / 100 - 1e-12), default=0.0)
        for step in range(101)
    ]
    return sum(at) / 101


def crowded(content: Content) -> None:
    """A crowd in the first image, and 130 small bricks in the second."""
    content["annotations"].append({**object_of(900, 0, 3, brick(2, 2, (10, 10))), "iscrowd": 1})
    for number in range(130):
        mask = brick(6 * (number % 13), 6 * (number // 13), (5, 5))
        content["annotations"].append(object_of(1000 + number, 1, 7, mask))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_perfect_detector_has_exactly_100(kind: str, tmp_path: Path) -> None:
    """Also of annotation 0, which pycocotools alone takes for no match; beside a crowd; of 132 an image."""
    write_split(tmp_path, "val", 4, change=crowded)
    found = read_coco(tmp_path, "val")
    scores = score(found, perfect(found), kind, limit=150)
    at_limit = scores["at_limit"]
    assert at_limit["limit"] == 150
    assert at_limit["AP"] == at_limit["AP50"] == at_limit["AP75"] == at_limit["AR150"] == 100.0
    assert (at_limit["APs"], at_limit["APl"]) == (100.0, None)
    assert scores["per_category"]["disc"] == 100.0
    assert 70 < scores["AR100"] < 100  # of 133 bricks, 102 can be among the first hundred of their image
    assert scores["AP"] < 100


def test_the_twelve_numbers_are_those_of_pycocotools_on_the_written_files(tmp_path: Path) -> None:
    """To 1e-6, for boxes and for masks, where it has no annotation 0 to stumble over."""

    def change(content: Content) -> None:
        crowded(content)
        for annotation in content["annotations"]:
            annotation["id"] += 1

    write_split(tmp_path, "val", 5, change=change)
    found = read_coco(tmp_path, "val")
    detections = shaken(found, seed=4)
    for kind, other in (("bbox", "segmentation"), ("segm", "bbox")):
        results = tmp_path / f"{kind}.json"
        results.write_text(json.dumps([{k: v for k, v in d.items() if k != other} for d in detections]))
        ours = score(found, detections, kind)
        theirs = by_pycocotools(tmp_path / "instances_val.json", results, kind)
        assert 5 < ours["AP"] < 80
        for name, value in zip(NAMES, theirs, strict=True):
            expected = None if value == -1 else pytest.approx(100 * value, abs=1e-6)
            assert ours[name] == expected, (kind, name)


def test_boxes_and_masks_are_not_told_apart_where_they_are_the_same(tmp_path: Path) -> None:
    def bricks(content: Content) -> None:
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 7]

    write_split(tmp_path, "val", 6, change=bricks)
    found = read_coco(tmp_path, "val")
    detections = [{**one, "bbox": [round(v) for v in one["bbox"]]} for one in shaken(found, seed=2)]
    for one in detections:
        left, top, width, height = one["bbox"]
        one["segmentation"] = rle(brick(left, top, (width, height)))
    boxes, masks = (score(found, detections, kind) for kind in ("bbox", "segm"))
    assert boxes == masks
    assert 0 < boxes["AP"] < 100


def test_ap_is_what_its_definition_gives(tmp_path: Path) -> None:
    write_split(tmp_path, "val", 8)
    found = read_coco(tmp_path, "val")
    truth, detections = perfect(found), shaken(found, seed=1)
    for number, one in enumerate(detections):
        one["score"] = 0.001 * number  # no ties: their order is pycocotools' own
    scores = score(found, detections, "bbox")
    thresholds = [0.5 + 0.05 * step for step in range(10)]
    for category in found.categories:
        of_truth, of_found = (
            [one for one in every if one["category_id"] == category.id] for every in (truth, detections)
        )
        expected = np.mean([reference_ap(of_truth, of_found, threshold) for threshold in thresholds])
        assert scores["per_category"][category.name] == pytest.approx(100 * expected, abs=1e-6)
    assert scores["AP"] == pytest.approx(np.mean(list(scores["per_category"].values())), abs=1e-6)


def test_ap_as_worked_by_hand(tmp_path: Path) -> None:
    """Two objects; hit, miss, hit: precision 1 up to a recall of 0.5, then 2/3. 51 and 50 of 101 recalls."""

    def change(content: Content) -> None:
        content["annotations"] = [object_of(5 + n, n, 7, brick(10, 10, (20, 20))) for n in (0, 1)]

    write_split(tmp_path, "val", 2, change=change)
    found = read_coco(tmp_path, "val")
    detections = [
        {"image_id": image, "category_id": 7, "bbox": box, "score": chance}
        for image, box, chance in (
            (0, [10, 10, 20, 20], 0.9), (0, [50, 40, 20, 20], 0.8), (1, [10, 10, 20, 15.2], 0.7),
        )
    ]  # fmt: skip
    scores = score(found, detections, "bbox")
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert scores["AP50"] == scores["AP75"] == pytest.approx(100 * both, abs=1e-6)  # an IoU of 0.76
    assert scores["AP"] == pytest.approx(100 * (0.6 * both + 0.4 * one), abs=1e-6)  # up to 0.75: six of ten
    assert scores["AR1"] == pytest.approx(100 * (0.6 * 1 + 0.4 * 0.5), abs=1e-6)
    assert scores["per_category"] == {"disc": None, "brick": scores["AP"]}


def test_finding_nothing_scores_nothing(tmp_path: Path) -> None:
    write_split(tmp_path, "val", 2)
    found = read_coco(tmp_path, "val")
    for kind in ("bbox", "segm"):
        scores = score(found, [], kind)
        assert scores["AP"] == scores["AR100"] == 0.0
        assert scores["APl"] is None


def test_the_single_boxes_are_the_image_and_the_mean_of_the_train_set(tmp_path: Path) -> None:
    def change(content: Content) -> None:
        for annotation in content["annotations"]:
            if annotation["category_id"] == 7:
                annotation.update(bbox=[8, 16, 40, 32], segmentation=rle(brick(8, 16, (40, 32))))
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 7]

    write_split(tmp_path, "train", 3, change=change)
    write_split(tmp_path, "val", 2, seed=5, change=change)
    train, val = read_coco(tmp_path, "train"), read_coco(tmp_path, "val")
    boxes = single_boxes(train, val, has_masks=True)
    assert [one["bbox"] for one in boxes["full_image"]] == [[0, 0, 80, 64]] * 2
    for one in boxes["mean_box"]:
        assert one["bbox"] == pytest.approx([8, 16, 40, 32])
        assert one["category_id"] == 7
    assert score(val, boxes["mean_box"], "segm")["AP"] == 100.0  # here they all are the same
    assert score(val, boxes["full_image"], "bbox")["AP"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nuclei", "raccoon"])
def test_a_perfect_detector_of_real_objects_has_exactly_100(name: str) -> None:
    found = read_coco(real_data(name), "val")
    detections = perfect(found)
    for kind in ("bbox", "segm") if found.has_masks else ("bbox",):
        scores = score(found, detections, kind, limit=400)
        assert scores["at_limit"]["AP"] == scores["at_limit"]["AR400"] == 100.0
        assert scores["AP"] == pytest.approx({"nuclei": 85.148515, "raccoon": 100.0}[name], abs=1e-5)
