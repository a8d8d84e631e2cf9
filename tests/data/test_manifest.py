from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from pathlib import Path

import pytest
from small_shards import Member, make_shards, real_data, samples, tar_bytes, write_shard

from pretrain.data.indexing import index_folder, split_of
from pretrain.data.manifest import Manifest
from pretrain.errors import DataError


def test_an_index_names_shards_in_natural_order_with_their_splits_and_classes(tmp_path: Path) -> None:
    for name, first in (("set-train-10.tar", 2), ("set-train-9.tar", 0), ("set-validation-1.tar.gz", 5)):
        write_shard(tmp_path / name, samples(first, 2))
    (tmp_path / "classes.txt").write_text("0\tn01\ttench\n1\tn02\tgoldfish, Carassius\n")
    manifest = index_folder(tmp_path)
    assert [shard.name for shard in manifest.shards] == [
        "set-train-9.tar",
        "set-train-10.tar",
        "set-validation-1.tar.gz",
    ]
    assert manifest.class_names == ("tench", "goldfish, Carassius")
    assert manifest.split("train").shard_sizes.tolist() == [2, 2]
    assert manifest.split("val").first_sample_ids.tolist() == [4]
    with pytest.raises(DataError, match=r"no split 'tran'; did you mean 'train'"):
        manifest.split("tran")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a-test-0.tar", "test"),
        ("VAL_3.tar", "val"),
        ("imagenet-sample-0000.tar", "train"),
        ("latest-1.tar", "train"),
    ],
)
def test_the_split_is_a_whole_word_of_the_file_name(name: str, split: str) -> None:
    assert split_of(name) == split


def test_loading_gives_back_what_indexing_found(tmp_path: Path) -> None:
    built = make_shards(tmp_path, [3, 2])
    loaded = Manifest.load(tmp_path)
    assert loaded == built
    assert loaded.hash == built.hash
    assert loaded.samples(loaded.shard(1)).starts.tolist() == built.samples(built.shard(1)).starts.tolist()


def test_offsets_point_at_the_first_header_of_each_sample_also_with_long_names(tmp_path: Path) -> None:
    members = [("./" + "x" * 150 + f"/{number}.jpg", samples(number, 1)[0][1]) for number in range(3)]
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
            folder = tarfile.TarInfo("./folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        manifest = index_folder(tmp_path)
        content = manifest.shard(0).path.read_bytes()
        starts = manifest.samples(manifest.shard(0)).starts
        for (name, data), begin, end in zip(members, starts, starts[1:], strict=False):
            with tarfile.open(fileobj=io.BytesIO(content[begin:end])) as part:
                (member,) = part.getmembers()
                assert member.name == name
                file = part.extractfile(member)
                assert file is not None
                assert file.read() == data


def test_compressed_and_plain_shards_have_the_same_offsets(tmp_path: Path) -> None:
    plain, packed = make_shards(tmp_path / "a", [4]), make_shards(tmp_path / "b", [4], suffix=".tgz")
    assert plain.samples(plain.shard(0)).digest() == packed.samples(packed.shard(0)).digest()
    assert plain.hash != packed.hash


def test_the_index_may_lie_elsewhere_and_move_with_its_shards(tmp_path: Path) -> None:
    (tmp_path / "here" / "shards").mkdir(parents=True)
    write_shard(tmp_path / "here" / "shards" / "0.tar", samples(0, 2))
    index_folder(tmp_path / "here" / "shards", out=tmp_path / "here" / "index")
    assert [path.name for path in (tmp_path / "here" / "shards").iterdir()] == ["0.tar"]
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert Manifest.load(tmp_path / "there" / "index").shards[0].path.is_file()


def test_a_folder_without_index_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no index\.json; run `pretrain shards index {tmp_path}`"):
        Manifest.load(tmp_path)


def test_all_missing_and_changed_shards_are_listed_in_one_line(tmp_path: Path) -> None:
    make_shards(tmp_path, [2, 2, 2, 2])
    (tmp_path / "train-0.tar").unlink()
    (tmp_path / "train-2.tar").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        Manifest.load(tmp_path).check_shards()
    message = str(caught.value)
    assert "2 of 4 shards" in message
    assert "train-0.tar: no such file or directory; train-2.tar: 0 bytes instead of" in message
    assert "\n" not in message


def test_an_index_and_offsets_of_different_shards_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", [2])
    make_shards(tmp_path / "b", [3])
    shutil.copy(tmp_path / "a" / "index.json", tmp_path / "b" / "index.json")
    with pytest.raises(DataError, match=r"does not belong to index\.json"):
        Manifest.load(tmp_path / "b")


def test_a_changed_sample_changes_the_hash(tmp_path: Path) -> None:
    before = make_shards(tmp_path, [2]).hash
    members = samples(0, 2)
    write_shard(tmp_path / "train-0.tar", [*members[:-1], (members[-1][0], b"7")])
    assert index_folder(tmp_path).hash != before


SAMPLES = samples(0, 4)
IMAGE, LABEL = SAMPLES[0][1], SAMPLES[1][1]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([*SAMPLES, *samples(0, 1)], "'000000' is there twice"),
        ([("0.jpg", IMAGE), ("1.jpg", IMAGE), ("0.cls", LABEL)], "'0' has its members apart"),
        ([("0.jpg", IMAGE), ("0.jpg", IMAGE)], "'0.jpg' is there twice"),
        ([("a.v1.jpg", IMAGE), ("a.v2.jpg", IMAGE), ("a.v1.cls", LABEL)], "'a.v1' has its members apart"),
        ([("0.jpg", IMAGE), ("1.cls", LABEL)], "'1' has no image, only cls"),
        ([("0.cls", LABEL), ("1.jpg", IMAGE)], "'0' has no image, only cls"),
        ([("../0.jpg", IMAGE)], "points out of the archive"),
        ([("a/../../0.jpg", IMAGE)], "points out of the archive"),
        ([("/0.jpg", IMAGE)], "points out of the archive"),
        ([("README", b"")], "no samples in it"),
        ([], "no samples in it"),
    ],
)
def test_shards_that_would_lose_samples_are_refused(
    tmp_path: Path, members: list[Member], problem: str
) -> None:
    write_shard(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=problem):
        index_folder(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_not_plain_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.type, info.linkname = kind, "/etc/hostname"
        tar.addfile(info)
    with pytest.raises(DataError, match="is not a plain file"):
        index_folder(tmp_path)


def damaged(kind: str) -> bytes:
    """A shard of four samples, hurt in one of the ways that a plain tar reader does not notice (or does)."""
    data = bytearray(tar_bytes(SAMPLES))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        starts = {member.name: member.offset for member in tar}
        end = tar.offset - 1024
    third = starts["000002.jpg"]
    cuts = {
        "in a member": third + 700,
        "on a member boundary": third,
        "between image and label": starts["000002.cls"],
        "in a header": third + 100,
        "before the end marker": end,
        "in the end marker": end + 512,
        "empty": 0,
    }
    if kind in cuts:
        return bytes(data[: cuts[kind]])
    if kind == "header zeroed":
        data[third : third + 512] = bytes(512)
    elif kind == "header rotten":
        data[third + 5] ^= 0x40
    elif kind == "another archive appended":
        data = data + data
    return bytes(data)


DAMAGES = (
    "in a member",
    "on a member boundary",
    "between image and label",
    "in a header",
    "before the end marker",
    "in the end marker",
    "empty",
    "header zeroed",
    "header rotten",
    "another archive appended",
)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damage_is_silent(tmp_path: Path, kind: str, suffix: str) -> None:
    data = damaged(kind)
    (tmp_path / f"0{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(DataError, match=r"0\.tar.*damaged or cut short.*fetch or build this shard again"):
        index_folder(tmp_path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_compressed_shard_cut_short_is_refused(tmp_path: Path, keep: float) -> None:
    packed = gzip.compress(tar_bytes(SAMPLES))
    (tmp_path / "0.tar.gz").write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(DataError, match="damaged or cut short"):
        index_folder(tmp_path)


def test_a_shard_there_plain_and_compressed_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", samples(0, 1))
    write_shard(tmp_path / "0.tar.gz", samples(0, 1))
    with pytest.raises(DataError, match="hold the same shard; remove one"):
        index_folder(tmp_path)


def test_pickles_in_a_shard_are_bytes_and_stay_bytes(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    poison = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    write_shard(tmp_path / "0.tar", [("0.jpg", IMAGE), ("0.pyd", poison), ("0.pth", poison)])
    assert index_folder(tmp_path).num_samples == 1
    assert not canary.exists()


def test_real_shards_are_indexed_without_touching_their_folder(tmp_path: Path) -> None:
    manifest = index_folder(real_data("imagenet-sample"), out=tmp_path)
    assert manifest.num_samples == 480
    assert len(manifest.class_names) == 1000
    assert Manifest.load(tmp_path).hash == manifest.hash
