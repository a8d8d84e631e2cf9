"""COCO's JSON is read as it is meant, and whatever is wrong with it is told before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from small_coco import HEIGHT, WIDTH, Content, box_of, boxes_only, brick, disc, rle, write_split
from small_shards import real_data

from pretrain.errors import DataError
from pretrain.transfer.detection.coco import check_images, check_same_categories, read_coco
from pretrain.transfer.detection.masks import decode, encode, fault_of, runs_of, tight_boxes, to_rle


def refusal(folder: Path, change: Callable[[Content], Any] | None = None, **options: Any) -> str:
    """The one line with which a set is refused."""
    write_split(folder, "train", 3, change=change)
    with pytest.raises(DataError) as caught:
        check_images(read_coco(folder, "train", **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_objects_stand_with_their_image_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    content = write_split(tmp_path, "train", 4, change=lambda c: c["annotations"].reverse())
    found = read_coco(tmp_path, "train")
    check_images(found)
    assert found.image_ids.tolist() == [0, 1, 2, 3]
    assert found.category_names == ("disc", "brick")
    by_id = {one["id"]: one for one in content["annotations"]}
    for place in range(4):
        rows = found.rows(place)
        assert found.labels[rows].tolist() == [2, 1]
        for row, key in zip(rows, (2 * place + 1, 2 * place), strict=True):
            left, top, right, bottom = found.boxes[row]
            assert [left, top, right - left, bottom - top] == by_id[key]["bbox"]
            assert found.segmentation(row) == by_id[key]["segmentation"]
            assert found.areas[row] == by_id[key]["area"]
    assert found.describe()["num_objects"] == 8


def test_cocos_own_layout_of_folders_is_found_as_well(tmp_path: Path) -> None:
    write_split(tmp_path / "ours", "train", 3)
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    shutil.copy(tmp_path / "ours/instances_train.json", coco / "annotations/instances_train2017.json")
    shutil.copytree(tmp_path / "ours/images/train", coco / "train2017")
    one, other = read_coco(tmp_path / "ours", "train"), read_coco(coco, "train")
    check_images(other)
    assert np.array_equal(one.boxes, other.boxes)
    assert np.array_equal(one.image(1), other.image(1))
    assert other.annotations.name == read_coco(coco, "train2017").annotations.name


def test_an_image_that_has_no_object_keeps_its_place(tmp_path: Path) -> None:
    write_split(
        tmp_path,
        "train",
        3,
        change=lambda c: c.update(annotations=[c["annotations"][0], c["annotations"][5]]),
    )
    found = read_coco(tmp_path, "train")
    assert [found.rows(place).tolist() for place in range(3)] == [[0], [], [1]]


def set_in(key: str, place: int, **values: Any) -> Callable[[Content], Any]:
    return lambda content: content[key][place].update(values)


def all_of(*changes: Callable[[Content], Any]) -> Callable[[Content], Any]:
    return lambda content: [change(content) for change in changes]


WRONG = {
    "zero-size": (
        all_of(set_in("annotations", 1, bbox=[3, 4, 0, 5]), set_in("annotations", 4, bbox=[3, 4, 5, -1])),
        "2 boxes have no area (first: annotation 1, bbox [3, 4, 0, 5])",
    ),
    "outside": (
        set_in("annotations", 2, bbox=[70, 10, 20, 10]),
        "1 boxes reach out of their image (first: annotation 2, bbox [70, 10, 20, 10] in 80x64 px)",
    ),
    "beyond": (set_in("annotations", 0, bbox=[-30, -30, 10, 10]), "1 boxes reach out of their image"),
    "no box": (lambda c: c["annotations"][3].pop("bbox"), "1 boxes are not x, y, width, height"),
    "words": (set_in("annotations", 3, bbox=[1, 2, 3, "x"]), "1 boxes are not x, y, width, height"),
    "infinite": (set_in("annotations", 3, bbox=[1, 2, 3, float("inf")]), "1 boxes are not x, y, width"),
    "area": (set_in("annotations", 3, area="big"), "1 areas are no number (first: annotation 3"),
    "mask of another size": (
        set_in("annotations", 1, segmentation=rle(brick(3, 3, (4, 4), 60, 80))),
        "1 masks are invalid (first: annotation 1, the mask's size is [60, 80], the image's height and width "
        "are [64, 80])",
    ),
    "empty mask": (
        set_in("annotations", 1, segmentation=rle(np.zeros((64, 80), np.uint8))),
        "annotation 1, the mask is empty",
    ),
    "damaged mask": (
        set_in("annotations", 1, segmentation={"size": [64, 80], "counts": "zzz"}),
        "annotation 1, counts hold a foreign character",
    ),
    "short runs": (
        set_in("annotations", 1, segmentation={"size": [64, 80], "counts": [5, 5]}),
        "annotation 1, the runs have 10 pixels, the image 5120",
    ),
    "flat polygon": (set_in("annotations", 1, segmentation=[1, 2, 3, 4, 5, 6]), "a polygon is not a list of"),
    "two corners": (set_in("annotations", 1, segmentation=[[1, 2, 3, 4]]), "a polygon has 4 coordinates"),
    "no polygon": (set_in("annotations", 1, segmentation=[[1, 2, 3, 4, None, 6]]), "is not a number"),
    "category": (
        set_in("annotations", 5, category_id=4),
        "1 annotations are of an unknown category (first: annotation 5, category_id 4)",
    ),
    "image": (
        all_of(set_in("annotations", 5, image_id=99), set_in("annotations", 3, image_id="1")),
        "2 annotations are of an unknown image (first: annotation 3, image_id 1)",
    ),
    "twice": (set_in("annotations", 5, id=4), "1 annotation ids stand twice (first: 4)"),
    "image twice": (set_in("images", 2, id=1), "1 image ids stand twice (first: 1)"),
    "category twice": (set_in("categories", 1, id=3), "1 category ids stand twice (first: 3)"),
    "no id": (
        lambda c: c["annotations"][2].pop("id"),
        "1 annotations lack a whole-number id (first: annotations[2])",
    ),
    "no size": (lambda c: c["images"][2].pop("width"), "1 images lack a whole-number id, width or height"),
    "flat image": (set_in("images", 1, width=0), "1 images have no pixels (first: image 1, 0x64 px)"),
    "crowd": (set_in("annotations", 1, iscrowd=2), "1 annotations have an iscrowd other than 0 and 1"),
    "nothing": (lambda c: c.update(annotations=[]), "'annotations' is empty; there is nothing to learn"),
    "crowds only": (
        lambda c: [one.update(iscrowd=1) for one in c["annotations"]],
        "has no object to learn or to find, of 6 annotations",
    ),
    "no list": (lambda c: c.pop("categories"), "has no list 'categories'"),
    "some masks": (
        set_in("annotations", 4, segmentation=[]),
        "1 of 6 objects have no mask (first: annotation 4); model.masks=false learns boxes only",
    ),
    "missing": (
        all_of(set_in("images", 0, file_name="a.jpg"), set_in("images", 1, file_name="b.jpg")),
        "of 3 images 2 images are missing (first: ",
    ),
    "other size": (
        all_of(set_in("images", 2, width=81), boxes_only),
        "1 images are not of the size in the JSON (first: ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_counted_and_the_first_is_named(name: str, tmp_path: Path) -> None:
    change, told = WRONG[name]
    assert told in refusal(tmp_path, change)


def test_impossible_objects_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    change = all_of(
        set_in("annotations", 1, bbox=[3, 4, 0, 5]), set_in("annotations", 2, segmentation=[[1, 2, 3, 4]])
    )
    assert "data.skip_invalid=true" in refusal(tmp_path / "refused", change)
    write_split(tmp_path, "train", 3, change=change)
    found = read_coco(tmp_path, "train", skip_invalid=True)
    assert found.num_skipped == 2
    assert [len(found.rows(place)) for place in range(3)] == [1, 1, 2]


def test_a_box_that_rounding_carries_over_the_edge_is_cut_off_there(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2, change=set_in("annotations", 0, bbox=[-0.4, 10, 20, 54.5]))
    assert read_coco(tmp_path, "train").boxes[0].tolist() == [0, 10, 19.6, 64]


def test_files_that_are_no_json_and_splits_that_are_absent_are_told(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 1)
    with pytest.raises(DataError, match=r"has no split 'val': neither instances_val.json nor .*known: train"):
        read_coco(tmp_path, "val")
    with pytest.raises(DataError, match="is no folder"):
        read_coco(tmp_path / "absent", "train")
    (tmp_path / "instances_train.json").write_text("[1, 2")
    with pytest.raises(DataError, match="not valid JSON"):
        read_coco(tmp_path, "train")
    (tmp_path / "instances_train.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="has no list 'images'"):
        read_coco(tmp_path, "train")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(DataError, match="its images are neither in"):
        read_coco(tmp_path, "train")


def test_a_damaged_image_is_told_before_training(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 3)
    (tmp_path / "images/train/001.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 images cannot be read \(first: .*001.jpg: unknown_format"):
        check_images(read_coco(tmp_path, "train"))


def test_crowds_are_kept_apart_and_need_no_mask(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2, change=set_in("annotations", 1, iscrowd=1, segmentation=[]))
    found = read_coco(tmp_path, "train")
    assert found.crowds.tolist() == [False, True, False, False]
    assert found.has_masks
    assert found.describe()["num_objects"] == 3


def test_boxes_alone_are_data_too_and_masks_may_be_passed_over(tmp_path: Path) -> None:
    write_split(tmp_path / "boxes", "train", 2, change=boxes_only)
    found = read_coco(tmp_path / "boxes", "train")
    assert not found.has_masks
    assert found.segmentation(0) is None
    with pytest.raises(DataError, match=r"4 of 4 objects have no mask .*model.masks=false"):
        read_coco(tmp_path / "boxes", "train", masks=True)
    write_split(tmp_path / "masks", "train", 2)
    assert not read_coco(tmp_path / "masks", "train", masks=False).has_masks


def test_both_splits_must_mean_the_same_by_their_categories(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2)
    write_split(tmp_path, "val", 2, change=set_in("categories", 1, name="house"))
    train = read_coco(tmp_path, "train")
    with pytest.raises(DataError, match=r"category 7 is 'house', in .* 'brick'"):
        check_same_categories(train, read_coco(tmp_path, "val"))
    write_split(tmp_path, "more", 2, change=lambda c: c["categories"].append({"id": 9, "name": "egg"}))
    with pytest.raises(DataError, match=r"category 9 is 'egg', in .* absent"):
        check_same_categories(train, read_coco(tmp_path, "more"))
    with pytest.raises(DataError, match="lacks category 9 'egg'"):
        check_same_categories(read_coco(tmp_path, "more"), train)
    check_same_categories(train, train)


def forms_of(mask: NDArray[np.uint8]) -> dict[str, Any]:
    """A brick's mask in all the forms that COCO's JSON knows."""
    left, top, width, height = box_of(mask)
    right, bottom = left + width, top + height
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    return {
        "polygons": [[left, top, right, top, right, bottom, left, bottom]],
        "runs": {"size": list(mask.shape), "counts": counts if not flat[0] else [0, *counts]},
        "compressed": rle(mask),
    }


@pytest.mark.parametrize("sides", [(5, 9), (80, 3), (80, 64)])
def test_polygons_and_both_kinds_of_run_lengths_give_the_same_mask(sides: tuple[int, int]) -> None:
    mask = brick(0, 0, sides)
    for name, form in forms_of(mask).items():
        assert fault_of(form, HEIGHT, WIDTH) is None, name
        assert np.array_equal(decode(form, HEIGHT, WIDTH), mask), name
        assert encode(decode(form, HEIGHT, WIDTH)) == rle(mask), name


def test_an_object_of_two_parts_is_one_mask() -> None:
    parts = [forms_of(brick(2, 3, (5, 6)))["polygons"][0], forms_of(brick(20, 30, (7, 8)))["polygons"][0]]
    assert decode(parts, HEIGHT, WIDTH).sum() == 30 + 56


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_compressed_run_lengths_are_read_as_pycocotools_reads_them(
    seed: int, height: int, width: int, density: float
) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < density).astype(np.uint8)
    packed = rle(mask)
    runs = runs_of(packed["counts"])
    values = np.arange(len(runs)) % 2
    assert np.array_equal(np.repeat(values, runs).reshape(width, height).T, mask)
    told = fault_of(packed, height, width)
    assert (told == "the mask is empty") == (not mask.any())
    if mask.any():
        assert tight_boxes(mask[None])[0].tolist() == coco_to_corners(
            coco_mask.toBbox(to_rle(packed, height, width))
        )


def coco_to_corners(box: NDArray[np.float64]) -> list[float]:
    left, top, width, height = box.tolist()
    return [left, top, left + width, top + height]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=20))
def test_no_text_for_run_lengths_reaches_pycocotools_unless_it_fills_the_image(counts: str) -> None:
    segmentation = {"size": [7, 5], "counts": counts}
    if fault_of(segmentation, 7, 5) is None:
        assert decode(segmentation, 7, 5).sum() == sum(runs_of(counts)[1::2])
    else:
        assert "\n" not in str(fault_of(segmentation, 7, 5))


def test_the_pixels_of_a_file_that_shrank_since_it_was_checked_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2)
    found = read_coco(tmp_path, "train")
    content = json.loads((tmp_path / "instances_train.json").read_text())
    content["images"][0]["width"] = 79
    assert found.image(0).shape == (HEIGHT, WIDTH, 3)
    (tmp_path / "images/train/000.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        found.image(0)


@pytest.mark.parametrize(
    ("name", "num_objects", "has_masks"), [("nuclei", 4485, True), ("raccoon", 44, False)]
)
def test_real_sets_are_read_whole(name: str, num_objects: int, has_masks: bool) -> None:
    found = read_coco(real_data(name), "val")
    check_images(found)
    assert found.describe()["num_objects"] == num_objects
    assert found.has_masks == has_masks
    if has_masks:
        for row in range(0, num_objects, 45):
            place = int(np.searchsorted(found.starts, row, side="right")) - 1
            height, width = found.sizes[place].tolist()
            mask = decode(found.segmentation(row) or [], height, width)
            assert mask.sum() == found.areas[row]
            assert tight_boxes(mask[None])[0].tolist() == found.boxes[row].tolist()


def test_a_disc_has_the_box_of_its_pixels() -> None:
    masks = np.stack([disc(20, 30, 5), disc(40.5, 12, 3)])
    boxes = tight_boxes(masks)
    assert boxes.tolist() == [coco_to_corners(np.array(box_of(mask))) for mask in masks]
