from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from range_server import Fault, RangeServer
from safetensors.numpy import load_file, save_file
from small_shards import Member, make_shards, real_data, samples, tar_bytes, write_shard

from pretrain.data.columns import SampleColumns
from pretrain.data.index_columns import SAMPLE_COLUMNS, SHARD_COLUMNS
from pretrain.data.indexing import index_folder, natural_key, shard_names, split_of
from pretrain.data.manifest import Manifest, shards_hash
from pretrain.data.storage import Location, StorageConfig, parse_location
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


Columns = dict[str, Any]


def rewrite(folder: Path, change: Callable[[Columns], object]) -> None:
    """Change the columns of an index and everything that vouches for them, as one who means harm can."""
    columns = load_file(folder / "index.safetensors")
    change(columns)
    save_file(columns, folder / "index.safetensors")
    index = json.loads((folder / "index.json").read_text())
    own = {name: columns[f"shards.{name}"] for name in SHARD_COLUMNS if f"shards.{name}" in columns}
    if len(own) == len(SHARD_COLUMNS):
        index["shards_sha256"] = shards_hash(own, tuple(index["split_names"]))
    index["columns_sha256"] = hashlib.sha256((folder / "index.safetensors").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def setting(name: str, value: Any, dtype: str) -> Callable[[Columns], object]:
    return lambda columns: columns.update({name: np.array(value, dtype=dtype)})


def named(*names: bytes) -> Callable[[Columns], object]:
    """The two shards under other names."""

    def change(columns: Columns) -> None:
        columns["shards.names"] = np.frombuffer(b"".join(names), dtype=np.uint8)
        columns["shards.name_ends"] = np.cumsum([len(name) for name in names], dtype=np.int64)

    return change


def without_shards(columns: Columns) -> None:
    for name in columns:
        columns[name] = columns[name][:0]


HOSTILE: dict[str, tuple[Callable[[Columns], object], str]] = {
    "negative count": (setting("shards.num_samples", [3, -2], "int64"), "num_samples goes from -2"),
    "no samples": (setting("shards.num_samples", [3, 0], "int64"), "num_samples goes from 0"),
    "huge counts": (setting("shards.num_samples", [2**62, 2**62], "int64"), "num_samples goes from"),
    "counts that sum to few": (setting("shards.num_samples", [2**63 - 1, 2**63 - 1], "int64"), "goes from"),
    "more samples than columns": (setting("shards.num_samples", [3, 3], "int64"), "starts is I64"),
    "negative bytes": (setting("shards.num_bytes", [-1, 9], "int64"), "num_bytes goes from -1"),
    "float": (setting("shards.num_samples", [3, 2], "float64"), "is F64"),
    "narrow": (setting("shards.name_ends", [11, 22], "int32"), "is I32"),
    "float samples": (setting("samples.labels", [0] * 5, "float32"), "labels is F32"),
    "2-d": (setting("shards.num_samples", [[3], [2]], "int64"), r"\[2, 1\] instead of I64 \[2\]"),
    "0-d": (setting("shards.num_samples", 3, "int64"), r"I64 \[2\] instead of I64 \[0\]"),
    "flat hashes": (setting("shards.sha256", [0] * 64, "uint8"), "sha256 is U8"),
    "short hashes": (setting("shards.sha256", [[0] * 31] * 2, "uint8"), "sha256 is U8"),
    "unequal lengths": (setting("shards.digests", [1], "uint64"), "digests is U64"),
    "no such split": (setting("shards.split", [0, 1], "uint8"), "of split 1, and there are 1"),
    "a column is absent": (lambda columns: columns.pop("shards.split"), "shards.split"),
    "no shards": (without_shards, "no shards"),
    "ends too short": (setting("shards.name_ends", [11, 20], "int64"), "name_ends does not cut"),
    "ends too long": (setting("shards.name_ends", [11, 23], "int64"), "name_ends does not cut"),
    "ends that fall": (setting("shards.name_ends", [23, 22], "int64"), "name_ends does not cut"),
    "negative ends": (setting("shards.name_ends", [-1, 22], "int64"), "name_ends does not cut"),
    "an empty name": (named(b"", b"train-1.tar"), "name_ends does not cut"),
    "not UTF-8": (named(b"a\xff.tar", b"b.tar"), "utf-8"),
    "half a character": (named(b"a\xc3", b"\xa9.tar"), "cuts a character in two"),
    "points out": (named(b"a.tar", b"../../b.tar"), "not that of a file below"),
    "points out within": (named(b"a/../b.tar", b"b.tar"), "not that of a file below"),
    "ends in dots": (named(b"a/..", b"b.tar"), "not that of a file below"),
    "absolute": (named(b"/etc/passwd", b"b.tar"), "not that of a file below"),
    "a folder": (named(b"a.tar", b"b/"), "not that of a file below"),
    "a folder before another": (named(b"a/", b"b.tar"), "not that of a file below"),
    "this folder": (named(b".", b"b.tar"), "not that of a file below"),
    "an address": (named(b"http://host/a.tar", b"b.tar"), "not that of a file below"),
    "a line break": (named(b"a\n.tar", b"b.tar"), "not that of a file below"),
    "a zero byte": (named(b"a.tar", b"b\0.tar"), "not that of a file below"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_index_that_makes_no_sense_is_refused_in_one_line_though_its_hashes_fit(
    tmp_path: Path, kind: str
) -> None:
    change, problem = HOSTILE[kind]
    make_shards(tmp_path, [3, 2])
    rewrite(tmp_path, change)
    with pytest.raises(DataError, match=problem) as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"; run `pretrain shards index {tmp_path}`")


@pytest.mark.parametrize(
    "names", [(b"a.tar", b"b.tar"), (b"x/..a.tar", b"x/y/.b."), ("é.tar".encode(), b"...")]
)
def test_unusual_names_of_files_below_the_folder_are_kept(tmp_path: Path, names: tuple[bytes, ...]) -> None:
    make_shards(tmp_path, [3, 2])
    rewrite(tmp_path, named(*names))
    assert [shard.name.encode() for shard in Manifest.load(tmp_path).shards] == list(names)


@pytest.mark.parametrize(
    ("column", "place", "value"),
    [("starts", 0, -512), ("starts", 1, 0), ("starts", 1, 2**62), ("image_begins", 0, 2**31)],
)
def test_samples_that_overlap_or_lie_outside_are_refused_though_their_digest_fits(
    tmp_path: Path, column: str, place: int, value: int
) -> None:
    make_shards(tmp_path, [3])

    def change(columns: Columns) -> None:
        columns[f"samples.{column}"][place] = value
        samples = SampleColumns(*(columns[f"samples.{name}"] for name in SAMPLE_COLUMNS))
        columns["shards.digests"] = np.array([samples.digest()], dtype=np.uint64)

    rewrite(tmp_path, change)
    manifest = Manifest.load(tmp_path)
    with pytest.raises(DataError, match=r"damaged where it speaks of train-0\.tar; run `pretrain"):
        manifest.samples(manifest.shard(0))


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"format": ' * 100_000,
        b"\xff",
        b"",
        b"[]",
        b"7",
        b"{}",
        b'{"format": "pretrain-shards-2"}',
        b'{"format": 1' + b"0" * 5000 + b"}",
    ],
)
def test_an_index_that_is_no_index_is_refused_in_one_line(tmp_path: Path, text: bytes) -> None:
    make_shards(tmp_path, [2])
    (tmp_path / "index.json").write_bytes(text)
    with pytest.raises(DataError, match="run `pretrain shards index") as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["split_names", "class_names", "shards_root", "columns_sha256"])
@pytest.mark.parametrize("value", [7, None, {}, [7]])
def test_an_entry_of_another_kind_is_refused_or_not_used(tmp_path: Path, key: str, value: object) -> None:
    make_shards(tmp_path, [2])
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, key: value}))
    if key == "columns_sha256":  # of columns that lie beside the index, shards_sha256 says enough
        assert Manifest.load(tmp_path).num_shards == 1
        return
    with pytest.raises(DataError, match="the index cannot be read"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("damage", ["removed", "cut", "changed", "another"])
def test_columns_that_go_while_a_run_starts_its_processes_are_told_in_one_line(
    tmp_path: Path, damage: str
) -> None:
    sent = pickle.dumps(make_shards(tmp_path / "a", [3]))
    make_shards(tmp_path / "b", [2])
    path = tmp_path / "a" / "index.safetensors"
    if damage == "removed":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "changed":
        rewrite(tmp_path / "a", setting("shards.num_samples", [-3], "int64"))
    else:
        shutil.copy(tmp_path / "b" / "index.safetensors", path)
    with pytest.raises(
        DataError, match=r"safetensors: was changed or removed while it was in use; start again"
    ):
        pickle.loads(sent)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """Indexed shards on a web server, and a cache of indexes of our own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    make_shards(tmp_path / "served", [3, 2])
    with RangeServer(tmp_path / "served") as server:
        yield server


def copies(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "caches" / "pretrain" / "indexes").iterdir())


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda data: b""])
def test_a_damaged_copy_of_remote_columns_is_fetched_again_and_a_sound_one_is_not(
    tmp_path: Path, served: RangeServer, damage: Callable[[bytes], bytes]
) -> None:
    first = Manifest.load(served.url)
    (copy,) = copies(tmp_path)
    sound = copy.read_bytes()
    num_sent = served.num_sent["index.safetensors"]
    assert Manifest.load(served.url) == first
    assert served.num_sent["index.safetensors"] == num_sent
    copy.write_bytes(damage(sound))
    assert Manifest.load(served.url) == first
    assert served.num_sent["index.safetensors"] == 2 * num_sent
    assert [path.read_bytes() for path in copies(tmp_path)] == [sound]


@pytest.mark.parametrize("wrong", ["", "../../outside", "0" * 63, "A" * 64, "0" * 64 + "\n", 7, None])
def test_a_hash_that_is_none_becomes_no_path(tmp_path: Path, served: RangeServer, wrong: object) -> None:
    index = json.loads((served.folder / "index.json").read_text())
    (served.folder / "index.json").write_text(json.dumps({**index, "columns_sha256": wrong}))
    with pytest.raises(DataError, match="the index cannot be read"):
        Manifest.load(served.url)
    assert not (tmp_path / "caches").exists()
    assert served.num_sent["index.safetensors"] == 0


@pytest.mark.timeout(30)
@pytest.mark.parametrize("num_before", [0, 2])
def test_the_given_deadline_holds_for_the_index_and_for_its_columns(
    served: RangeServer, num_before: int
) -> None:
    served.faults += [Fault()] * num_before  # index.json takes two requests
    served.always = Fault(stall_after_bytes=0)
    begin = time.monotonic()
    with pytest.raises(DataError, match=["index.json", "index.safetensors"][num_before > 0]):
        Manifest.load(served.url, StorageConfig(timeout_seconds=0.5, retry_seconds=()))
    assert time.monotonic() - begin < 5


def test_the_remedy_is_one_that_the_folder_allows(served: RangeServer) -> None:
    (served.folder / "index.json").unlink()
    with pytest.raises(
        DataError, match=r"; index the folder where it lies and serve index\.json and index\.saf"
    ):
        Manifest.load(served.url)


@pytest.mark.parametrize("url", ["s3://bucket/set", "hf://datasets/a/b"])
def test_for_a_store_the_remedy_names_a_folder_for_the_index(tmp_path: Path, url: str) -> None:
    location = Location(url)
    assert dataclasses.replace(make_shards(tmp_path, [1]), folder=location).again == (
        f"run `pretrain shards index {url} --out DIR`"
    )


@pytest.mark.parametrize("name", ["0²1.tar", "①.tar", "٣.tar"])
def test_digits_of_any_script_may_stand_in_a_name(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / name, samples(0, 1))
    assert [shard.name for shard in index_folder(tmp_path).shards] == [name]
    assert sorted(["a10", "a9", "a²"], key=natural_key) == ["a9", "a10", "a²"]


def test_names_that_are_not_utf_8_are_refused_in_one_line_that_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.tar")
    write_shard(tmp_path / name, samples(0, 1))
    with pytest.raises(DataError, match=r"'\\udcff\.tar': its name is not UTF-8; rename it") as caught:
        shard_names(parse_location(tmp_path))
    str(caught.value).encode()
    folder = tmp_path / os.fsdecode(b"a\xff")
    folder.mkdir()
    write_shard(folder / "0.tar", samples(0, 1))
    for shards, out in ((folder, None), (folder, tmp_path / "out"), (tmp_path / "b", folder)):
        with pytest.raises(
            DataError, match=r"folder '.*a\\udcff': its name is not UTF-8; rename it"
        ) as caught:
            index_folder(shards, out=out)
        str(caught.value).encode()
    assert not (tmp_path / "out").exists()


def test_our_own_sizes_files_do_not_speak_against_a_rebuilt_shard_wherever_the_index_goes(
    tmp_path: Path,
) -> None:
    make_shards(tmp_path / "shards", [3, 2])
    assert (tmp_path / "shards" / "sizes.json").is_file()
    write_shard(tmp_path / "shards" / "train-1.tar", samples(3, 4))
    assert index_folder(tmp_path / "shards", out=tmp_path / "out").num_samples == 7
    assert index_folder(tmp_path / "shards", out=tmp_path / "out").num_samples == 7
    (tmp_path / "shards" / "sizes.json").write_text(
        '{"train-0.tar": 3, "train-1.tar": 2}'
    )  # another's by now
    with pytest.raises(DataError, match=r"sizes\.json counts 2 samples in train-1\.tar, there are 4"):
        index_folder(tmp_path / "shards", out=tmp_path / "out")


def test_a_deeply_nested_sizes_file_is_told_in_one_line(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", samples(0, 1))
    (tmp_path / "sizes.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"sizes\.json: is not JSON"):
        index_folder(tmp_path)
