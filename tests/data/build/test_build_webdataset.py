from __future__ import annotations

import json
from pathlib import Path

import pytest
from build_material import build, images_and_labels, in_order, stored, write_files
from small_shards import Member, jpeg, real_data, samples, tar_bytes, write_shard

from pretrain.data.indexing import index_folder
from pretrain.data.manifest import Manifest
from pretrain.errors import DataError


def pairs(members: list[Member]) -> list[tuple[bytes, int | None]]:
    images = {name[:-4]: data for name, data in members if name.endswith(".jpg")}
    labels = {name[:-4]: int(data) for name, data in members if name.endswith(".cls")}
    return in_order((data, labels.get(key)) for key, data in images.items())


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_shards_are_cut_anew_without_loss_and_keep_their_splits(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "in").mkdir()
    first, second, third = samples(0, 5), samples(5, 2), samples(40, 3)
    write_shard(tmp_path / "in" / f"a-train-0{suffix}", first)
    write_shard(tmp_path / "in" / f"a-train-10{suffix}", second)
    write_shard(tmp_path / "in" / f"a-val-0{suffix}", third)
    (tmp_path / "in" / "classes.txt").write_text("".join(f"{n}\tid{n}\tname {n}\n" for n in range(10)))
    build(tmp_path / "in", tmp_path / "out", samples_per_shard=3)
    assert images_and_labels(tmp_path / "out", "train") == pairs(first + second)
    assert images_and_labels(tmp_path / "out", "val") == pairs(third)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.split("train").shard_sizes.tolist() == [2, 2, 3]
    assert manifest.class_names == tuple(f"name {n}" for n in range(10))


def test_splits_and_class_names_of_an_index_come_along(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "0.tar", samples(0, 2))
    (tmp_path / "in" / "classes.txt").write_text("a\nb\n")
    index_folder(tmp_path / "in")
    (tmp_path / "in" / "classes.txt").unlink()
    build(tmp_path / "in", tmp_path / "out")
    assert Manifest.load(tmp_path / "out").class_names == ("a", "b")
    write_files(tmp_path / "flat", {"0.jpg": jpeg(0, 12, 14)})
    build(tmp_path / "flat", tmp_path / "first", split="unlabelled")
    build(tmp_path / "first", tmp_path / "second")
    assert Manifest.load(tmp_path / "second").split_names == ("unlabelled",)


MEMBERS: list[Member] = [
    ("folder/x.v1.jpg", jpeg(0, 12, 14)),
    ("folder/x.v1.txt", b"a caption"),
    ("folder/x.v1.json", b'{"label": 3, "b": [1]}'),
    ("folder/x.v1.pyd", b"cos\nsystem\n"),
]


def write_in(folder: Path, members: list[Member]) -> Path:
    folder.mkdir()
    write_shard(folder / "0.tar", members)
    return folder


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {"jpg", "cls", "json"}),
        ({"keep": ("image", "txt")}, {"jpg", "txt"}),
        ({"keep": ("image", "cls", "txt")}, {"jpg", "cls", "txt"}),
        ({"keep": ("image", "json"), "labels": False}, {"jpg", "json"}),
        ({"keep": ("image", "pyd")}, {"jpg", "pyd"}),
    ],
)
def test_other_members_are_kept_as_asked(tmp_path: Path, settings: dict[str, object], kept: set[str]) -> None:
    build(write_in(tmp_path / "in", MEMBERS), tmp_path / "out", **settings)
    (members,) = stored(tmp_path / "out").values()
    assert members.keys() == kept
    originals = {name.rpartition(".")[2]: data for name, data in MEMBERS} | {"cls": b"3"}
    assert all(data == originals[extension] for extension, data in members.items())


def test_a_name_is_added_to_the_json_that_is_there(tmp_path: Path) -> None:
    build(write_in(tmp_path / "in", MEMBERS), tmp_path / "out", keep_names=True)
    (members,) = stored(tmp_path / "out").values()
    assert json.loads(members["json"]) == {"label": 3, "b": [1], "source": "0.tar/folder/x.v1"}


@pytest.mark.parametrize(("text", "settings"), [(b"cat", {}), (b"1.5", {}), (b"", {})])
def test_a_label_that_is_no_number_is_not_dropped_in_silence(
    tmp_path: Path, text: bytes, settings: dict[str, object]
) -> None:
    source = write_in(tmp_path / "in", [("a.jpg", jpeg(0, 12, 14)), ("a.cls", text)])
    with pytest.raises(DataError, match=r"0\.tar/a\.cls holds b'.*', which is no class index"):
        build(source, tmp_path / "out")
    build(source, tmp_path / "other", labels=False)
    assert images_and_labels(tmp_path / "other") == [(jpeg(0, 12, 14), None)]


def test_a_damaged_shard_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(tar_bytes(samples(0, 4))[:-10240])
    with pytest.raises(DataError, match=r"0\.tar"):
        build(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_an_image_extension_cannot_be_kept_beside_the_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--keep png: name extensions"):
        build(tmp_path, tmp_path / "out", keep=("image", "png"))


def test_real_shards_give_the_same_images_and_labels(tmp_path: Path) -> None:
    source = real_data("cifar10-lossless-subset")
    build(source, tmp_path / "out", split="test")
    original = stored(source, "test")
    expected = in_order((members["png"], int(members["cls"])) for members in original.values())
    assert len(expected) == 1000
    assert images_and_labels(tmp_path / "out", "test") == expected
