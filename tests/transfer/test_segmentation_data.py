"""What the layouts mean, and that everything wrong with a data set is told in one line before training."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_scenes import NAMES, save_mask, scene, write_folder
from small_shards import real_data

from pretrain.errors import DataError
from pretrain.transfer.segmentation.folders import CITYSCAPES, find_data
from pretrain.transfer.segmentation.recipe import DataRecipe
from pretrain.transfer.segmentation.scenes import SceneSet, open_scenes, read_mask
from pretrain.transfer.segmentation.scores import IGNORED

# of Cityscapes' own table: id -> train id, all others are ignored
TRAIN_IDS = dict(
    zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19), strict=True)
)


def opened(folder: Path, split: str = "train", **recipe: object) -> SceneSet:
    labels, splits = find_data(folder, DataRecipe(**recipe))  # type: ignore[arg-type]
    return open_scenes(splits[split], labels, num_threads=2)


def write_cityscapes(folder: Path, kind: str = "labelIds") -> Path:
    """Two cities a split, masks that hold every id there is."""
    ids = np.tile(np.arange(34, dtype=np.uint8), (8, 2))
    values = (
        ids if kind == "labelIds" else np.vectorize(lambda i: TRAIN_IDS.get(i, 255))(ids).astype(np.uint8)
    )
    for split in ("train", "val"):
        for city in ("aachen", "bremen"):
            name = f"{city}_000001_000019"
            images = folder / "leftImg8bit" / split / city
            images.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 68, 3), np.uint8)).save(images / f"{name}_leftImg8bit.png")
            save_mask(folder / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", values)
            save_mask(folder / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", values)
    return folder


def test_both_kinds_of_cityscapes_masks_give_the_same_19_classes(tmp_path: Path) -> None:
    by_id = opened(write_cityscapes(tmp_path / "ids"))
    by_train_id = opened(write_cityscapes(tmp_path / "train_ids", "labelTrainIds"))
    assert [scene.name for scene in by_id.split.scenes] == [
        "aachen/aachen_000001_000019",
        "bremen/bremen_000001_000019",
    ]
    classes = by_id.classes_of(0)
    assert np.array_equal(classes, by_train_id.classes_of(0))
    expected = np.array([TRAIN_IDS.get(number, IGNORED) for number in range(34)])
    assert np.array_equal(classes, np.tile(expected, (8, 2)))
    assert by_id.labels.classes == by_train_id.labels.classes == tuple(name for name, _, _ in CITYSCAPES)
    assert by_id.labels.classes[:3] == ("road", "sidewalk", "building")
    assert torch.equal(by_id.pixels, torch.full((19,), 2 * 8 * 2))
    assert by_id.num_ignored == 2 * 8 * 2 * 15


def test_the_license_plate_is_left_out(tmp_path: Path) -> None:
    folder = write_cityscapes(tmp_path)
    path = next((folder / "gtFine/train/aachen").glob("*labelIds.png"))
    values = read_mask(path).astype(np.uint8)
    values[0] = 255  # -1 as a byte
    save_mask(path, values)
    assert (opened(folder).classes_of(0)[0] == IGNORED).all()


def test_plain_folders_are_read_as_their_masks_say(tmp_path: Path) -> None:
    scenes = opened(write_folder(tmp_path))
    assert scenes.labels.classes == NAMES
    image, classes = scene(3)
    assert np.array_equal(scenes.image(3), image)
    assert np.array_equal(scenes.classes_of(3), classes)
    every = np.concatenate([scene(number)[1].ravel() for number in range(6)])
    assert scenes.pixels.tolist() == [(every == number).sum() for number in range(3)]
    assert scenes.num_ignored == (every == IGNORED).sum()


def test_a_class_that_is_ignored_has_no_output_and_the_rest_close_ranks(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    for path in folder.glob("masks/*/*.png"):
        values = read_mask(path).astype(np.uint8)
        values[values == IGNORED] = 1
        save_mask(path, values)
    scenes = opened(folder, ignore_label=1)
    assert scenes.labels.classes == ("sky", "car")
    _, classes = scene(0)
    expected = np.select([classes == 0, classes == 2], [0, 1], IGNORED)
    assert np.array_equal(scenes.classes_of(0), expected)


def test_masks_of_16_bits_are_read_by_their_values(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    for path in folder.glob("masks/*/*.png"):
        values = read_mask(path).astype(np.uint16)
        values[values == IGNORED] = 65535
        save_mask(path, values)
    scenes = opened(folder, ignore_label=65535)
    assert np.array_equal(scenes.classes_of(2), scene(2)[1])


def test_what_a_set_is_known_by_changes_with_one_pixel_of_a_mask(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    before = opened(folder).sha256
    assert opened(folder).sha256 == before
    path = folder / "masks/train/000.png"
    values = read_mask(path).astype(np.uint8)
    values[-1, -1] = 2 if values[-1, -1] != 2 else 1
    save_mask(path, values)
    assert opened(folder).sha256 != before


def test_camvid_is_what_its_description_says() -> None:
    scenes = opened(real_data("camvid"), ignore_label=11, test_split="test")
    assert len(scenes) == 367
    assert scenes.labels.classes[0] == "Sky"
    assert len(scenes.labels.classes) == 11
    total = scenes.num_ignored + int(scenes.pixels.sum())
    shares = [round(100 * int(count) / total, 1) for count in scenes.pixels]
    assert shares == pytest.approx([16.9, 23.3, 1.0, 31.7, 4.5, 9.7, 1.2, 1.1, 5.9, 0.6, 0.3], abs=0.11)


def mask(folder: Path, number: int = 0) -> Path:
    return folder / f"masks/train/{number:03d}.png"


def paint(folder: Path, value: int) -> None:
    for number in (1, 4):
        values = read_mask(mask(folder, number)).astype(np.uint8)
        values[5, :3] = value
        save_mask(mask(folder, number), values)


def save_as(folder: Path, mode: str) -> None:
    with Image.open(mask(folder, 2)) as image:
        image.convert(mode).save(mask(folder, 2))


def empty(folder: Path) -> None:
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind / "train")
        (folder / kind / "train").mkdir()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def without_labels(folder: Path) -> None:
    for number in range(6):
        save_mask(mask(folder, number), np.full((32, 48), IGNORED, np.uint8))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown ids": (
        lambda f: paint(f, 9),
        r"unknown to classes\.txt.*: 9 \(6 px in 2 masks, first .*001\.png",
    ),
    "no mask": (lambda f: mask(f, 3).unlink(), r"1 images have no mask in .*masks/train.*003\.png"),
    "no image": (lambda f: (f / "images/train/003.png").unlink(), "1 masks have no image in .*images/train"),
    "sizes": (
        lambda f: save_mask(mask(f, 2), np.zeros((32, 40), np.uint8)),
        r"002\.png: 32 x 40 px, but its image 002\.png has 32 x 48 px",
    ),
    "palette": (lambda f: save_as(f, "P"), r"002\.png: the mask is a palette of 8 bits; .*indices"),
    "colours": (lambda f: save_as(f, "RGB"), r"002\.png: the mask is RGB of 8 bits; save it as grey PNG"),
    "one bit": (lambda f: save_as(f, "1"), r"002\.png: the mask is grey of 1 bits"),
    "no png": (lambda f: mask(f).write_bytes(b"GIF89a" + bytes(40)), "is not a PNG"),
    "damaged mask": (lambda f: cut_short(mask(f)), r"000\.png: cannot be decoded"),
    "damaged image": (lambda f: cut_short(f / "images/train/000.png"), r"000\.png: cannot be decoded"),
    "empty": (empty, "images/train: holds no images"),
    "split": (lambda f: (f / "masks/val").rename(f / "masks/valid"), "no split 'val'; did you mean 'valid'"),
    "folder": (lambda f: shutil.rmtree(f / "images"), r"images: no such folder; --data wants"),
    "classes": (lambda f: (f / "classes.txt").unlink(), r"classes\.txt: cannot be read .*one a line"),
    "empty line": (lambda f: (f / "classes.txt").write_text("sky\n\ncar\n"), "line 2 is empty"),
    "one class": (lambda f: (f / "classes.txt").write_text("sky\n"), "1 classes besides"),
    "no labels": (without_labels, "label no pixel"),
    "twice": (
        lambda f: shutil.copy(f / "images/train/000.png", f / "images/train/000.jpg"),
        "has the same name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_one_line(case: str, tmp_path: Path) -> None:
    damage, told = WRONG[case]
    folder = write_folder(tmp_path)
    damage(folder)
    with pytest.raises(DataError) as error:
        opened(folder)
    assert re.search(told, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("gtFine/val", "no split 'val'; did you mean"),
        ("gtFine/*/*/*labelIds.png", "holds no CITY/\\*_gtFine_labelIds.png; unpack gtFine"),
        ("leftImg8bit/train/aachen/*", "1 masks have no image"),
        ("gtFine/val/bremen/*labelIds.png", "1 images have no mask"),
    ],
)
def test_what_is_missing_of_cityscapes_is_told(gone: str, told: str, tmp_path: Path) -> None:
    folder = write_cityscapes(tmp_path)
    for path in folder.glob(gone):
        if path.is_dir():
            shutil.rmtree(path)
            path.with_name("valid").mkdir()
        else:
            path.unlink()
    with pytest.raises(DataError, match=told):
        opened(folder)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        opened(tmp_path / "nowhere")
