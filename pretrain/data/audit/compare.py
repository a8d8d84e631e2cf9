"""What only shows when the shards are looked at together: copies, labels, sizes, the layout of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.data.audit.finding import (
    ERROR,
    NOTE,
    WARNING,
    Finding,
    ImageSummary,
    LabelSummary,
    Spread,
    about_folder,
)
from pretrain.data.audit.folder import CLASSES, MISSING, SIZES, Folder
from pretrain.data.audit.shard import ShardAudit
from pretrain.data.columns import NO_LABEL
from pretrain.errors import ConfigError

NUM_NAMED = 20  # of images that are there twice, and of classes
UNEVEN_RATIO = 2.0  # the largest shard of a split against the smallest; the last one is not looked at
COPIES, LEAK, UNLABELLED, LAYOUT = "copies", "leak", "unlabelled", "layout"


@dataclass(frozen=True)
class Layout:
    """The run that the shards are meant for."""

    lanes: int
    world_size: int = 1
    nodes: int = 1
    split: str = "train"

    def __post_init__(self) -> None:
        for name in ("lanes", "world_size", "nodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not above 0; use 1 or more")


def sizes_findings(folder: Folder, audits: Sequence[ShardAudit]) -> Iterator[Finding]:
    found = {audit.name: audit.num_samples for audit in audits}
    told = {finding.shard for finding in folder.findings if finding.code == MISSING}
    for file, sizes in folder.sizes.items():
        for name, size in sizes.items():
            if found.get(name) == size or name in told:
                continue
            there = f"there are {found[name]}" if name in found else "there is no such shard"
            remedy = f"restore the shard, or remove {file} if it is out of date"
            reason = f"{file} counts {size} samples in it, {there}"
            yield Finding(ERROR, SIZES, name, None, "", reason, remedy)


def copies(audits: Sequence[ShardAudit]) -> Iterator[Finding]:
    """Images that are there several times: within a split worth a note, across splits a warning.

    64 bits of hash: among 100 million images a false pair has a chance of 1 in 3000.
    """
    if not audits:
        return
    hashes = np.concatenate([audit.image_hashes for audit in audits])
    ends = np.cumsum([audit.num_samples for audit in audits])
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    within: list[list[int]] = []
    across: list[list[int]] = []
    splits = [audit.split for audit in audits]
    for begin, end in _true_stretches(same):
        rows = order[begin : end + 1].tolist()
        owners = np.searchsorted(ends, rows, side="right")
        kind = across if len({splits[owner] for owner in owners}) > 1 else within
        kind.append(rows)

    def name(row: int) -> str:
        owner = int(np.searchsorted(ends, row, side="right"))
        audit = audits[owner]
        place = row - (int(ends[owner]) - audit.num_samples)
        key = audit.keys.decode().split("\n")[place]
        return f"{key} ({audit.name}, byte {audit.offsets[place]})"

    def tell(groups: list[list[int]]) -> str:
        named = "; ".join(" = ".join(map(name, rows[:5])) for rows in groups[:NUM_NAMED])
        return named + (f"; and {len(groups) - NUM_NAMED} more" if len(groups) > NUM_NAMED else "")

    if across:
        reason = f"images in more than one split: {len(across)}: {tell(across)}"
        yield about_folder(WARNING, LEAK, reason, "remove them from the training split")
    if within:
        reason = f"images more than once in their split: {len(within)}: {tell(within)}"
        yield about_folder(NOTE, COPIES, reason, "remove the copies if they are not meant")


def _true_stretches(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, end) of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def label_findings(folder: Folder, audits: Sequence[ShardAudit]) -> Iterator[Finding]:
    for split, labels in _labels(audits).items():
        known = labels[labels != NO_LABEL]
        if len(known) == 0 and len(labels):
            yield about_folder(
                NOTE, UNLABELLED, f"no sample of split {split} has a label", "none is needed for pretraining"
            )
        elif len(known) < len(labels):
            reason = f"{len(labels) - len(known)} of {len(labels)} samples of split {split} have no label"
            yield about_folder(WARNING, UNLABELLED, reason, "add a .cls to each, or take it as it is")
        absent = sorted(set(range(len(folder.class_names))) - set(known.tolist()))
        if len(known) and absent:
            named = ", ".join(f"{index} {folder.class_names[index]}" for index in absent[:NUM_NAMED])
            more = f", and {len(absent) - NUM_NAMED} more" if len(absent) > NUM_NAMED else ""
            reason = f"{len(absent)} of {len(folder.class_names)} classes have no sample in split {split}"
            yield about_folder(NOTE, CLASSES, f"{reason}: {named}{more}", "fine for a part of a data set")


def layout_findings(layout: Layout, audits: Sequence[ShardAudit]) -> Iterator[Finding]:
    sizes = [audit.num_samples for audit in audits if audit.split == layout.split]
    num_samples, lanes = sum(sizes), layout.lanes
    if not sizes:
        known = ", ".join(sorted({audit.split for audit in audits})) or "none"
        yield about_folder(ERROR, LAYOUT, f"there is no split {layout.split!r}", f"known: {known}")
        return
    if num_samples < lanes:
        reason = f"{lanes} lanes cannot share the {num_samples} samples of split {layout.split}"
        yield about_folder(ERROR, LAYOUT, reason, f"use data.lanes={num_samples} or fewer")
    if lanes % layout.world_size:
        more = -(-lanes // layout.world_size) * layout.world_size
        reason = f"{lanes} lanes cannot be shared equally by {layout.world_size} ranks"
        yield about_folder(ERROR, LAYOUT, reason, f"use data.lanes={more}")
    if layout.world_size % layout.nodes:
        reason = f"{layout.world_size} ranks cannot be shared equally by {layout.nodes} nodes"
        yield about_folder(ERROR, LAYOUT, reason, "start equally many ranks on each node")
    if len(sizes) < layout.nodes:
        reason = f"{len(sizes)} shards for {layout.nodes} nodes, so several nodes read the same file"
        yield about_folder(NOTE, LAYOUT, reason, "build smaller shards if storage is slow")
    smallest, largest = min(sizes[:-1] or sizes), max(sizes)  # a last shard holds what was left over
    if largest > UNEVEN_RATIO * smallest:
        reason = f"uneven shards: {smallest} to {largest} samples"
        yield about_folder(NOTE, LAYOUT, reason, "no sample is lost, but reads are less even")


def _labels(audits: Sequence[ShardAudit]) -> dict[str, NDArray[np.int32]]:
    by_split: defaultdict[str, list[NDArray[np.int32]]] = defaultdict(list)
    for audit in audits:
        by_split[audit.split].append(audit.labels)
    return {split: np.concatenate(parts) for split, parts in by_split.items()}


def label_summaries(audits: Sequence[ShardAudit]) -> dict[str, LabelSummary]:
    summaries = {}
    for split, labels in _labels(audits).items():
        known = labels[labels != NO_LABEL]
        counts = np.unique(known, return_counts=True)[1]
        summaries[split] = LabelSummary(len(labels), len(known), len(counts), _spread(counts))
    return summaries


def image_summary(audits: Sequence[ShardAudit]) -> ImageSummary:
    sides = np.concatenate([audit.sides_px for audit in audits] or [np.empty((0, 2), np.int32)])
    formats: Counter[str] = sum((audit.formats for audit in audits), Counter())
    return ImageSummary(
        formats=dict(formats),
        short_side_px=_spread(sides.min(axis=1)),
        long_side_px=_spread(sides.max(axis=1)),
        num_turned=sum(audit.num_turned for audit in audits),
        num_decoded=sum(audit.num_decoded for audit in audits),
    )


def _spread(values: NDArray[np.int32] | NDArray[np.int64]) -> Spread | None:
    if len(values) == 0:
        return None
    ordered = np.sort(values)
    return Spread(int(ordered[0]), int(ordered[len(ordered) // 2]), int(ordered[-1]))
