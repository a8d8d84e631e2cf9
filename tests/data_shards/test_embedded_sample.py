"""The embedded sample as files: the same bytes every time, and careful with the folders of others."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from embedded_sample import Recipe, build, main
from figures import CLASSES
from PIL import Image

SMALL = Recipe(images=20, test_images=10)
SMALL_OPTIONS = ["--images", "20", "--test-images", "10"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "sample"
    build(SMALL, folder)
    return folder


def read_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_two_builds_give_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    assert build(SMALL, tmp_path / "again")
    first, again = (
        {path.name: path.read_bytes() for path in f.iterdir()} for f in (sample, tmp_path / "again")
    )
    assert first == again


def test_another_seed_gives_other_pictures(sample: Path, tmp_path: Path) -> None:
    build(Recipe(images=20, test_images=10, seed=1), tmp_path / "other")
    name = "sample-train-0000.tar"
    assert (sample / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_every_sample_holds_its_four_members_under_its_own_key(sample: Path) -> None:
    keys = []
    for split, count in (("train", 20), ("test", 10)):
        members = read_members(sample / f"sample-{split}-0000.tar")
        own = list(dict.fromkeys(name.split(".", 1)[0] for name in members))
        assert len(own) == count
        assert list(members) == [f"{key}.{ext}" for key in own for ext in ("jpg", "cls", "json", "mask.png")]
        keys += own
    assert len(set(keys)) == 30


def test_members_agree_with_each_other(sample: Path) -> None:
    members = read_members(sample / "sample-train-0000.tar")
    for key in {name.split(".", 1)[0] for name in members}:
        objects = json.loads(members[f"{key}.json"])["objects"]
        mask = np.asarray(Image.open(io.BytesIO(members[f"{key}.mask.png"])))
        picture = Image.open(io.BytesIO(members[f"{key}.jpg"]))
        assert picture.size == (64, 64)
        assert picture.mode == "RGB"
        assert objects[0]["class"] == int(members[f"{key}.cls"])
        assert mask.max() == len(objects)


def test_annotations_match_the_samples(sample: Path) -> None:
    coco = json.loads((sample / "instances_train.json").read_text())
    members = read_members(sample / "sample-train-0000.tar")
    objects = [
        found for name in members if name.endswith(".json") for found in json.loads(members[name])["objects"]
    ]
    assert [image["file_name"] for image in coco["images"]] == [
        name for name in members if name.endswith(".jpg")
    ]
    assert [note["bbox"] for note in coco["annotations"]] == [found["box"] for found in objects]
    assert [note["category_id"] - 1 for note in coco["annotations"]] == [found["class"] for found in objects]
    for note in coco["annotations"]:
        assert sum(note["segmentation"]["counts"]) == 64 * 64
        assert sum(note["segmentation"]["counts"][1::2]) == note["area"]
    assert (sample / "classes.txt").read_text().split() == list(CLASSES)


def test_tar_headers_tell_nothing_of_who_built_it(sample: Path) -> None:
    with tarfile.open(sample / "sample-test-0000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_a_shard_holds_at_most_five_hundred_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedded_sample.SHARD_IMAGES", 8)
    build(SMALL, tmp_path / "sample")
    sizes = [
        len(read_members(path)) // 4 for path in sorted((tmp_path / "sample").glob("sample-train-*.tar"))
    ]
    assert sizes == [8, 8, 4]


def test_the_command_indexes_and_can_be_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "sample"
    assert main([str(out), *SMALL_OPTIONS]) == 0
    assert (out / "index.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([str(out), *SMALL_OPTIONS]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "already there" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["sample"]


def test_a_foreign_folder_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([str(tmp_path), *SMALL_OPTIONS]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path) in message


def test_a_sample_of_another_recipe_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "sample"
    build(SMALL, out)
    assert main([str(out), "--images", "30", "--test-images", "10"]) == 2
    shard = out / "sample-train-0000.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[2000] ^= 1
    shard.write_bytes(damaged)
    assert main([str(out), *SMALL_OPTIONS]) == 2


@pytest.mark.parametrize(
    ("option", "value"), [("--images", "0"), ("--size-px", "8"), ("--size-px", "4096"), ("--seed", "-1")]
)
def test_impossible_sizes_are_told_in_one_line(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "sample"), option, value]) == 2
    message = capsys.readouterr().err
    assert option in message
    assert message.count("\n") == 1
