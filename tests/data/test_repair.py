from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
import tarfile
import tempfile
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
from damages import DAMAGES, SAMPLES, offsets, stored_samples, write_damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import Member, jpeg, make_shards, real_data, samples, tar_bytes, write_shard

from pretrain.data import side_by_side
from pretrain.data.audit.repair import RepairReport, format_report, repair_folder
from pretrain.data.audit.verify import verify_folder
from pretrain.data.indexing import index_folder
from pretrain.data.manifest import Manifest
from pretrain.errors import DataError


def by_key(members: list[Member]) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for name, data in members:
        found.setdefault(f"0/{name[:6]}", {})[name[7:]] = data
    return found


WHOLE = by_key(SAMPLES)


def repair(members: list[Member], folder: Path) -> tuple[RepairReport, dict[str, dict[str, bytes]]]:
    (folder / "in").mkdir()
    write_shard(folder / "in" / "0.tar", members)
    report = repair_folder(folder / "in", folder / "out", num_workers=1)
    return report, stored_samples(folder / "out")


def rejected(out: Path) -> list[tuple[str, str]]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return [(entry["code"], entry["key"]) for entry in map(json.loads, lines)]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_all_sound_samples_of_a_damaged_shard_survive_with_their_labels(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    (tmp_path / "in").mkdir()
    before = write_damaged(tmp_path / "in" / f"0{suffix}", kind).read_bytes()
    report = repair_folder(tmp_path / "in", tmp_path / "out")
    lost = DAMAGES[kind][2]
    assert stored_samples(tmp_path / "out") == {
        key: members for key, members in WHOLE.items() if key[2:] not in lost
    }
    assert report.num_kept == 6 - len(lost)
    assert report.left_out["damaged"] >= 1
    assert rejected(tmp_path / "out")
    assert verify_folder(tmp_path / "out").num_errors == 0
    assert (tmp_path / "in" / f"0{suffix}").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar*")) == ["0.tar"]


def test_a_sound_folder_is_written_anew_with_the_same_samples_in_order(tmp_path: Path) -> None:
    before = make_shards(tmp_path / "in", [3, 2])
    (tmp_path / "in" / "classes.txt").write_text("".join(f"class {number}\n" for number in range(10)))
    report = repair_folder(tmp_path / "in", tmp_path / "out")
    after = Manifest.load(tmp_path / "out")
    assert report.left_out == {}
    assert after == before  # made the same way, so the very same bytes
    assert after.class_names[9] == "class 9"
    assert verify_folder(tmp_path / "out").num_errors == 0


def test_the_new_shards_tell_nothing_of_who_packed_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in SAMPLES:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.uname, info.mode = len(data), 1e9 + 0.5, 1000, "ann", 0o777
            tar.addfile(info, io.BytesIO(data))
    repair_folder(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "0.tar").read_bytes() == tar_bytes(SAMPLES)


IMAGE, OTHER = jpeg(1), jpeg(2)


def test_a_key_used_twice_for_other_content_gets_a_new_key(tmp_path: Path) -> None:
    members = [("a.jpg", IMAGE), ("a.cls", b"1"), ("a_2.jpg", jpeg(3)), ("b.jpg", jpeg(4))]
    report, found = repair([*members, ("a.jpg", OTHER), ("a.cls", b"2")], tmp_path)
    assert found["0/a"] == {"jpg": IMAGE, "cls": b"1"}
    assert found["0/a_2"] == {"jpg": jpeg(3)}  # a key that is free stays
    assert found["0/a_3"] == {"jpg": OTHER, "cls": b"2"}
    assert (report.num_kept, report.num_renamed) == (4, 1)


def test_a_sample_that_is_there_twice_with_the_same_content_is_kept_once(tmp_path: Path) -> None:
    report, found = repair([*SAMPLES, *samples(2, 2)], tmp_path)
    assert found == WHOLE
    assert (report.num_copies, report.num_renamed) == (2, 0)


def test_members_apart_from_each_other_are_put_together(tmp_path: Path) -> None:
    images, labels = SAMPLES[::2], SAMPLES[1::2]
    report, found = repair([*images, *labels], tmp_path)
    assert found == WHOLE
    assert report.num_regrouped == 6
    assert verify_folder(tmp_path / "out").num_errors == 0


def test_a_label_is_never_guessed(tmp_path: Path) -> None:
    members = [("a.jpg", IMAGE), ("a.jpg", OTHER), ("a.cls", b"1"), ("a.cls", b"2"), ("b.jpg", jpeg(3))]
    apart = [("c.jpg", IMAGE), ("d.jpg", OTHER), ("c.jpg", jpeg(5)), ("d.cls", b"4"), ("c.cls", b"1")]
    report, found = repair([*members, *apart], tmp_path)
    assert found == {
        "0/b": {"jpg": jpeg(3)},
        "0/c": {"jpg": IMAGE},
        "0/c_2": {"jpg": jpeg(5)},
        "0/d": {"jpg": OTHER, "cls": b"4"},
    }
    assert report.left_out == {"ambiguous": 4}


def test_a_label_that_contradicts_another_takes_no_sample_with_it_that_was_whole(tmp_path: Path) -> None:
    members = [("a.jpg", IMAGE), ("a.cls", b"1"), ("b.jpg", OTHER), ("a.cls", b"2")]
    assert repair(members, tmp_path)[1]["0/a"] == {"jpg": IMAGE, "cls": b"1"}
    assert rejected(tmp_path / "out") == [("ambiguous", "a")]


def test_between_two_labels_apart_from_their_image_none_is_chosen(tmp_path: Path) -> None:
    members = [("a.jpg", IMAGE), ("b.jpg", OTHER), ("a.cls", b"1"), ("c.jpg", jpeg(3)), ("a.cls", b"2")]
    _, found = repair(members, tmp_path)
    assert "0/a" not in found
    assert {code for code, _ in rejected(tmp_path / "out")} == {"ambiguous"}


def test_dots_in_keys_are_replaced_and_the_keys_stay_apart(tmp_path: Path) -> None:
    members = [
        ("n02.v1.jpg", IMAGE),
        ("n02.v1.cls", b"1"),
        ("n02.v2.jpg", OTHER),
        ("n02.v2.cls", b"2"),
        ("n02_v1.jpg", jpeg(3)),
        ("v1.0/x.jpg", jpeg(4)),
    ]
    report, found = repair(members, tmp_path)
    assert found["0/n02_v1"] == {"jpg": jpeg(3)}
    assert found["0/n02_v1_2"] == {"jpg": IMAGE, "cls": b"1"}
    assert found["0/n02_v2"] == {"jpg": OTHER, "cls": b"2"}
    assert report.num_renamed == 2
    with tarfile.open(tmp_path / "out" / "0.tar") as tar:
        assert "v1.0/x.jpg" in tar.getnames()  # dots in a folder's name are no harm


def test_dangerous_and_long_names_become_plain_ones(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    long_names = [f"{'x' * 120}{number}.jpg" for number in range(2)]
    with tarfile.open(tmp_path / "in" / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number, name in enumerate(["../../up.jpg", "/abs/olute.jpg", *long_names]):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(number))
            tar.addfile(info, io.BytesIO(jpeg(number)))
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    repair_folder(tmp_path / "in", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "0.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members][:2] == ["up.jpg", "abs/olute.jpg"]
        assert all(member.isreg() and not member.pax_headers for member in members)
    found = stored_samples(tmp_path / "out")
    assert sorted(parts["jpg"] for parts in found.values()) == sorted(map(jpeg, range(4)))
    assert rejected(tmp_path / "out") == [("not_plain", "z.jpg")]
    assert verify_folder(tmp_path / "out").num_errors == 0


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "empty"), (b"<html>", "unknown_format"), (jpeg(1)[:-2], "damaged")],
)
def test_images_that_cannot_be_used_are_left_out_and_listed(tmp_path: Path, data: bytes, code: str) -> None:
    report, found = repair([*SAMPLES, ("x.jpg", data), ("x.cls", b"1")], tmp_path)
    assert found == WHOLE
    assert report.left_out == {code: 1}
    assert rejected(tmp_path / "out") == [(code, "x")]


def test_a_flip_that_decodes_is_found_by_the_index(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", [6])
    path = tmp_path / "in" / "train-0.tar"
    data = bytearray(path.read_bytes())
    data[offsets(bytes(data))["000003.cls"] + 512] ^= 1
    path.write_bytes(data)
    repair_folder(tmp_path / "in", tmp_path / "out")
    assert "train-0/000003" not in stored_samples(tmp_path / "out")
    assert len(stored_samples(tmp_path / "out")) == 5
    assert rejected(tmp_path / "out") == [("checksum", "000003")]


def test_a_label_hurt_together_with_the_next_header_is_not_kept(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", [6])
    path = tmp_path / "in" / "train-0.tar"
    data = bytearray(path.read_bytes())
    places = offsets(bytes(data))
    data[places["000002.cls"] + 512] = ord("7")
    data[places["000003.jpg"]] ^= 255
    path.write_bytes(data)
    repair_folder(tmp_path / "in", tmp_path / "out")
    assert sorted(stored_samples(tmp_path / "out")) == [f"train-0/00000{number}" for number in (0, 1, 4, 5)]


def test_an_index_of_other_shards_rejects_nothing(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", [6])
    write_shard(tmp_path / "in" / "train-0.tar", samples(50, 6))
    assert repair_folder(tmp_path / "in", tmp_path / "out").num_kept == 6


def test_a_shard_with_nothing_sound_is_left_out_and_two_of_one_name_stay_two(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "2.tar").write_bytes(b"")
    write_shard(tmp_path / "in" / "0.tar", samples(0, 1))
    write_shard(tmp_path / "in" / "0.tar.gz", samples(1, 1))
    report = repair_folder(tmp_path / "in", tmp_path / "out")
    assert (report.num_shards, report.num_shards_lost) == (2, 1)
    assert set(stored_samples(tmp_path / "out")) == {"0/000000", "0-2/000001"}
    assert "2 samples kept in 2 shards (1 hold nothing sound)" in format_report(report)


def test_splits_are_kept_where_only_the_old_index_knows_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        write_shard(tmp_path / "in" / f"{number}.tar", samples(number, 1))
    splits = {"train": ["0.tar"], "validation": ["1.tar"]}
    info = {name: {"filenames": files, "shard_lengths": [1]} for name, files in splits.items()}
    (tmp_path / "in" / "_info.json").write_text(json.dumps({"splits": info}))
    repair_folder(tmp_path / "in", tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out")
    assert [shard.name for shard in manifest.split("val").shards] == ["1.tar"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", [2])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match="is the folder to repair"):
        repair_folder(tmp_path / "in", tmp_path / "link")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(DataError, match="is not an empty folder"):
        repair_folder(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="is not an empty folder"):
        repair_folder(tmp_path / "in", tmp_path / "in" / "train-0.tar")
    with pytest.raises(DataError, match="cannot be made"):
        repair_folder(tmp_path / "in", tmp_path / "in" / "train-0.tar" / "out")


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "in", [2])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 5, 5))
    with pytest.raises(DataError, match=r"0 MiB are free, about \d+ are needed"):
        repair_folder(tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_where_nothing_is_sound_the_list_says_why(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "0.tar", [("0.jpg", b"?")])
    with pytest.raises(DataError, match=r"no sample is sound; .*rejected\.jsonl says why"):
        repair_folder(tmp_path / "in", tmp_path / "out")
    assert rejected(tmp_path / "out") == [("unknown_format", "0")]


def test_many_shards_in_processes_end_like_few_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "SMALL_BYTES", 0)
    make_shards(tmp_path / "in", [1] * 8)
    calls: list[int] = []
    repair_folder(
        tmp_path / "in", tmp_path / "a", num_workers=2, report_progress=lambda done, _: calls.append(done)
    )
    repair_folder(tmp_path / "in", tmp_path / "b", num_workers=1)
    assert Manifest.load(tmp_path / "a") == Manifest.load(tmp_path / "b")
    assert calls == list(range(1, 9))


MANY = samples(0, 9, height=24, width=32)
EXPECTED = by_key(MANY)


def repaired_or_nothing(folder: Path) -> dict[str, dict[str, bytes]]:
    """What a repair saved of folder/in; nothing where it says that nothing is sound."""
    with contextlib.suppress(DataError):
        repair_folder(folder / "in", folder / "out", num_workers=1)
        assert verify_folder(folder / "out", num_workers=1).num_errors == 0
    return stored_samples(folder / "out")


@settings(max_examples=40, deadline=None)
@given(data=st.data(), is_packed=st.booleans(), is_indexed=st.booleans())
def test_random_damage_loses_only_what_it_hits_and_doubles_nothing(
    data: st.DataObject, is_packed: bool, is_indexed: bool
) -> None:
    content = bytearray(tar_bytes(MANY))
    num_bytes = offsets(bytes(content))[""]
    kind = data.draw(st.sampled_from(["flip", "zero", "noise", "cut"]))
    begin = data.draw(st.integers(0, num_bytes - 1))
    length = 1 if kind == "flip" else data.draw(st.integers(1, 1500))
    end = min(begin + length, num_bytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        path = folder / "in" / ("0.tar.gz" if is_packed else "0.tar")
        if is_indexed:
            path.write_bytes(gzip.compress(content, mtime=0) if is_packed else content)
            index_folder(folder / "in")
        if kind == "cut":
            del content[begin:]
            end = num_bytes
        elif kind == "zero":
            content[begin:end] = bytes(end - begin)
        else:
            pattern = data.draw(st.integers(1, 255))
            content[begin:end] = bytes(byte ^ pattern for byte in content[begin:end])
        path.write_bytes(gzip.compress(content, mtime=0) if is_packed else content)
        starts = offsets(tar_bytes(MANY))
        hit = {
            f"0/{first[:6]}"
            for first, begins in starts.items()
            if first
            for ends in [min(offset for offset in starts.values() if offset > begins)]
            if begins < end and begin < ends
        }
        found = repaired_or_nothing(folder)
        assert {key: found.get(key) for key in EXPECTED.keys() - hit} == {
            key: EXPECTED[key] for key in EXPECTED.keys() - hit
        }
        for key in found.keys() - (EXPECTED.keys() - hit):
            assert found[key].get("jpg") not in [found[other]["jpg"] for other in found if other != key]
        if is_indexed:
            assert all(found[key].items() <= EXPECTED[key].items() for key in found)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_of_the_compressed_bytes_loses_nothing_before_it(data: st.DataObject) -> None:
    packed = bytearray(gzip.compress(tar_bytes(MANY), mtime=0))
    place = data.draw(st.integers(20, len(packed) - 1))
    if data.draw(st.booleans()):
        del packed[place:]
    else:
        packed[place] ^= data.draw(st.integers(1, 255))
    unpacked = len(zlib.decompressobj(wbits=31).decompress(bytes(packed[: place - 8])))
    starts = [offset for name, offset in offsets(tar_bytes(MANY)).items() if not name.endswith("cls")]
    num_whole = sum(offset <= unpacked for offset in starts[1:])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        (folder / "in" / "0.tar.gz").write_bytes(packed)
        found = repaired_or_nothing(folder)
        whole = list(EXPECTED)[:num_whole]
        assert [found.get(key) for key in whole] == [EXPECTED[key] for key in whole]


def test_a_real_shard_cut_and_rotten_gives_back_the_rest(tmp_path: Path) -> None:
    source = real_data("imagenet-sample") / "imagenet-sample-0000.tar"
    data = bytearray(source.read_bytes())
    with tarfile.open(source) as tar:
        members = tar.getmembers()
    headers = {member.name.partition(".")[0]: member.offset for member in reversed(members)}
    keys = list(headers)[::-1]
    data[headers[keys[10]] + 3] ^= 255
    del data[headers[keys[40]] + 600 :]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(data)
    repair_folder(tmp_path / "in", tmp_path / "out")
    (tmp_path / "whole").mkdir()
    shutil.copy(source, tmp_path / "whole" / "0.tar")
    whole = stored_samples(tmp_path / "whole")
    kept = [f"0/{key}" for key in keys[:40] if key != keys[10]]
    assert stored_samples(tmp_path / "out") == {key: whole[key] for key in kept}
    assert verify_folder(tmp_path / "out").num_errors == 0
