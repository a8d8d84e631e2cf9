from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from build_material import build, images_and_labels, in_order, stored
from small_shards import jpeg, tar_bytes

from pretrain.data.manifest import Manifest
from pretrain.errors import DataError

SYNSETS = ("n02119789", "n01440764", "n03995372")  # not in order
SORTED = sorted(SYNSETS)


def train_files(per_synset: int = 3) -> dict[str, dict[str, bytes]]:
    return {
        synset: {f"{synset}_{number}.JPEG": jpeg(10 * place + number, 12, 14) for number in range(per_synset)}
        for place, synset in enumerate(SYNSETS)
    }


def write_train(folder: Path, files: dict[str, dict[str, bytes]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    inner = [(f"{synset}.tar", tar_bytes(images.items())) for synset, images in files.items()]
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    return folder


def write_val(folder: Path, num_images: int = 4) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(100 + number, 12, 14) for number in range(1, num_images + 1)
    }
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(files.items()))
    return files


VAL_SYNSETS = ["n03995372", "n01440764", "n02119789", "n01440764"]
LABEL_FILES = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"ILSVRC2012_val_{n:08d},{s} 1 2 3 4 {s} 5 6 7 8 \n" for n, s in enumerate(VAL_SYNSETS, 1)),
    "val_labels.txt": "".join(f"ILSVRC2012_val_{n:08d}.JPEG {s}\n" for n, s in enumerate(VAL_SYNSETS, 1)),
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{s}\n" for s in VAL_SYNSETS),
}


@pytest.mark.parametrize("name", LABEL_FILES)
def test_the_tars_as_distributed_give_every_image_its_label(tmp_path: Path, name: str) -> None:
    train = train_files()
    write_train(tmp_path / "in", train)
    val = write_val(tmp_path / "in")
    (tmp_path / "in" / name).write_text(LABEL_FILES[name])
    build(tmp_path / "in", tmp_path / "out")
    expected = [(data, SORTED.index(synset)) for synset, images in train.items() for data in images.values()]
    assert images_and_labels(tmp_path / "out", "train") == in_order(expected)
    expected = [(data, SORTED.index(s)) for data, s in zip(val.values(), VAL_SYNSETS, strict=True)]
    assert images_and_labels(tmp_path / "out", "val") == in_order(expected)
    assert Manifest.load(tmp_path / "out").class_names == tuple(SORTED)


def test_the_tars_of_the_synsets_may_lie_by_themselves(tmp_path: Path) -> None:
    train = train_files()
    (tmp_path / "in").mkdir()
    for synset, images in train.items():
        (tmp_path / "in" / f"{synset}.tar").write_bytes(tar_bytes(images.items()))
    build(tmp_path / "in", tmp_path / "out")
    write_train(tmp_path / "nested", train)
    build(tmp_path / "nested", tmp_path / "other", name="out")
    assert images_and_labels(tmp_path / "out") == images_and_labels(tmp_path / "other")


def test_names_are_those_in_the_tars(tmp_path: Path) -> None:
    train = train_files(1)
    build(write_train(tmp_path / "in", train), tmp_path / "out", keep_names=True, shuffle=False)
    sources = [members["json"] for members in stored(tmp_path / "out").values()]
    assert sources == [f'{{"source": "{synset}/{synset}_0.JPEG"}}'.encode() for synset in SORTED]


def test_validation_images_without_a_file_of_labels_are_unlabelled_and_it_is_told(tmp_path: Path) -> None:
    val = write_val(tmp_path / "in")
    _, lines = build(tmp_path / "in", tmp_path / "out")
    assert images_and_labels(tmp_path / "out", "val") == in_order((data, None) for data in val.values())
    assert any("val is left without labels" in line for line in lines)


def test_the_ids_of_the_challenge_need_their_mapping(tmp_path: Path) -> None:
    val = write_val(tmp_path / "in")
    (tmp_path / "in" / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n3\n")
    with pytest.raises(DataError, match=r"line 1 holds the number 2.*give --synset-ids with lines 'WNID ID'"):
        build(tmp_path / "in", tmp_path / "out")
    ids = tmp_path / "map.txt"
    ids.write_text("n02119789 1 kit_fox\nn03995372 2 drill\nn01440764 3 tench\n")
    build(tmp_path / "in", tmp_path / "other", synset_ids=ids)
    expected = [(data, SORTED.index(s)) for data, s in zip(val.values(), VAL_SYNSETS, strict=True)]
    assert images_and_labels(tmp_path / "other", "val") == in_order(expected)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ("ILSVRC2012_val_00000001.JPEG 65\n", "line 1 holds the number 65"),
        ("ILSVRC2012_val_00000001.JPEG tench\n", "'tench' is no WordNet id"),
        ("n01440764\n" * 3, "'ILSVRC2012_val_00000004.JPEG' has no label"),
        ("n01440764\n" * 5, "4 images, but 5 labels"),
        ("n01440764\n" * 3 + "n09999999\n", "labelled n09999999, which the train tar does not hold"),
        ("a n01440764\na n01440764\n", "line 2: a is there twice"),
        ("\n", "holds no labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: str, told: str) -> None:
    write_train(tmp_path / "in", train_files(1))
    write_val(tmp_path / "in")
    (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(DataError, match=told):
        build(tmp_path / "in", tmp_path / "out", val_labels=tmp_path / "labels.txt")


def damaged(kind: str) -> bytes:
    train = train_files()
    inner = {synset: bytearray(tar_bytes(images.items())) for synset, images in train.items()}
    hurt = inner[SYNSETS[1]]
    with tarfile.open(fileobj=io.BytesIO(hurt)) as tar:
        second = tar.getmembers()[1].offset
    if kind == "inner header zeroed":
        hurt[second : second + 512] = bytes(512)
    elif kind == "inner header rotten":
        hurt[second + 5] ^= 0x40
    elif kind == "inner cut":
        del hurt[second:]
    outer = tar_bytes([(f"{synset}.tar", bytes(data)) for synset, data in inner.items()])
    if kind == "outer cut":
        return outer[: len(outer) // 2]
    return outer[:-10240] if kind == "no outer end" else outer


@pytest.mark.parametrize(
    "kind", ["inner header zeroed", "inner header rotten", "inner cut", "outer cut", "no outer end"]
)
def test_no_damage_of_the_tars_is_silent(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ILSVRC2012_img_train.tar").write_bytes(damaged(kind))
    with pytest.raises(DataError, match="damaged or cut short"):
        build(tmp_path / "in", tmp_path / "out")


def test_a_train_tar_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes([("a.JPEG", jpeg(0))]))
    with pytest.raises(DataError, match=r"'a\.JPEG' is not a tar named by a WordNet id"):
        build(tmp_path / "in", tmp_path / "out")
