"""One shard from its plan: read its images, check them, write the tar, read it back, note that it is done.

A shard is written under a temporary name, fsynced and renamed; only after it was read back completely does
its note in `.build/done` say that it is finished. The bytes follow from the plan alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.data.build.images import ImageSettings, prepare
from pretrain.data.build.layout import ShardPlan, shuffled_places
from pretrain.data.build.listing import Listing
from pretrain.data.build.sample_members import members_of, read_sample
from pretrain.data.decode import BadImage
from pretrain.data.indexing import ShardRecord, record_shard
from pretrain.data.tar_writer import TarWriter
from pretrain.errors import DataError


@dataclass(frozen=True)
class WriteSettings:
    """All that a worker must know beside the list and the plan of a shard."""

    out: Path
    done: Path  # folder of the notes on finished shards
    name: str
    seed: int
    shuffle: bool
    keep: tuple[str, ...]
    keep_names: bool
    labels: bool
    images: ImageSettings


@dataclass(frozen=True)
class ShardNote:
    """What is remembered of a finished shard."""

    num_samples: int
    sha256: str  # empty where no image of the shard was good, so that there is no file
    source_image_bytes: int
    image_bytes: int
    num_reencoded: int
    rejected: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class FinishedShard:
    plan: ShardPlan
    record: ShardRecord | None
    note: ShardNote


def shard_path(settings: WriteSettings, plan: ShardPlan) -> Path:
    return settings.out / f"{settings.name}-{plan.split}-{plan.number:06d}.tar"


def note_path(settings: WriteSettings, plan: ShardPlan) -> Path:
    return settings.done / f"{plan.split}-{plan.number:06d}.json"


def finish_shard(
    listing: Listing, settings: WriteSettings, plan: ShardPlan, progress: Callable[[int], None]
) -> FinishedShard:
    """The finished shard of an earlier start if it is as it was noted; else write it."""
    path, note = shard_path(settings, plan), _read_note(note_path(settings, plan))
    if note is not None and (path.is_file() or not note.num_samples):
        record = None
        with contextlib.suppress(DataError):
            record = record_shard(path, plan.split) if note.num_samples else None
        if (record.sha256 if record else "") == note.sha256:
            progress(plan.stop - plan.first)
            return FinishedShard(plan, record, note)
    note = _write_shard(listing, settings, plan, path, progress)
    record = record_shard(path, plan.split) if note.num_samples else None
    if record is not None and (record.sha256 != note.sha256 or record.num_samples != note.num_samples):
        raise DataError(f"{path}: the storage gives back other bytes than were written; check the disk")
    _write_safely(note_path(settings, plan), json.dumps(asdict(note)).encode())
    return FinishedShard(plan, record, note)


def _write_shard(
    listing: Listing, settings: WriteSettings, plan: ShardPlan, path: Path, progress: Callable[[int], None]
) -> ShardNote:
    split = listing.splits[plan.split_number]
    key_digits = max(6, len(str(split.num_items - 1)))
    num_samples = source_image_bytes = image_bytes = num_reencoded = 0
    rejected: list[dict[str, str]] = []
    temporary = _temporary(path)
    try:
        with TarWriter(temporary) as tar:
            for place, index in _items(settings, plan, split.num_items):
                sample = read_sample(listing, split.first + index, settings.keep, settings.labels)
                source_image_bytes += len(sample.image)
                try:
                    image = prepare(sample.image, settings.images)
                except BadImage as bad:
                    rejected.append({"split": plan.split, "source": sample.name, "reason": str(bad)})
                else:
                    for extension, data in members_of(
                        sample, image.data, image.extension, settings.keep_names
                    ):
                        tar.add(f"{place:0{key_digits}d}.{extension}", data)
                    num_samples += 1
                    image_bytes += len(image.data)
                    num_reencoded += image.is_reencoded
                progress(1)
            tar.finish()
        if num_samples:
            temporary.replace(path)
            _sync_folder(path.parent)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); mend that and run the command again: "
            "it goes on where it stopped"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sha256 = tar.digest.hexdigest() if num_samples else ""
    return ShardNote(num_samples, sha256, source_image_bytes, image_bytes, num_reencoded, tuple(rejected))


def _items(settings: WriteSettings, plan: ShardPlan, num_items: int) -> Iterator[tuple[int, int]]:
    """(place in the order of the split, index of the item)."""
    places = range(plan.first, plan.stop)
    if not settings.shuffle:
        return zip(places, places, strict=True)
    indices = shuffled_places(settings.seed, plan.split_number, plan.first, plan.stop, num_items)
    return zip(places, indices.tolist(), strict=True)


def _read_note(path: Path) -> ShardNote | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return ShardNote(**{**content, "rejected": tuple(content["rejected"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write_safely(path: Path, data: bytes) -> None:
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    """Make a rename last; some file systems cannot, and lose nothing but time."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
