from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from damages import DAMAGES, SAMPLES, offsets, write_damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encoded, exif, jpeg_claiming, picture, png_claiming, with_segment
from range_server import RangeServer
from safetensors.numpy import load_file, save_file
from small_shards import Member, jpeg, make_shards, real_data, samples, tar_bytes, write_shard

from pretrain.data import side_by_side
from pretrain.data.audit.finding import ERROR, NOTE, WARNING, Audit, Finding
from pretrain.data.audit.verify import Layout, format_audit, verify_folder
from pretrain.data.indexing import record_shard, write_manifest
from pretrain.data.location import parse_location
from pretrain.data.scan import scan_shard
from pretrain.errors import ConfigError, DataError

Entry = tuple[str, str, str]  # severity, code, key


def entries(audit: Audit, *severities: str) -> list[Entry]:
    wanted = severities or (ERROR, WARNING)
    return [(f.severity, f.code, f.key) for f in audit.findings if f.severity in wanted]


def only(audit: Audit, code: str) -> Finding:
    (finding,) = (finding for finding in audit.findings if finding.code == code)
    return finding


def verify_members(folder: Path, members: list[Member]) -> Audit:
    write_shard(folder / "0.tar", members)
    return verify_folder(folder, num_workers=1)


def test_sound_shards_have_no_errors_and_a_summary_worked_by_hand(tmp_path: Path) -> None:
    make_shards(tmp_path, [3, 2], height=40, width=48)
    audit = verify_folder(tmp_path)
    assert audit.findings == ()
    assert audit.has_index
    assert audit.num_samples == 5
    assert audit.images.formats == {"JPEG": 5}
    assert audit.images.num_decoded == 5
    assert dataclasses.astuple(audit.images.short_side_px) == (40, 40, 40)  # type: ignore[arg-type]
    assert dataclasses.astuple(audit.images.long_side_px) == (48, 48, 48)  # type: ignore[arg-type]
    assert dataclasses.astuple(audit.labels["train"]) == (5, 5, 5, (1, 1, 1))
    assert "5 samples" in format_audit(audit)
    assert format_audit(audit).endswith("no errors")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_an_error_at_its_byte_and_what_lies_beyond_is_read(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    write_damaged(tmp_path / f"0{suffix}", kind)
    audit = verify_folder(tmp_path)
    _, where, lost = DAMAGES[kind]
    expected = offsets(tar_bytes(SAMPLES))[where]
    damaged = [finding for finding in audit.findings if finding.code == "damaged"]
    assert damaged[0].offset == expected
    assert str(expected) in format_audit(audit)
    whole = {f"{number:06d}" for number in range(6)} - lost
    assert len(whole) <= audit.num_samples <= len(whole) + 1  # a label may be what is lost of a sample


def test_an_empty_shard_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "1.tar.gz").write_bytes(b"")
    audit = verify_folder(tmp_path)
    assert {(f.shard, f.code) for f in audit.findings if f.severity == ERROR} == {
        ("0.tar", "damaged"),
        ("1.tar.gz", "damaged"),
    }


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_compressed_shard_cut_short_tells_the_samples_before_the_cut(tmp_path: Path, keep: float) -> None:
    packed = gzip.compress(tar_bytes(SAMPLES), mtime=0)
    (tmp_path / "0.tgz").write_bytes(packed[: int(len(packed) * keep)])
    audit = verify_folder(tmp_path)
    assert any("compressed data: it is cut short" in finding.reason for finding in audit.findings)
    assert abs(audit.num_samples - 6 * keep) < 1.5


def test_several_streams_of_gzip_and_padding_are_one_sound_shard(tmp_path: Path) -> None:
    data = tar_bytes(SAMPLES)
    streams = gzip.compress(data[:5000], mtime=0) + bytes(70_000) + gzip.compress(data[5000:], mtime=0)
    (tmp_path / "0.tar.gz").write_bytes(streams + bytes(99))
    audit = verify_folder(tmp_path)
    assert (audit.num_errors, audit.num_samples) == (0, 6)
    (tmp_path / "0.tar.gz").write_bytes(streams + b"junk")
    assert verify_folder(tmp_path).num_errors == 1


IMAGE, LABEL = SAMPLES[0][1], SAMPLES[1][1]
GIF = encoded(picture(8, 8), "GIF")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([*SAMPLES, *samples(0, 1)], (ERROR, "duplicate", "000000")),
        ([("0.jpg", IMAGE), ("1.jpg", jpeg(1)), ("0.cls", LABEL)], (ERROR, "ungrouped", "0")),
        ([("0.jpg", IMAGE), ("0.jpg", IMAGE)], (ERROR, "duplicate", "0.jpg")),
        ([("0.jpg", IMAGE), ("1.cls", LABEL)], (ERROR, "no_image", "1")),
        ([("0.jpg", IMAGE), ("1.gif", GIF)], (ERROR, "no_image", "1")),
        ([("0.jpg", IMAGE), ("../1.jpg", jpeg(1))], (ERROR, "unsafe_name", "../1.jpg")),
        ([("0.jpg", IMAGE), ("/1.jpg", jpeg(1))], (ERROR, "unsafe_name", "/1.jpg")),
        ([("0.jpg", IMAGE), ("1.jpg", b"")], (ERROR, "empty", "1")),
        ([("0.jpg", IMAGE), ("1.jpg", b"<html>404</html>")], (ERROR, "unknown_format", "1")),
        ([("0.jpg", IMAGE), ("1.jpg", GIF)], (ERROR, "unknown_format", "1")),
        ([("0.jpg", IMAGE), ("1.jpg", jpeg(1)[:-2])], (ERROR, "damaged", "1")),
        ([("0.jpg", IMAGE), ("1.jpg", jpeg_claiming(60000, 60000))], (ERROR, "too_large", "1")),
        ([("0.jpg", IMAGE), ("1.png", png_claiming(12000, 12000))], (ERROR, "too_large", "1")),
        ([("0.jpg", IMAGE), ("0.cls", b"cat")], (WARNING, "label", "0")),
        ([*SAMPLES, *samples(6, 6), ("x.jpg", jpeg(99))], (WARNING, "partial", "x")),
    ],
)
def test_what_is_wrong_with_a_sample_is_told_with_its_key(
    tmp_path: Path, members: list[Member], expected: Entry
) -> None:
    write_shard(tmp_path / "0.tar", members)
    assert expected in entries(verify_folder(tmp_path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_not_plain_files_are_errors(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.type, info.linkname = kind, "/etc/hostname"
        tar.addfile(info)
    assert (ERROR, "not_plain", "0.jpg") in entries(verify_folder(tmp_path))


def test_ten_faults_at_once_are_all_listed_by_one_run(tmp_path: Path) -> None:
    make_shards(tmp_path, [2] * 9)
    shards = {number: tmp_path / f"train-{number}.tar" for number in range(9)}
    shards[0].unlink()
    shards[1].write_bytes(b"")
    shards[2].write_bytes(shards[2].read_bytes()[:2000])
    write_shard(shards[3], [*samples(6, 2), *samples(6, 1)])
    write_shard(shards[4], [*samples(8, 2), ("x.cls", b"1")])
    write_shard(shards[5], [("10.jpg", jpeg(10)[:-9]), *samples(11, 1)])
    write_shard(shards[6], [("/12.jpg", jpeg(12)), *samples(13, 1)])
    write_shard(shards[7], [("14.jpg", jpeg(14)), ("15.jpg", jpeg(15)), ("14.cls", b"4")])
    write_shard(shards[8], [("16.jpg", b"<html>"), *samples(17, 1)])
    write_shard(tmp_path / "train-9.tar", samples(18, 2))
    (tmp_path / "classes.txt").write_text("a\nb\n")  # labels reach 9
    audit = verify_folder(tmp_path, num_workers=2)
    found = {(finding.shard[6:7], finding.code) for finding in audit.findings}
    assert {
        ("0", "missing"),
        ("1", "damaged"),
        ("2", "damaged"),
        ("3", "duplicate"),
        ("4", "no_image"),
        ("5", "damaged"),
        ("6", "unsafe_name"),
        ("7", "ungrouped"),
        ("8", "unknown_format"),
        ("9", "not_in_index"),
        ("9", "unknown_class"),
        ("", "classes"),
        ("3", "checksum"),
        ("2", "sizes_file"),
    } <= found
    told = format_audit(audit)
    assert all(finding.reason in told for finding in audit.findings)
    listed = json.loads(audit.to_json())
    assert len(listed["findings"]) == len(audit.findings)
    assert listed["counts"]["error"] == audit.num_errors > 10


def test_the_lines_of_a_shard_are_capped_and_the_rest_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [(f"{number}.jpg", b"?") for number in range(33)])
    audit = verify_folder(tmp_path)
    assert audit.num_errors == 33
    assert "0.tar  and 13 more; --out report.json has all" in format_audit(audit)
    assert len(json.loads(audit.to_json())["findings"]) >= 33


def test_a_flip_in_a_sample_is_told_by_the_index_with_its_key(tmp_path: Path) -> None:
    make_shards(tmp_path, [5])
    path = tmp_path / "train-0.tar"
    data = bytearray(path.read_bytes())
    place = offsets(bytes(data))["000003.cls"] + 512
    data[place] ^= 1  # '3' becomes '2': a wrong label that nothing else could notice
    path.write_bytes(data)
    audit = verify_folder(tmp_path)
    assert entries(audit) == [(ERROR, "checksum", ""), (ERROR, "checksum", "000003")]
    assert audit.findings[1].offset == offsets(bytes(data))["000003.jpg"]


def test_samples_of_the_index_that_a_cut_took_away_are_named_by_their_offset(tmp_path: Path) -> None:
    make_shards(tmp_path, [5])
    path = tmp_path / "train-0.tar"
    data = path.read_bytes()
    places = offsets(data)
    path.write_bytes(data[: places["000004.jpg"]])
    checksums = [f.offset for f in verify_folder(tmp_path).findings if f.code == "checksum"]
    assert checksums == [0, places["000004.jpg"]]


def test_a_shard_that_was_swapped_is_told_once_not_for_every_sample(tmp_path: Path) -> None:
    make_shards(tmp_path, [4])
    write_shard(tmp_path / "train-0.tar", samples(50, 4))
    audit = verify_folder(tmp_path)
    assert "4 of 4 samples are not those of the index" in format_audit(audit)
    assert len(audit.findings) == 2


def rewrite_columns(folder: Path, name: str, place: int) -> None:
    columns = load_file(folder / "index.safetensors")
    columns[name][place] += 1
    save_file(columns, folder / "index.safetensors")


def test_a_damaged_index_is_told_and_the_shards_are_read_all_the_same(tmp_path: Path) -> None:
    make_shards(tmp_path, [2, 2])
    rewrite_columns(tmp_path, "samples.labels", 3)
    audit = verify_folder(tmp_path)
    assert [(f.shard, f.code) for f in audit.findings] == [("train-1.tar", "index")]
    (tmp_path / "index.safetensors").write_bytes(b"")
    audit = verify_folder(tmp_path)
    assert [(f.severity, f.shard, f.code) for f in audit.findings] == [(ERROR, "", "index")]
    assert audit.num_samples == 4
    assert not audit.has_index


@pytest.mark.parametrize(
    ("column", "reason"),
    [("labels", "label 1, in the index 2"), ("image_begins", "another place for its image")],
)
def test_an_index_that_speaks_of_the_same_bytes_otherwise_is_told(
    tmp_path: Path, column: str, reason: str
) -> None:
    record = record_shard(write_shard(tmp_path / "0.tar", samples(0, 3)), "train")
    getattr(record.samples, column)[1] += 1
    write_manifest(tmp_path, [record])
    ((_, code, key),) = entries(verify_folder(tmp_path))
    assert (code, key) == ("index", "000001")
    assert reason in format_audit(verify_folder(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": {"train": 3}}'])
def test_a_broken_sizes_file_is_told(tmp_path: Path, text: str) -> None:
    write_shard(tmp_path / "0.tar", SAMPLES)
    (tmp_path / "_info.json").write_text(text)
    assert (ERROR, "sizes_file", "") in entries(verify_folder(tmp_path))


def test_the_same_shard_plain_and_compressed_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", SAMPLES)
    write_shard(tmp_path / "0.tar.gz", SAMPLES)
    assert only(verify_folder(tmp_path), "same_shard").severity == ERROR


def test_copies_are_a_note_within_a_split_and_a_warning_across_splits(tmp_path: Path) -> None:
    twice = jpeg(1)
    write_shard(tmp_path / "train-0.tar", [("a.jpg", twice), ("b.jpg", jpeg(2)), ("c.jpg", jpeg(3))])
    write_shard(tmp_path / "train-1.tar", [("d.jpg", twice), ("e.jpg", jpeg(5))])
    write_shard(tmp_path / "val-0.tar", [("f.jpg", jpeg(6)), ("g.jpg", jpeg(3))])
    audit = verify_folder(tmp_path)
    assert only(audit, "copies").severity == NOTE
    a, d = "a (train-0.tar, byte 0)", "d (train-1.tar, byte 0)"
    assert f"images more than once in their split: 1: {a} = {d}" in only(audit, "copies").reason
    assert only(audit, "leak").severity == WARNING
    assert "c (train-0.tar" in only(audit, "leak").reason
    assert "g (val-0.tar" in only(audit, "leak").reason
    assert audit.num_errors == 0


def test_labels_are_counted_and_held_against_the_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    members = [("0.jpg", jpeg(0)), ("0.cls", b"0"), ("1.jpg", jpeg(1)), ("1.cls", b"0"), ("2.jpg", jpeg(2))]
    write_shard(tmp_path / "train-0.tar", [*members, ("3.jpg", jpeg(3)), ("3.cls", b"2")])
    write_shard(tmp_path / "test-0.tar", [("8.jpg", jpeg(8)), ("9.jpg", jpeg(9)), ("9.cls", b"3")])
    write_shard(tmp_path / "val-0.tar", [("v.jpg", jpeg(10))])
    audit = verify_folder(tmp_path)
    assert dataclasses.astuple(audit.labels["train"]) == (4, 3, 2, (1, 2, 2))
    assert dataclasses.astuple(audit.labels["val"]) == (1, 0, 0, None)
    assert entries(audit, ERROR) == [(ERROR, "unknown_class", "9")]
    told = format_audit(audit)
    assert "1 of 4 samples of split train have no label" in told
    assert "no sample of split val has a label" in told
    assert "1 of 3 classes have no sample in split train: 1 b" in told


@pytest.mark.parametrize(
    ("layout", "errors"),
    [
        (Layout(4), []),
        (Layout(12, 6, 3), []),
        (Layout(13), ["13 lanes cannot share the 12 samples of split train"]),
        (Layout(8, 3), ["8 lanes cannot be shared equally by 3 ranks"]),
        (Layout(12, 6, 4), ["6 ranks cannot be shared equally by 4 nodes"]),
        (Layout(4, split="val"), ["there is no split 'val'"]),
    ],
)
def test_a_layout_must_fit_the_samples(tmp_path: Path, layout: Layout, errors: list[str]) -> None:
    make_shards(tmp_path, [6, 6])
    audit = verify_folder(tmp_path, layout=layout)
    assert [finding.reason for finding in audit.findings if finding.severity == ERROR] == errors


def test_uneven_shards_and_fewer_shards_than_nodes_are_notes(tmp_path: Path) -> None:
    make_shards(tmp_path, [2, 6, 1])
    audit = verify_folder(tmp_path, layout=Layout(8, 8, 8))
    assert entries(audit, NOTE) == [(NOTE, "layout", "")] * 2
    assert "uneven shards: 2 to 6 samples" in format_audit(audit)
    with pytest.raises(ConfigError, match="lanes: 0 is not above 0"):
        Layout(0)


def test_exif_and_formats_are_counted(tmp_path: Path) -> None:
    turned = with_segment(jpeg(0), 0xE1, b"Exif\0\0" + exif(6))
    members = [
        ("0.jpg", turned),
        ("1.jpg", encoded(picture(9, 7), "PNG")),
        ("2.webp", encoded(picture(5, 30), "WEBP")),
    ]
    audit = verify_members(tmp_path, members)
    assert audit.images.formats == {"JPEG": 1, "PNG": 1, "WebP": 1}
    assert audit.images.num_turned == 1
    assert dataclasses.astuple(audit.images.short_side_px) == (5, 7, 40)  # type: ignore[arg-type]
    assert audit.num_errors == 0


def test_without_decoding_only_the_header_is_looked_at(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("0.jpg", jpeg(0)[:-2]), ("1.jpg", b"<html>")])
    audit = verify_folder(tmp_path, decode_images=False)
    assert entries(audit, ERROR) == [(ERROR, "unknown_format", "1")]
    assert audit.images.num_decoded == 0


def test_a_limit_of_pixels_is_kept(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("0.jpg", jpeg(0, height=40, width=48))])
    assert verify_folder(tmp_path, max_pixels=40 * 48).num_errors == 0
    assert entries(verify_folder(tmp_path, max_pixels=40 * 48 - 1), ERROR) == [(ERROR, "too_large", "0")]


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that everyone may read, and a process that is not root in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    is_root = os.geteuid() == 0
    yield folder
    if is_root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_a_shard_without_permission_is_listed_beside_the_others(unprivileged: Path) -> None:
    for number in range(2):
        write_shard(unprivileged / f"{number}.tar", samples(2 * number, 2)).chmod(0o644)
    (unprivileged / "0.tar").chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    audit = verify_folder(unprivileged, num_workers=1)
    assert entries(audit) == [(ERROR, "unreadable", "")]
    assert "0.tar  0  -  cannot be read (permission denied); check the storage" in format_audit(audit)
    assert audit.num_samples == 2


def test_many_shards_in_processes_are_told_like_few_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "SMALL_BYTES", 0)
    make_shards(tmp_path, [1] * 9)
    write_shard(tmp_path / "train-4.tar", [("x.jpg", b"?")])
    calls: list[tuple[int, int]] = []
    audit = verify_folder(
        tmp_path, num_workers=2, report_progress=lambda done, total: calls.append((done, total))
    )
    assert audit == verify_folder(tmp_path, num_workers=1)
    assert calls == [(number, 9) for number in range(1, 10)]


def test_a_folder_on_a_web_server_is_verified_through_its_index(tmp_path: Path) -> None:
    make_shards(tmp_path, [2, 2])
    (tmp_path / "train-1.tar").write_bytes((tmp_path / "train-1.tar").read_bytes()[:2000])
    with RangeServer(tmp_path) as server:
        audit = verify_folder(server.url)
    assert {(finding.shard, finding.code) for finding in audit.findings} == {
        ("train-1.tar", "damaged"),
        ("train-1.tar", "checksum"),
        ("train-1.tar", "index"),
    }


def test_a_folder_without_shards_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards here; expected files that end in"):
        verify_folder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        verify_folder(tmp_path / "nowhere")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), is_packed=st.booleans())
def test_verify_has_an_error_wherever_the_index_refuses(data: st.DataObject, is_packed: bool) -> None:
    content = bytearray(tar_bytes(SAMPLES))
    if is_packed:
        content = bytearray(gzip.compress(content, mtime=0))
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "zero"]))
        if kind == "flip":
            content[place] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            content = content[: place + 1]
        else:
            content[place : place + 700] = bytes(len(content[place : place + 700]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("0.tar.gz" if is_packed else "0.tar")
        path.write_bytes(content)
        refused = {problem.code for problem in scan_shard(parse_location(path)).problems}
        audit = verify_folder(folder, decode_images=False, num_workers=1)
        structural = {
            "damaged",
            "duplicate",
            "ungrouped",
            "no_image",
            "not_plain",
            "unsafe_name",
            "no_samples",
        }
        told = {f.code for f in audit.findings if f.severity == ERROR and not f.reason.startswith("image")}
        assert bool(refused) == bool(told & structural)


def test_real_shards_are_sound(tmp_path: Path) -> None:
    source = real_data("imagenet-sample")
    for name in ("imagenet-sample-0000.tar", "imagenet-sample-0001.tar", "classes.txt"):
        (tmp_path / name).symlink_to(source / name)
    audit = verify_folder(tmp_path)
    assert entries(audit) == []
    assert audit.images.num_decoded == audit.num_samples == audit.labels["train"].num_labelled > 100
