"""Which members of a shard make sound samples, and under which keys these are written anew.

Members of one key are one sample as long as none contradicts another: the same member twice with other
content begins a second sample. Where it cannot be told which image a label belongs to, it is left out: a
guess would be a wrong label.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import xxhash

from pretrain.data.scan import IMAGE_EXTENSIONS, NO_IMAGE
from pretrain.data.tar import safe_name

AMBIGUOUS, INCOMPLETE = "ambiguous", "incomplete"
_ROOM_FOR_NUMBER = "_000000"  # which may follow a key


@dataclass(frozen=True)
class Part:
    """A member of a sample, without its data."""

    extension: str  # lower case
    offset: int  # of its first header
    data_offset: int
    num_bytes: int
    digest: bytes  # of its data
    problem: str = ""  # code, where it is an image that cannot be used
    detail: str = ""  # of the problem


@dataclass
class Piece:
    """Parts of one key that follow each other."""

    key: str
    offset: int
    parts: dict[str, Part] = field(default_factory=dict)  # by extension
    problem: str = ""  # code, where its bytes are known to be wrong
    is_hit: bool = False  # lies at a damaged place, so something of it may be lost
    is_ambiguous: bool = False
    is_contradicted: bool = False  # another piece of its key holds other content
    num_pieces: int = 1

    @property
    def image(self) -> Part | None:
        return next((self.parts[name] for name in IMAGE_EXTENSIONS if name in self.parts), None)

    def agrees(self, other: Piece) -> bool:
        shared = self.parts.keys() & other.parts.keys()
        return all(self.parts[name].digest == other.parts[name].digest for name in shared)


@dataclass(frozen=True)
class Rejected:
    """What is not written, and why."""

    offset: int
    key: str  # fit for a log
    code: str
    reason: str


@dataclass(frozen=True)
class Kept:
    """A sample to write."""

    key: str  # in the new shard
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Assembled:
    kept: tuple[Kept, ...]
    rejected: tuple[Rejected, ...]
    num_copies: int  # pieces that only said again what is kept
    num_regrouped: int  # samples put together from several places
    num_renamed: int


def split_run(key: str, parts: Sequence[Part]) -> list[Piece]:
    """Parts of one key that follow each other, as pieces: one, or several if a member is there twice."""
    pieces = [Piece(key, parts[0].offset)]
    for part in parts:
        earlier = pieces[-1].parts.get(part.extension)
        if earlier is not None and earlier.digest == part.digest:
            continue
        if earlier is not None:
            pieces.append(Piece(key, part.offset))
        pieces[-1].parts[part.extension] = part
    # image label image label tells what belongs together; image image label label does not
    if len({tuple(piece.parts) for piece in pieces}) > 1:
        for piece in pieces:
            piece.is_ambiguous = True
    return pieces


def assemble(pieces: Iterable[Piece]) -> Assembled:
    """The samples of a shard, in the order in which they began."""
    by_key: defaultdict[str, list[Piece]] = defaultdict(list)
    rejected: list[Rejected] = []
    num_copies = 0
    drafts: list[Piece] = []
    for piece in pieces:
        if piece.is_ambiguous:
            rejected.append(
                _reject(piece, AMBIGUOUS, "members are there twice, and it is not told which belong together")
            )
            continue
        known = by_key[piece.key]
        agreeing = [draft for draft in known if draft.agrees(piece)]
        if len(agreeing) == 1:
            num_copies += _merge(agreeing[0], piece)
        elif len(agreeing) > 1:
            rejected.append(_reject(piece, AMBIGUOUS, "several samples have its key"))
            continue
        elif known and piece.image is None:
            rejected.append(_reject(piece, AMBIGUOUS, "its key stands for other content too"))
        else:
            known.append(piece)
            drafts.append(piece)
        for draft in known:
            draft.is_contradicted |= draft is not piece and not draft.agrees(piece)
        piece.is_contradicted |= any(draft.is_contradicted for draft in known)
    usual = _usual_parts(drafts)
    sound = []
    for draft in drafts:
        if (why := _why_not(draft, usual)) is None:
            sound.append(draft)
        else:
            rejected.append(why)
    kept, num_renamed = _with_new_keys(sound)
    num_regrouped = sum(draft.num_pieces > 1 for draft in sound)
    rejected.sort(key=lambda entry: entry.offset)
    return Assembled(tuple(kept), tuple(rejected), num_copies, num_regrouped, num_renamed)


def _merge(draft: Piece, piece: Piece) -> bool:
    """Add what is new to a draft; True if nothing is."""
    new = {name: part for name, part in piece.parts.items() if name not in draft.parts}
    draft.parts.update(new)
    draft.num_pieces += bool(new)
    draft.is_hit |= piece.is_hit and bool(new)
    return not new


def _why_not(draft: Piece, usual: frozenset[str]) -> Rejected | None:
    image = draft.image
    if image is None:
        found = ", ".join(map(safe_name, sorted(draft.parts)))
        return _reject(draft, NO_IMAGE, f"has no image, only {found}")
    if draft.problem:
        return _reject(draft, draft.problem, "its bytes are not those that were indexed")
    if image.problem:
        return _reject(draft, image.problem, image.detail)
    if draft.is_contradicted and draft.num_pieces > 1:
        return _reject(draft, AMBIGUOUS, "its key stands for other content too, and its members lie apart")
    if draft.is_hit and (missing := usual - draft.parts.keys()):
        lost = ", ".join(map(safe_name, sorted(missing)))
        return _reject(draft, INCOMPLETE, f"lies at a damaged place and has no {lost}")
    return None


def _usual_parts(drafts: Sequence[Piece]) -> frozenset[str]:
    """What the samples away from damage have beside their image."""
    counts = Counter(
        frozenset(draft.parts.keys() - set(IMAGE_EXTENSIONS))
        for draft in drafts
        if draft.image is not None and not draft.is_hit
    )
    return counts.most_common(1)[0][0] if counts else frozenset()


def _with_new_keys(drafts: Sequence[Piece]) -> tuple[list[Kept], int]:
    """Keys without dots that fit into a plain header, each once; a key that may stay stays."""
    plain = [_plain_key(draft) for draft in drafts]
    reserved = {draft.key for draft, key in zip(drafts, plain, strict=True) if key == draft.key}
    used: set[str] = set()
    kept, num_renamed = [], 0
    for draft, wanted in zip(drafts, plain, strict=True):
        key, number = wanted, 2
        while key in used or (key != draft.key and key in reserved):
            key, number = f"{wanted}_{number}", number + 1
        used.add(key)
        num_renamed += key != draft.key
        kept.append(Kept(key, tuple(draft.parts.values())))
    return kept, num_renamed


def _plain_key(draft: Piece) -> str:
    folder, base = posixpath.split(draft.key)
    key = posixpath.join(folder, base.replace(".", "_"))
    longest = max(draft.parts, key=len)
    try:
        tarfile.TarInfo(f"{key}{_ROOM_FOR_NUMBER}.{longest}").tobuf(tarfile.USTAR_FORMAT, "utf-8")
    except ValueError:  # the name is too long
        return xxhash.xxh3_128_hexdigest(key.encode("utf-8", "surrogateescape"))
    return key


def _reject(piece: Piece, code: str, reason: str) -> Rejected:
    return Rejected(piece.offset, safe_name(piece.key), code, reason)
