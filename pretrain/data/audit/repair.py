"""Write a folder of shards anew with all that is sound in them, and a list of what is not."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.audit.finding import MIB
from pretrain.data.audit.folder import Folder, indexed_shards, open_folder, stem_of, stored_bytes
from pretrain.data.audit.rewrite import RewriteTask, Rewritten, count_codes, rewrite_shard
from pretrain.data.audit.verify import ReportProgress
from pretrain.data.decode import MAX_PIXELS
from pretrain.data.indexing import CLASSES_NAME, write_manifest
from pretrain.data.side_by_side import side_by_side
from pretrain.data.storage import Location, StorageError, open_file, parse_location
from pretrain.errors import DataError

REJECTED_NAME = "rejected.jsonl"
PACKED_GROWTH = 3  # room for a compressed shard, in its own size: unpacked, and written anew


@dataclass(frozen=True)
class RepairReport:
    """What became of a folder."""

    out: Path
    num_shards: int  # written
    num_shards_lost: int  # nothing of them is sound
    num_kept: int  # samples
    num_copies: int  # members that only repeated what is kept
    num_regrouped: int
    num_renamed: int
    left_out: dict[str, int]  # code -> places listed in rejected.jsonl


def repair_folder(
    folder: Location | Path | str,
    out: Path | str,
    *,
    decode_images: bool = True,
    max_pixels: int = MAX_PIXELS,
    num_workers: int | None = None,
    report_progress: ReportProgress | None = None,
) -> RepairReport:
    """Write every sound sample into `out`, with an index; nothing in `folder` is changed.

    Shards keep their names; compressed ones become plain .tar, which is read faster and from any place.
    """
    location = folder if isinstance(folder, Location) else parse_location(folder)
    out = Path(out)
    opened = open_folder(location)
    _check_out(opened, location, out)
    targets = _targets(opened, out)
    tasks = (
        RewriteTask(
            name=name,
            location=opened.root.join(name),
            split=opened.splits[name],
            target=target,
            indexed=indexed,
            decode_images=decode_images,
            max_pixels=max_pixels,
        )
        for name, target, indexed in zip(opened.names, targets, indexed_shards(opened), strict=True)
    )
    done: list[Rewritten] = []
    with (out / REJECTED_NAME).open("w", encoding="utf-8") as file:
        for shard in side_by_side(rewrite_shard, tasks, len(opened.names), stored_bytes(opened), num_workers):
            done.append(shard)
            for entry in shard.rejected:
                line = {"shard": shard.name, "offset": entry.offset, "key": entry.key}
                file.write(json.dumps({**line, "code": entry.code, "reason": entry.reason}) + "\n")
            if report_progress is not None:
                report_progress(len(done), len(opened.names))
    records = [shard.record for shard in done if shard.record is not None]
    if not records:
        raise DataError(
            f"{location}: no sample is sound; {out / REJECTED_NAME} says why, fetch the shards again"
        )
    if opened.class_names:
        (out / CLASSES_NAME).write_text("\n".join(opened.class_names) + "\n", encoding="utf-8")
    write_manifest(out, records, class_names=opened.class_names)
    return RepairReport(
        out=out,
        num_shards=len(records),
        num_shards_lost=len(done) - len(records),
        num_kept=sum(record.num_samples for record in records),
        num_copies=sum(shard.num_copies for shard in done),
        num_regrouped=sum(shard.num_regrouped for shard in done),
        num_renamed=sum(shard.num_renamed for shard in done),
        left_out=count_codes(done),
    )


def format_report(report: RepairReport) -> str:
    lost = f" ({report.num_shards_lost} hold nothing sound)" if report.num_shards_lost else ""
    lines = [f"{report.num_kept} samples kept in {report.num_shards} shards{lost}, indexed, in {report.out}"]
    changed = {
        "copies of members dropped": report.num_copies,
        "samples put together from distant members": report.num_regrouped,
        "samples renamed": report.num_renamed,
    }
    lines += [f"{count} {what}" for what, count in changed.items() if count]
    if report.left_out:
        told = ", ".join(f"{code} {count}" for code, count in report.left_out.items())
        lines.append(f"left out: {told}; listed in {report.out / REJECTED_NAME}")
    return "\n".join(lines)


def _check_out(folder: Folder, location: Location, out: Path) -> None:
    """An empty folder, none of those that are read, with room for all shards."""
    for source in (location, folder.root):
        if source.is_local and source.path.resolve() == out.resolve():
            raise DataError(
                f"{out}: is the folder to repair; choose another one, nothing is changed in place"
            )
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: is not an empty folder; choose another one")
        out.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(out).free
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); choose another folder") from error
    needed_bytes = sum(_room(folder.root.join(name)) for name in folder.names)
    if needed_bytes > free_bytes:
        raise DataError(
            f"{out}: {free_bytes // MIB} MiB are free, about {needed_bytes // MIB} are needed; "
            "free some, or choose another folder"
        )


def _room(shard: Location) -> int:
    try:
        with open_file(shard) as file:
            return file.num_bytes * (PACKED_GROWTH if shard.url.endswith("gz") else 1)
    except StorageError:
        return 0  # it will be listed as one that cannot be read


def _targets(folder: Folder, out: Path) -> list[Path]:
    """Where each shard goes. a.tar and a.tar.gz are two shards all the same."""
    used: set[str] = set()
    targets = []
    for name in folder.names:
        stem, number = stem_of(name), 2
        while stem in used:
            stem, number = f"{stem_of(name)}-{number}", number + 1
        used.add(stem)
        targets.append(out / f"{stem}.tar")
    return targets
