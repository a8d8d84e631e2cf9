"""A build from top to bottom."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.build.images import ImageSettings, prepare
from pretrain.data.build.layout import HEADER_BYTES, MIB, ShardPlan, num_shards_for, plan_shards
from pretrain.data.build.listing import Listing, ListingWriter, SplitItems, describe_skipped
from pretrain.data.build.pool import finish_shards
from pretrain.data.build.progress import show_progress
from pretrain.data.build.sample_members import DEFAULT_KEEP, read_sample
from pretrain.data.build.settings import BuildRequest, BuildResult
from pretrain.data.build.shard_writer import FinishedShard, WriteSettings, shard_path
from pretrain.data.build.sources import find_source
from pretrain.data.build.sources.source import Source
from pretrain.data.build.work_folder import REJECTED_NAME, WorkFolder, stamps
from pretrain.data.decode import BadImage
from pretrain.data.indexing import split_of, write_manifest
from pretrain.data.sizes_files import SPLITS
from pretrain.errors import DataError

GIB = 1 << 30
_NUM_PROBES = 64  # images that tell how much smaller a split becomes
_SPARE_RATIO = 0.02  # disk left free beside the estimate


def build_shards(request: BuildRequest, report: Callable[[str], None]) -> BuildResult:
    """Write the shards of a source and their index; go on with a build that was killed."""
    begin = time.monotonic()
    source = find_source(request)
    _check_names(request, source)
    work = WorkFolder(request.out)
    work.open()
    with work.locked():
        report(f"source  {source.kind}: {request.source}, splits {', '.join(source.splits)}")
        for line in source.notes:
            report(f"note    {line}")
        listing = _prepare(request, source, work, report)
        try:
            finished = _write_all(request, listing, work, report)
            _check_rejected(request, finished)
            result = _finish(request, listing, finished, begin)
        finally:
            listing.close()
        work.remove()
    _report_result(request, result, report)
    return result


def _check_names(request: BuildRequest, source: Source) -> None:
    """Whoever indexes the shards again tells splits from the files' names; these must not say another."""
    for split in source.splits:
        name = f"{request.shard_name}-{split}-000000.tar"
        if split in SPLITS.values() and split_of(name) != split:
            raise DataError(
                f"shards named {name} would be taken for split '{split_of(name)}'; give another --name"
            )


def _prepare(
    request: BuildRequest, source: Source, work: WorkFolder, report: Callable[[str], None]
) -> Listing:
    """The list of images: a new one, or that of the build to go on with."""
    identity = {**request.identity(), "files": stamps(source)}
    if work.is_unfinished:
        expected = work.check_plan(identity)
        work.remove_temporaries()
        is_due = source.lists_quickly or not (work.listing / "listing.json").is_file()
        if is_due and _list(source, work, request.out).sha256 != expected:
            raise work.source_changed()
        report(f"resume  {sum(1 for _ in work.done.glob('*.json'))} shards were finished before")
        work.done.mkdir(exist_ok=True)
        return Listing.load(work.listing)
    work.clear_preparations()
    if source.spool_bytes:
        report(f"spool   {source.kind} is read in sequence: {_size(source.spool_bytes)} more disk until done")
        _check_disk(request.out, source.spool_bytes, "the spool")
    listing = _list(source, work, request.out)
    work.write_plan(identity, listing.sha256)
    if listing.skipped:
        report(f"skipped {describe_skipped(listing.skipped)}")
    return listing


def _list(source: Source, work: WorkFolder, out: Path) -> Listing:
    """List into a new folder first: an old list stays whole until the new one is."""
    fresh = work.listing.with_name("listing.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with ListingWriter(fresh, source.root) as writer:
            source.list_items(writer)
            writer.finish()
    except OSError as error:
        raise DataError(f"{out}: the list of images cannot be made ({error}); mend that") from error
    shutil.rmtree(work.listing, ignore_errors=True)
    fresh.rename(work.listing)
    return Listing.load(work.listing)


@dataclass(frozen=True)
class _Estimate:
    image_bytes: int  # in the source
    shard_bytes: int  # in the shards, headers included


def _write_all(
    request: BuildRequest, listing: Listing, work: WorkFolder, report: Callable[[str], None]
) -> list[FinishedShard]:
    images = ImageSettings(request.check_images, request.max_side_px, request.quality, request.subsampling)
    settings = WriteSettings(
        out=request.out,
        done=work.done,
        name=request.shard_name,
        seed=request.seed,
        shuffle=request.shuffle,
        keep=request.keep or DEFAULT_KEEP,
        keep_names=request.keep_names,
        labels=request.labels,
        images=images,
    )
    plans: list[ShardPlan] = []
    num_bytes = 0
    for number, split in enumerate(listing.splits):
        estimate = _estimate(listing, split, images)
        num_shards, why = num_shards_for(
            split.num_items, estimate.shard_bytes, request.samples_per_shard, request.shard_mib
        )
        plans += plan_shards(split.name, number, split.num_items, num_shards)
        num_bytes += estimate.shard_bytes
        report(
            f"plan    {split.name}: {split.num_items} images, {_size(estimate.image_bytes)} -> {num_shards} "
            f"shards of about {_size(estimate.shard_bytes // num_shards)} ({why})"
        )
    present = sum(path.stat().st_size for plan in plans if (path := shard_path(settings, plan)).is_file())
    _check_disk(request.out, num_bytes - present, "the shards")
    total = sum(split.num_items for split in listing.splits)
    with show_progress(total, report) as progress:
        finished = list(finish_shards(work.listing, settings, plans, request.workers, progress))
    return sorted(finished, key=lambda shard: (shard.plan.split_number, shard.plan.number))


def _estimate(listing: Listing, split: SplitItems, images: ImageSettings) -> _Estimate:
    """Bytes of a split before and after; how much shrinking saves is told from a few images."""
    source_bytes = listing.source_bytes(split)
    headers = split.num_items * 2 * HEADER_BYTES
    if images.max_side_px is None:
        return _Estimate(source_bytes, source_bytes + headers)
    before = after = 1
    num_probes = min(_NUM_PROBES, split.num_items)
    for number in range(num_probes):
        index = split.first + number * split.num_items // num_probes
        data = read_sample(listing, index, (), labels=False).image
        try:
            after += len(prepare(data, images).data)
        except BadImage:
            continue
        before += len(data)
    return _Estimate(source_bytes, source_bytes * after // before + headers)


def _check_disk(out: Path, num_bytes: int, what: str) -> None:
    free = shutil.disk_usage(out).free
    if num_bytes * (1 + _SPARE_RATIO) > free:
        raise DataError(
            f"{out}: {what} need about {_size(num_bytes)}, the disk has {_size(free)} left; free some, "
            "name a folder on another disk, or make images smaller with --max-side"
        )


def _check_rejected(request: BuildRequest, finished: list[FinishedShard]) -> None:
    """Write the list of bad images; more than allowed fail the build, which can be run again to go on."""
    rejected = [image for shard in finished for image in shard.note.rejected]
    path = request.out / REJECTED_NAME
    path.unlink(missing_ok=True)
    if rejected:
        path.write_text("".join(json.dumps(image) + "\n" for image in rejected), encoding="utf-8")
    total = sum(shard.plan.stop - shard.plan.first for shard in finished)
    allowed = max(1, int(request.max_bad_ratio * total))
    if len(rejected) > allowed:
        first = rejected[0]
        raise DataError(
            f"{len(rejected)} of {total} images are bad, {allowed} are allowed; the first is "
            f"{first['source']!r} ({first['reason']}), all are in {path}. Mend the source and build into a "
            "new folder, or leave them out with a larger --max-bad-ratio: shards that are written are kept"
        )
    for split in {shard.plan.split for shard in finished}:
        if not any(shard.record for shard in finished if shard.plan.split == split):
            raise DataError(f"{request.source}: no image of split '{split}' is good; see {path}")


def _finish(
    request: BuildRequest, listing: Listing, finished: list[FinishedShard], begin: float
) -> BuildResult:
    records = [shard.record for shard in finished if shard.record is not None]
    manifest = write_manifest(request.out, records, class_names=listing.class_names)
    notes = [shard.note for shard in finished]
    return BuildResult(
        manifest=manifest,
        num_samples=sum(note.num_samples for note in notes),
        num_rejected=sum(len(note.rejected) for note in notes),
        num_reencoded=sum(note.num_reencoded for note in notes),
        source_image_bytes=sum(note.source_image_bytes for note in notes),
        image_bytes=sum(note.image_bytes for note in notes),
        seconds=time.monotonic() - begin,
    )


def _report_result(request: BuildRequest, result: BuildResult, report: Callable[[str], None]) -> None:
    rate = result.num_samples / max(result.seconds, 1e-9)
    report(f"done    {result.num_samples} images in {result.seconds:.0f} s ({rate:.0f} a second)")
    if result.num_rejected:
        report(f"bad     {result.num_rejected} images left out, listed in {request.out / REJECTED_NAME}")
    if request.max_side_px is not None:
        report(
            f"smaller {_size(result.source_image_bytes)} -> {_size(result.image_bytes)} of images, "
            f"{result.num_reencoded} encoded again, {result.num_samples - result.num_reencoded} as they were"
        )


def _size(num_bytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1024:.0f} KiB"
