from __future__ import annotations

import io
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import tar_bytes

from pretrain.data.tar import BLOCK_BYTES, MAX_MEMBER_BYTES, Damage, Member, Readable, safe_name, walk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=90)


def packed(members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def walked(data: bytes, *, resync: bool = False) -> list[Member | Damage]:
    return list(walk(io.BytesIO(data), resync=resync))


def names(found: list[Member | Damage]) -> list[str | int]:
    """Names of members, offsets of damage."""
    return [entry.name if isinstance(entry, Member) else entry.offset for entry in found]


class Trickle:
    """Gives fewer bytes than it is asked for."""

    def __init__(self, data: bytes, most: int) -> None:
        self._file, self._most = io.BytesIO(data), most

    def read(self, size: int, /) -> bytes:
        return self._file.read(min(size, self._most))


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(
        st.tuples(NAMES, st.binary(max_size=1200)), max_size=6, unique_by=lambda member: member[0]
    ),
    tar_format=st.sampled_from(["gnu", "pax"]),
    folder=st.sampled_from(["", "./", "x" * 140 + "/", "ü/" * 60]),
    most=st.integers(1, 3000),
)
def test_a_sound_archive_is_read_as_the_standard_library_reads_it(
    members: list[tuple[str, bytes]], tar_format: str, folder: str, most: int
) -> None:
    data = packed([(folder + name, content) for name, content in members], FORMATS[tar_format])
    source: Readable = Trickle(data, most)
    found = list(walk(source))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert [
        (entry.name, entry.data_offset, entry.num_bytes, entry.data)
        for entry in found
        if isinstance(entry, Member) and entry.kind == "file"
    ] == expected
    assert len(found) == len(expected)


def test_members_lie_one_behind_the_other_and_hold_every_byte_up_to_the_end_marker() -> None:
    for tar_format in FORMATS.values():
        data = packed([("a" * 90, b"1" * 700), ("b", b""), ("c", b"2" * 512)], tar_format)
        found = [entry for entry in walked(data) if isinstance(entry, Member)]
        assert b"".join(member.stored for member in found) == data[: found[-1].end]
        assert [member.offset for member in found] == [0, *(member.end for member in found[:-1])]
        assert not any(data[found[-1].end :])


def test_pax_sizes_overrule_the_header() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "700"}
    header = info.tobuf(tarfile.PAX_FORMAT)  # its own size field says 0
    data = header + b"7" * 700 + bytes(324) + tar_bytes([("b.jpg", b"8")])
    (first, second) = walked(data)
    assert isinstance(first, Member)
    assert first.data == b"7" * 700
    assert isinstance(second, Member)
    assert second.name == "b.jpg"


def test_global_extensions_name_no_member() -> None:
    header = tarfile.TarInfo.create_pax_global_header({"path": "evil.jpg", "comment": "x"})
    (member,) = walked(header + tar_bytes([("a.jpg", b"1")]))
    assert isinstance(member, Member)
    assert (member.name, member.offset, member.data) == ("a.jpg", 0, b"1")


@pytest.mark.parametrize(
    "record",
    [
        b"x path=a\n",
        b"8 path=a\n",
        b"0 path=a\n",
        b"99999 path=a\n",
        b"7 patha\n",
        b"12 size=1x2\n",
        b"99999999999999999999999 a=b\n",
    ],
)
def test_an_extended_header_of_nonsense_is_damage_and_no_crash(record: bytes) -> None:
    info = tarfile.TarInfo("PaxHeaders/a")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(512 - len(record)) + tar_bytes([("a", b"1")])
    assert names(walked(data)) == [0]
    assert names(walked(data, resync=True)) == [0, "a"]


def test_a_header_that_claims_gigabytes_costs_no_memory() -> None:
    info = tarfile.TarInfo("a")
    info.size = MAX_MEMBER_BYTES + 1
    data = info.tobuf(tarfile.GNU_FORMAT) + tar_bytes([("b", b"1")])
    tracemalloc.start()
    found = walked(data, resync=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names(found) == [0, "b"]
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (tarfile.DIRTYPE, "folder"),
        (tarfile.SYMTYPE, "other"),
        (tarfile.LNKTYPE, "other"),
        (tarfile.CHRTYPE, "other"),
        (tarfile.FIFOTYPE, "other"),
        (tarfile.CONTTYPE, "other"),
        (tarfile.GNUTYPE_SPARSE, "other"),
        (b"V", "other"),
        (tarfile.AREGTYPE, "file"),
    ],
)
def test_every_kind_of_member_is_told_and_the_next_one_found(kind: bytes, expected: str) -> None:
    info = tarfile.TarInfo("a")
    info.type = kind
    first, second = walked(info.tobuf(tarfile.GNU_FORMAT) + tar_bytes([("b", b"1")]))
    assert isinstance(first, Member)
    assert isinstance(second, Member)
    assert (first.kind, second.name) == (expected, "b")


FOUR = tar_bytes([(name, name.encode() * 600) for name in "abcd"])  # each takes 1536 bytes
HEADERS = [0, 1536, 3072, 4608]
END = 6144


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, END - 1), wrong=st.binary(min_size=1, max_size=1800))
def test_resync_finds_every_member_that_damage_did_not_touch(place: int, wrong: bytes) -> None:
    data = bytearray(FOUR)
    stop = min(place + len(wrong), END)
    data[place:stop] = wrong[: stop - place]
    found = {
        entry.name: entry.data for entry in walked(bytes(data), resync=True) if isinstance(entry, Member)
    }
    for name, begin in zip("abcd", HEADERS, strict=True):
        if stop <= begin or begin + 1536 <= place:
            assert found[name] == name.encode() * 600


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, len(FOUR) - 1))
def test_every_cut_before_the_end_of_the_marker_is_damage(length: int) -> None:
    found = walked(FOUR[:length])
    damages = [entry for entry in found if isinstance(entry, Damage)]
    assert len(damages) == (1 if length < END + 1024 else 0)
    if damages:
        assert damages[0].offset == max(offset for offset in [*HEADERS, END] if offset <= length)
        assert found[-1] is damages[0]


def test_without_resync_nothing_follows_the_first_damage() -> None:
    data = bytearray(FOUR)
    data[1536] ^= 255
    assert names(walked(bytes(data))) == ["a", 1536]
    assert names(walked(bytes(data), resync=True)) == ["a", 1536, "c", "d"]


def test_archives_put_one_after_the_other_are_damage_between_them() -> None:
    assert names(walked(FOUR + FOUR)) == [*"abcd", END]
    assert names(walked(FOUR + FOUR, resync=True)) == [*"abcd", END, *"abcd"]


def test_zeros_may_follow_the_end_marker_in_any_number() -> None:
    for more in (0, 1, 511, 10240, 3_000_000):
        assert names(walked(FOUR[: END + 1024] + bytes(more))) == [*"abcd"]


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=5000), resync=st.booleans())
def test_any_bytes_end_in_damage_and_never_in_an_error(data: bytes, resync: bool) -> None:
    found = walked(data, resync=resync)
    if data.strip(b"\0") or len(data) < 2 * BLOCK_BYTES:
        assert any(isinstance(entry, Damage) for entry in found)


def test_a_name_for_the_log_has_one_line_of_printable_characters() -> None:
    assert safe_name("a\nb\x1b[31m\u202e") == "a?b?[31m?"
    assert len(safe_name("x" * 5000)) <= 120
    assert safe_name("\udcff.jpg") == "?.jpg"
