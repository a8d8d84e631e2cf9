from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import Member, jpeg, samples, tar_bytes, write_shard

from pretrain.data import scan
from pretrain.data.columns import NO_LABEL
from pretrain.data.location import parse_location
from pretrain.data.scan import Problem, Sample, ShardScan, group, runs, scan_shard
from pretrain.data.tar import walk


def scanned(path: Path) -> ShardScan:
    return scan_shard(parse_location(path))


def grouped(members: list[Member]) -> tuple[list[Sample], list[Problem]]:
    problems: list[Problem] = []
    return list(group(walk(io.BytesIO(tar_bytes(members))), problems)), problems


def told(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(problem.code, problem.key) for problem in problems]


IMAGE = jpeg(0)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.jpg", "a.cls", "b.jpg"], ["a", "b"]),
        (["a.JPG", "a.Cls"], ["a"]),
        (["d/a.jpg", "e/a.jpg", "a.jpg"], ["d/a", "e/a", "a"]),
        (["v1.0/a.jpg"], ["v1.0/a"]),
        (["a.jpg", "a.seg.png"], ["a"]),
        (["n.v1.jpg", "n.v1.cls", "n.v2.jpg"], ["n.v1", "n.v2"]),
        (["n.A.jpg", "n.a.jpg"], ["n.A", "n.a"]),
        (["README", "__meta__/x.json", ".hidden", "a.jpg"], ["a"]),
        (["./a.jpg"], ["./a"]),
    ],
)
def test_keys_reach_to_the_first_dot_unless_names_have_dots_of_their_own(
    names: list[str], keys: list[str]
) -> None:
    found, problems = grouped([(name, IMAGE) for name in names])
    assert [sample.key for sample in found] == keys
    assert problems == []


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ([("a.cls", b"7")], 7),
        ([("a.cls", b" 7\n")], 7),
        ([("a.cls", b"-1")], NO_LABEL),
        ([("a.cls", b"cat")], NO_LABEL),
        ([("a.cls", b"")], NO_LABEL),
        ([("a.cls", b"9" * 5000)], NO_LABEL),
        ([("a.cls", str(2**31).encode())], NO_LABEL),
        ([("a.cls", "٣".encode())], NO_LABEL),
        ([("a.json", b'{"label": 3}')], 3),
        ([("a.json", b'{"label": true}')], NO_LABEL),
        ([("a.json", b'{"label": 3.0}')], NO_LABEL),
        ([("a.json", b'{"label": "3"}')], NO_LABEL),
        ([("a.json", b"[3]")], NO_LABEL),
        ([("a.json", b"\xff")], NO_LABEL),
        ([("a.json", b"[" * 100_000)], NO_LABEL),
        ([("a.cls", b"1"), ("a.json", b'{"label": 2}')], 1),
        ([], NO_LABEL),
    ],
)
def test_a_label_is_a_class_index_or_none(members: list[Member], label: int) -> None:
    (sample,), problems = grouped([("a.jpg", IMAGE), *members])
    assert (sample.label, problems) == (label, [])


def test_every_problem_has_its_code() -> None:
    members = [("a.jpg", IMAGE), ("b.cls", b"1"), ("a.cls", b"1"), ("c.jpg", IMAGE), ("c.jpg", IMAGE)]
    found, problems = grouped([*members, ("/d.jpg", IMAGE), ("b.jpg", IMAGE), ("c.jpg", IMAGE)])
    assert [sample.key for sample in found] == ["a", "c"]
    assert told(problems) == [
        (scan.NO_IMAGE, "b"),
        (scan.UNGROUPED, "a"),
        (scan.UNSAFE_NAME, "/d.jpg"),
        (scan.DUPLICATE, "c.jpg"),
        (scan.UNGROUPED, "b"),
        (scan.DUPLICATE, "c"),
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["jpg", "cls", "x.jpg", "x.txt"])), max_size=12
    )
)
def test_runs_hand_on_every_member_once_and_in_order(parts: list[tuple[str, str]]) -> None:
    members = [(f"{key}.{extension}", b"") for key, extension in parts]
    found = [entry for run in runs(walk(io.BytesIO(tar_bytes(members))), []) for entry in run]
    assert [member.name for _, _, member in found] == [name for name, _ in members]
    assert all(member.name == f"{key}.{extension}" for key, extension, member in found)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_the_columns_of_a_shard_agree_with_a_slow_reference(tmp_path: Path, suffix: str) -> None:
    members = [
        ("README", b"x" * 900),
        *samples(0, 3),
        ("__note__", b"y"),
        *samples(3, 2),
        ("LICENSE", b"z" * 600),
    ]
    path = write_shard(tmp_path / f"0{suffix}", members)
    found = scanned(path)
    assert found.problems == ()
    assert (found.num_bytes, found.sha256) == (
        path.stat().st_size,
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    data = path.read_bytes() if suffix == ".tar" else gzip.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
    images = [info for info in infos if info.name.endswith("jpg")]
    end = infos[-1].offset_data + 1024  # 600 bytes take two blocks
    bounds = [*(info.offset for info in images), end]
    assert found.samples.starts.tolist() == bounds
    assert (found.samples.starts[:-1] + found.samples.image_begins).tolist() == [
        i.offset_data for i in images
    ]
    assert found.samples.image_bytes.tolist() == [info.size for info in images]
    assert found.samples.labels.tolist() == [0, 1, 2, 3, 4]
    assert found.samples.hashes.tolist() == [
        xxhash.xxh3_64_intdigest(data[begin:stop]) for begin, stop in pairwise(bounds)
    ]


def test_one_changed_number_changes_the_digest_of_the_columns(tmp_path: Path) -> None:
    columns = scanned(write_shard(tmp_path / "0.tar", samples(0, 3))).samples
    before = columns.digest()
    for name in ("starts", "image_begins", "image_bytes", "hashes", "labels"):
        getattr(columns, name)[1] += 1
        assert columns.digest() != before
        getattr(columns, name)[1] -= 1
    assert columns.digest() == before


def test_a_part_of_the_columns_speaks_of_the_same_bytes(tmp_path: Path) -> None:
    columns = scanned(write_shard(tmp_path / "0.tar", samples(0, 5))).samples
    part = columns.part(1, 3)
    assert len(part) == 2
    assert part.starts.tolist() == columns.starts[1:4].tolist()
    assert part.labels.tolist() == [1, 2]


def test_what_is_behind_a_compressed_tar_counts_for_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(samples(0, 1)), mtime=0) + bytes(5000))
    found = scanned(path)
    assert found.problems == ()
    assert found.num_bytes == path.stat().st_size
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_shard_that_cannot_be_read_is_a_problem_told_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    (problem,) = scanned(tmp_path / "0.tar").problems
    assert (problem.code, problem.reason) == (scan.UNREADABLE, "is not a regular file")


class Endless:
    """A tar of members that are no sample, made while it is read; counts the bytes that are still held."""

    def __init__(self, num_members: int) -> None:
        self._blocks = self._made(num_members)
        self._rest = b""

    def _made(self, num_members: int) -> Iterator[bytes]:
        yield tar_bytes([("bad.cls", b"1")])[:1024]
        for number in range(num_members):
            yield tar_bytes([(f"{number}.txt", bytes(1_000_000))])[: 512 + 1_000_448]
        yield bytes(1024)

    def read(self, size: int, /) -> bytes:
        while len(self._rest) < size and (block := next(self._blocks, b"")):
            self._rest += block
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def test_a_long_shard_without_samples_is_not_kept_in_memory() -> None:
    problems: list[Problem] = []
    tracemalloc.start()
    scan._collect(Endless(60), problems)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(problems) == 61
    assert peak < 20_000_000


def test_many_bytes_of_no_sample_are_a_problem_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.scan.MAX_IDLE_BYTES", 20_000)
    idle = [(f"note{number}", bytes(4000)) for number in range(9)]
    path = write_shard(tmp_path / "0.tar", [*samples(0, 2), *idle, *samples(2, 1)])
    (problem,) = scan_shard(parse_location(path)).problems
    assert problem.code == "idle_members"
    assert problem.key == "note4"
    few = write_shard(tmp_path / "1.tar", [*samples(0, 2), *idle[:4], *samples(2, 1)])
    assert scan_shard(parse_location(few)).problems == ()
