from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from build_material import build, class_folders, images_and_labels, in_order, png, stored, write_files
from PIL import Image
from small_shards import jpeg

from pretrain.data.manifest import Manifest
from pretrain.errors import DataError

CLASSES = ["airplane", "automobile"]


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A CIFAR-10 of 3 images per file in torchvision's layout, its MD5 sums put in place of the published."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    dataset = torchvision.datasets.CIFAR10
    content: dict[str, Any] = {"train": [], "test": []}
    for split, files in (("train", dataset.train_list), ("test", dataset.test_list)):
        with_sums = []
        for name, _ in files:
            pixels = rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
            labels = rng.integers(0, 2, 3).tolist()
            data = pickle.dumps({"data": pixels.reshape(3, -1), "labels": labels})
            (folder / name).write_bytes(data)
            with_sums.append([name, hashlib.md5(data).hexdigest()])
            content[split] += list(zip(pixels.transpose(0, 2, 3, 1), labels, strict=True))
        monkeypatch.setattr(dataset, f"{split}_list", with_sums)
    names = pickle.dumps({"label_names": CLASSES})
    (folder / "batches.meta").write_bytes(names)
    meta = {**dataset.meta, "md5": hashlib.md5(names).hexdigest()}
    monkeypatch.setattr(dataset, "meta", meta)
    return content


def test_pixels_of_cifar_are_stored_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_cifar10(tmp_path / "data", monkeypatch)
    build("torchvision:cifar10", tmp_path / "out", download_dir=tmp_path / "data")
    for split, expected in content.items():
        found = [
            (np.asarray(Image.open(io.BytesIO(members["png"]))).tobytes(), int(members["cls"]))
            for members in stored(tmp_path / "out", split).values()
        ]
        assert in_order(found) == in_order((pixels.tobytes(), label) for pixels, label in expected)
    assert Manifest.load(tmp_path / "out").class_names == tuple(CLASSES)


def test_the_unlabelled_images_of_stl10_have_no_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = torchvision.datasets.STL10
    folder = tmp_path / "data" / dataset.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = {
        name: rng.integers(0, 256, (2, 3, 96, 96), dtype=np.uint8) for name in ("train", "test", "unlabeled")
    }
    files = {f"{name}_X.bin": array.tobytes() for name, array in pixels.items()}
    files |= {f"{name}_y.bin": bytes([1, 10]) for name in ("train", "test")}
    files |= {"class_names.txt": b"bird\ncar\n", "fold_indices.txt": b"0 1\n"}
    write_files(folder, files)
    for kind in ("train", "test"):
        own = getattr(dataset, f"{kind}_list")
        sums = [[name, hashlib.md5(files.get(name, b"")).hexdigest()] for name, _ in own if name in files]
        monkeypatch.setattr(dataset, f"{kind}_list", sums)
    build("torchvision:stl10", tmp_path / "out", download_dir=tmp_path / "data", shuffle=False)
    assert [label for _, label in images_and_labels(tmp_path / "out", "unlabeled")] == [None, None]
    assert [members["cls"] for members in stored(tmp_path / "out", "train").values()] == [b"0", b"9"]
    first = Image.open(io.BytesIO(stored(tmp_path / "out", "unlabeled")["000000"]["png"]))
    # the file keeps columns before rows
    assert np.array_equal(np.asarray(first), pixels["unlabeled"][0].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("source", "settings", "told"),
    [
        ("torchvision:cifr10", {}, "unknown data set; did you mean 'cifar10'"),
        ("torchvision:cifar10", {}, "give --download-dir"),
        ("torchvision:cifar10", {"kind": "folder"}, "is not of --kind folder"),
        ("cifar10", {"kind": "torchvision"}, "name a data set, such as torchvision:cifar10"),
    ],
)
def test_requests_for_sets_that_cannot_be_met_are_refused(
    tmp_path: Path, source: str, settings: dict[str, str], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        build(source, tmp_path / "out", **settings)


def write_coco(folder: Path, layout: str) -> dict[str, bytes]:
    files = {f"{number}.jpg": jpeg(number, 12, 14) for number in range(3)}
    write_files(folder / layout, {**files, "not-listed.jpg": png(9)})
    images = [{"id": number, "file_name": f"{number}.jpg", "height": 12, "width": 14} for number in range(3)]
    boxes = [{"id": 7, "image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4]}]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "owl"}]}
    place = folder / ("annotations" if "2017" in layout else "")
    place.mkdir(exist_ok=True)
    (place / f"instances_{Path(layout).name}.json").write_text(json.dumps(content))
    return files


@pytest.mark.parametrize("layout", ["train2017", "images/train"])
def test_the_images_of_coco_are_taken_without_labels(tmp_path: Path, layout: str) -> None:
    files = write_coco(tmp_path / "in", layout)
    build(tmp_path / "in", tmp_path / "out")
    assert images_and_labels(tmp_path / "out") == in_order((data, None) for data in files.values())
    build(tmp_path / "in", tmp_path / "other", keep=("annotations",), shuffle=False)
    notes = [json.loads(members["json"]) for members in stored(tmp_path / "other").values()]
    assert [note["file_name"] for note in notes] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [[box["category"] for box in note["annotations"]] for note in notes] == [[], ["owl"], []]


def test_images_that_coco_names_and_are_absent_are_counted(tmp_path: Path) -> None:
    write_coco(tmp_path / "in", "images/train")
    (tmp_path / "in" / "images" / "train" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are not in .*, such as '2\.jpg'"):
        build(tmp_path / "in", tmp_path / "out")


def test_a_source_of_two_kinds_must_be_named(tmp_path: Path) -> None:
    write_coco(tmp_path / "in", "images/train")
    (tmp_path / "in" / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="holds parquet and coco data; say which with --kind"):
        build(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="no such file or folder"):
        build(tmp_path / "absent", tmp_path / "out")
    class_folders(tmp_path / "in", {"images/train/b": 1})
    assert build(tmp_path / "in" / "images" / "train" / "b", tmp_path / "out")[0].num_samples == 1
