"""Shards hurt in the ways that happen: cut, rotten, zeroed, joined."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from small_shards import Member, samples, tar_bytes

SAMPLES = samples(0, 6)


def offsets(data: bytes) -> dict[str, int]:
    """Where each member's header lies, and under '' where the end marker begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {member.name: member.offset for member in tar}
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    return {**found, "": end}


def _cut(name: str, more: int = 0) -> Callable[[bytes], bytes]:
    return lambda data: data[: offsets(data)[name] + more]


def _replaced(name: str, more: int, new: bytes) -> Callable[[bytes], bytes]:
    def hurt(data: bytes) -> bytes:
        place = offsets(data)[name] + more
        return data[:place] + new + data[place + len(new) :]

    return hurt


# what hurts a shard of SAMPLES -> (how, offset where it shows as a member or "", keys that cannot be saved)
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str, set[str]]] = {
    "cut in a member": (_cut("000002.jpg", 700), "000002.jpg", {"000002", "000003", "000004", "000005"}),
    "cut on a member boundary": (_cut("000003.jpg"), "000003.jpg", {"000003", "000004", "000005"}),
    "cut in a header": (_cut("000003.jpg", 100), "000003.jpg", {"000003", "000004", "000005"}),
    "cut between image and label": (
        _cut("000002.cls"),
        "000002.cls",
        {"000002", "000003", "000004", "000005"},
    ),
    "cut before the end marker": (_cut(""), "", set()),
    "cut in the end marker": (_cut("", 512), "", set()),
    "rotten header": (_replaced("000002.jpg", 5, b"\xff"), "000002.jpg", {"000002"}),
    "rotten header of a label": (_replaced("000002.cls", 5, b"\xff"), "000002.cls", {"000002"}),
    "rotten size": (_replaced("000002.jpg", 124, b"77777777777"), "000002.jpg", {"000002"}),
    "zeroed header": (_replaced("000002.jpg", 0, bytes(512)), "000002.jpg", {"000002"}),
    "two zeroed blocks": (_replaced("000002.jpg", 0, bytes(1024)), "000002.jpg", {"000002"}),
    "first header zeroed": (_replaced("000000.jpg", 0, bytes(512)), "000000.jpg", {"000000"}),
    "another archive appended": (lambda data: data + data, "", set()),
}


def write_damaged(path: Path, kind: str, members: list[Member] = SAMPLES) -> Path:
    data = DAMAGES[kind][0](tar_bytes(members))
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith("gz") else data)
    return path


def stored_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """All samples of a folder of plain shards as a plain reader sees them: key -> extension -> bytes."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                assert extension not in found.setdefault(f"{path.stem}/{key}", {})
                found[f"{path.stem}/{key}"][extension] = file.read()
    return found
