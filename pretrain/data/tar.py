"""Walk a tar archive member by member, and say where it is damaged instead of stopping there.

A usual tar reader takes a header that it cannot read for the end of the archive and drops the rest without a
word. Here an archive ends only where its end marker stands, with nothing but zeros after it; everything else
is a `Damage`. Headers themselves are taken apart by the standard library.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK_BYTES = tarfile.BLOCKSIZE
END_MARKER_BYTES = 2 * BLOCK_BYTES
MAX_MEMBER_BYTES = 1 << 30  # a lying header must not make us allocate more
READ_BYTES = 1 << 20
_ZEROS = bytes(BLOCK_BYTES)
_LONG_NAME_KINDS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_KINDS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_LONG_NAME_KINDS, *_PAX_KINDS, tarfile.XGLTYPE)  # they speak of the members that follow


class Readable(Protocol):
    """Bytes in sequence."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """One member of an archive, with all the bytes it takes up."""

    name: str
    kind: str  # "file", "folder" or "other" (links, devices, sparse files)
    offset: int  # of its first header
    data_offset: int
    num_bytes: int
    stored: bytes  # headers, data and padding

    @property
    def data(self) -> bytes:
        begin = self.data_offset - self.offset
        return self.stored[begin : begin + self.num_bytes]

    @property
    def end(self) -> int:
        return self.offset + len(self.stored)


@dataclass(frozen=True)
class Damage:
    """A place where an archive is not what it should be."""

    offset: int
    reason: str


def walk(content: Readable, *, resync: bool = False) -> Iterator[Member | Damage]:
    """The members in order. After a Damage it ends, or with `resync` goes on at the next sound header."""
    blocks = _Blocks(content)
    while True:
        offset = blocks.offset
        try:
            member = _next_member(blocks)
        except _DamagedError as error:
            yield Damage(offset, str(error))
            if not resync or not _find_header(blocks):
                return
            continue
        if member is None:
            if (problem := _end_problem(blocks)) is not None:
                yield Damage(offset, problem)
                if resync and _find_header(blocks):
                    continue
            return
        yield member


def safe_name(name: str) -> str:
    """A member's name fit for a log: printable, and no longer than a line."""
    shown = "".join(char if char.isprintable() else "?" for char in name)
    return shown if len(shown) <= 120 else f"{shown[:80]}...{shown[-30:]}"


class _DamagedError(Exception):
    pass


class _Blocks:
    """Whole blocks out of a stream, with the offset, and a block that can be put back."""

    def __init__(self, content: Readable) -> None:
        self.content = content
        self.offset = 0
        self._back = b""

    def read(self, num_bytes: int) -> bytes:
        """As many of the bytes as are left."""
        parts, missing = [], num_bytes
        if self._back:
            parts.append(self._back[:missing])
            self._back = self._back[missing:]
            missing -= len(parts[0])
        while missing and (part := self.content.read(min(missing, READ_BYTES))):
            parts.append(part)
            missing -= len(part)
        self.offset += num_bytes - missing
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def put_back(self, data: bytes) -> None:
        self._back = data + self._back
        self.offset -= len(data)


def _next_member(blocks: _Blocks) -> Member | None:
    """The next member, or None at a block of zeros (which is consumed)."""
    offset = blocks.offset
    stored: list[bytes] = []
    name: str | None = None
    num_bytes: int | None = None
    while True:
        block = blocks.read(BLOCK_BYTES)
        if block == _ZEROS and not stored:
            return None
        header = _header(block)
        if header.type in _EXTENSIONS:
            own_bytes = header.size
        elif header.isreg() or header.type not in tarfile.SUPPORTED_TYPES:
            own_bytes = header.size if num_bytes is None else num_bytes
        else:  # a folder, link or device has no data, whatever its header claims
            own_bytes = 0
        data = _payload(blocks, own_bytes)
        stored += [block, data]
        if header.type in _LONG_NAME_KINDS:
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = data[: header.size].rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type in _PAX_KINDS:
            records = _pax_records(data[: header.size])
            name = records.get("path", name)
            if "size" in records:
                num_bytes = _whole_number(records["size"])
        elif header.type != tarfile.XGLTYPE:
            return Member(
                name=name or header.name,
                kind=_kind(header),
                offset=offset,
                data_offset=blocks.offset - len(data),
                num_bytes=own_bytes,
                stored=b"".join(stored),
            )


def _header(block: bytes) -> tarfile.TarInfo:
    if not block:
        raise _DamagedError("it ends without an end-of-archive marker")
    if len(block) < BLOCK_BYTES:
        raise _DamagedError("it is cut short in a header")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _DamagedError(f"a header cannot be read ({error})") from error


def _payload(blocks: _Blocks, num_bytes: int) -> bytes:
    if not 0 <= num_bytes <= MAX_MEMBER_BYTES:
        raise _DamagedError(f"a header claims {num_bytes} bytes of data")
    padded = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
    data = blocks.read(padded)
    if len(data) < padded:
        raise _DamagedError("it is cut short in a member")
    return data


def _kind(header: tarfile.TarInfo) -> str:
    if header.isdir():
        return "folder"
    # not isreg() and issparse(): they take sparse and contiguous files, read from one header, for plain ones
    return "file" if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else "other"


def _pax_records(data: bytes) -> dict[str, str]:
    """Lines of `LENGTH KEY=VALUE` (POSIX.1-2001, pax interchange format)."""
    records: dict[str, str] = {}
    while data:
        digits, _, _ = data.partition(b" ")
        length = _whole_number(digits.decode("ascii", "replace"))
        key, is_there, value = data[len(digits) + 1 : length].partition(b"=")
        if not is_there or length > len(data) or not value.endswith(b"\n"):
            raise _DamagedError("an extended header cannot be read")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise _DamagedError("an extended header cannot be read")
    return int(text)


def _end_problem(blocks: _Blocks) -> str | None:
    """What is wrong after the first block of zeros: a second one is missing, or something follows."""
    second = blocks.read(BLOCK_BYTES)
    if len(second) < BLOCK_BYTES:
        return "its end-of-archive marker is cut short"
    while second:
        if second.count(0) != len(second):
            blocks.put_back(second)
            return "no end-of-archive marker where the members end: zeros, then more data"
        second = blocks.read(READ_BYTES)
    return None


def _find_header(blocks: _Blocks) -> bool:
    """Go on to the next block that is a sound header; False at the end."""
    while len(block := blocks.read(BLOCK_BYTES)) == BLOCK_BYTES:
        if block != _ZEROS and _is_sound(block):
            blocks.put_back(block)
            return True
    return False


def _is_sound(block: bytes) -> bool:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return bool(header.name) and 0 <= header.size <= MAX_MEMBER_BYTES
