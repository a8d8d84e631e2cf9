from __future__ import annotations

import json
from pathlib import Path

import pytest
from build_material import build, class_folders, images_and_labels, in_order, png, stored, write_files
from small_shards import jpeg

from pretrain.data.manifest import Manifest
from pretrain.errors import DataError


def test_class_folders_become_labels_by_their_sorted_names(tmp_path: Path) -> None:
    files = class_folders(tmp_path / "in", {"zebra": 3, "ant": 2, "Bee/deep": 4})
    build(tmp_path / "in", tmp_path / "out")
    label_of = {"Bee": 0, "ant": 1, "zebra": 2}
    expected = [(data, label_of[name.split("/")[0]]) for name, data in files.items()]
    assert images_and_labels(tmp_path / "out") == in_order(expected)
    assert Manifest.load(tmp_path / "out").class_names == ("Bee", "ant", "zebra")


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    files = {"b.PNG": png(0), "a.jpeg": jpeg(1, 12, 14)}
    build(write_files(tmp_path / "in", files), tmp_path / "out")
    assert images_and_labels(tmp_path / "out") == in_order((data, None) for data in files.values())
    assert Manifest.load(tmp_path / "out").class_names == ()


def test_the_extension_follows_the_bytes_and_not_the_name(tmp_path: Path) -> None:
    build(write_files(tmp_path / "in", {"a.JPEG": png(0)}), tmp_path / "out")
    assert stored(tmp_path / "out") == {"000000": {"png": png(0)}}


def test_split_folders_share_one_list_of_classes_and_test_may_be_flat(tmp_path: Path) -> None:
    train = class_folders(tmp_path / "in" / "train", {"a": 2, "b": 1, "c": 1})
    val = class_folders(tmp_path / "in" / "valid", {"c": 2, "b": 1}, first=50)
    write_files(tmp_path / "in" / "test", {"x.jpg": jpeg(99, 12, 14)})
    build(tmp_path / "in", tmp_path / "out")
    for split, files in (("train", train), ("val", val)):
        expected = [(data, "abc".index(name[0])) for name, data in files.items()]
        assert images_and_labels(tmp_path / "out", split) == in_order(expected)
    assert images_and_labels(tmp_path / "out", "test") == [(jpeg(99, 12, 14), None)]
    assert Manifest.load(tmp_path / "out").split_names == ("train", "val", "test")


def test_what_is_no_image_is_counted_and_told(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"a": 2})
    others = {"a/.hidden.jpg": b"", "a/note.txt": b"", "a/b.TXT": b"", "README": b"", "a/c.tif": b""}
    write_files(tmp_path / "in", others)
    result, lines = build(tmp_path / "in", tmp_path / "out")
    assert result.num_samples == 2
    assert "skipped not images: 1 .tif, 2 .txt, 1 hidden, 1 without extension" in lines


def test_names_in_the_source_are_kept_on_request(tmp_path: Path) -> None:
    files = class_folders(tmp_path / "in", {"a": 2, "ü": 1})
    build(tmp_path / "in", tmp_path / "out", keep_names=True)
    found = {
        json.loads(members["json"])["source"]: members["jpg"] for members in stored(tmp_path / "out").values()
    }
    assert found == files


def test_a_link_that_leaves_the_source_is_refused_unless_asked_for(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"a": 1})
    (tmp_path / "secret.jpg").write_bytes(jpeg(7, 12, 14))
    (tmp_path / "in" / "a" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match=r"link\.jpg: a symbolic link that leads out of .*--follow-symlinks"):
        build(tmp_path / "in", tmp_path / "out")
    result, _ = build(tmp_path / "in", tmp_path / "other", follow_symlinks=True)
    assert result.num_samples == 2


def test_a_class_folder_that_is_a_link_out_is_refused_too(tmp_path: Path) -> None:
    class_folders(tmp_path / "elsewhere", {"b": 1})
    class_folders(tmp_path / "in", {"a": 1})
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    with pytest.raises(DataError, match="symbolic link that leads out"):
        build(tmp_path / "in", tmp_path / "out")


def test_links_within_the_source_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"a": 1})
    (tmp_path / "in" / "a" / "again.jpg").symlink_to(tmp_path / "in" / "a" / "0.jpg")
    assert build(tmp_path / "in", tmp_path / "out")[0].num_samples == 2
    (tmp_path / "in" / "a" / "round").symlink_to(tmp_path / "in" / "a")
    with pytest.raises(DataError, match="in a circle"):
        build(tmp_path / "in", tmp_path / "other")


@pytest.mark.parametrize(
    ("files", "settings", "told"),
    [
        (["a/0.jpg", "1.jpg"], {}, "folders cannot be classes; move one of them, or give --no-labels"),
        (["a/0.jpg", "b/note.txt"], {}, "b: a class folder without images would move the labels"),
        (["train/a/0.jpg", "other/1.jpg"], {}, "'train' is a split but 'other' beside it is not"),
        (["train/a/0.jpg", "val/a/1.jpg"], {"split": "test"}, "holds the splits train, val, so --split test"),
        (["val/a/0.jpg", "valid/a/1.jpg"], {}, "name one split twice"),
        (["note.txt"], {}, r"no images in split train \(not images: 1 \.txt\)"),
        ([], {}, "no images in split train"),
    ],
)
def test_ambiguous_folders_are_refused(
    tmp_path: Path, files: list[str], settings: dict[str, str], told: str
) -> None:
    (tmp_path / "in").mkdir()
    write_files(tmp_path / "in", {name: jpeg(0, 12, 14) for name in files})
    with pytest.raises(DataError, match=told):
        build(tmp_path / "in", tmp_path / "out", **settings)


def test_without_labels_folders_at_any_depth_are_one_heap(tmp_path: Path) -> None:
    names = ["0.jpg", "a/1.jpg", "a/b/2.jpg"]
    files = {name: jpeg(number, 12, 14) for number, name in enumerate(names)}
    build(write_files(tmp_path / "in", files), tmp_path / "out", labels=False, split="extra")
    assert images_and_labels(tmp_path / "out", "extra") == in_order((data, None) for data in files.values())
