"""The data: does the run wait for it, is any of it bad, does the storage answer?"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator

from pretrain.doctor import series
from pretrain.doctor import thresholds as limit
from pretrain.doctor.finding import Finding
from pretrain.doctor.remedy import shard_folders, verify_shards
from pretrain.doctor.run_files import RunFiles

CHECKSUM = "checksum"  # the reason where the bytes are not those that were indexed


def check_data_bound(files: RunFiles) -> Iterator[Finding]:
    """Training waits for its data."""
    recent = series.timed(files)
    if series.seconds_in(recent) < limit.MIN_TIMED_SECONDS:
        return
    waits, steps = series.mean(recent, "data_wait_seconds"), series.mean(recent, "step_seconds")
    does_it_itself = files.setting("data.resident") or files.setting("data.decode_threads", 2) == 0
    most = limit.MAX_DATA_WORK_RATIO if does_it_itself else limit.MAX_DATA_WAIT_RATIO
    if waits is None or not steps or waits / steps <= most:
        return
    rate = series.mean(recent, "images_per_second") or 0.0
    evidence = [
        f"{waits:.3f} s of {steps:.3f} s per step are waiting, over {series.span(recent)}",
        f"{rate:.0f} images/s; without waiting about {rate * steps / max(steps - waits, 1e-9):.0f}",
    ]
    marker = "seconds/"
    sections = [name for name in recent[-1] if name.startswith(marker)]
    if sections:
        told = (f"{name.removeprefix(marker)} {series.mean(recent, name) or 0:.3f}" for name in sections)
        evidence.append(f"seconds of a step: {', '.join(told)}")
    yield Finding(
        "warning",
        "data-bound",
        f"The run waits for its data for {waits / steps:.0%} of the time.",
        tuple(evidence),
        _faster_data(files),
    )


def _faster_data(files: RunFiles) -> str:
    threads = int(files.setting("data.decode_threads", 2))
    folder = shlex.quote(shard_folders(files)[0])
    if files.setting("data.resident"):
        return (
            "data.resident=true cuts the crops in the training process: on a machine without a GPU set "
            f"data.resident=false data.decode_threads=4, or use fewer or smaller views; measure with "
            f"`pretrain shards bench {folder}`"
        )
    ways = [f"find the best setting with `pretrain shards bench {folder}`"]
    if threads == 0:
        ways.append("data.decode_threads=0 decodes in the training process: set 2 or more")
    else:
        ways.append(f"raise data.decode_threads={threads} while the node has idle cores")
    if files.setting("data.cache") is None:
        ways.append("if the shards lie on slow or remote storage, set data.cache to a local disk")
    ways.append("if all images fit into memory, set data.resident=true")
    return "; ".join(ways)


def check_bad_samples(files: RunFiles) -> Iterator[Finding]:
    """quarantine.jsonl: which shards, why, and how much of the budget."""
    entries = {(entry.get("data"), entry.get("sample_id")): entry for entry in files.quarantined}
    if not entries:
        return
    shards = Counter(str(entry.get("shard")) for entry in entries.values())
    reasons = Counter(str(entry.get("reason")) for entry in entries.values())
    num_changed = sum(num for reason, num in reasons.items() if reason.startswith(CHECKSUM))
    num_samples = _num_samples(files)
    ratio = float(files.setting("data.max_bad_ratio", 0.001))
    evidence = [
        "shards: " + ", ".join(f"{name} ({num})" for name, num in shards.most_common(5)),
        "reasons: " + ", ".join(f"{reason} ({num})" for reason, num in reasons.most_common(4)),
    ]
    used = 0.0
    if num_samples:
        allowed = max(1, int(ratio * num_samples))
        used = len(entries) / allowed
        evidence.append(f"{len(entries)} of the {allowed} that data.max_bad_ratio={ratio:g} allows")
    many = used >= limit.MAX_BUDGET_RATIO and len(entries) > 1
    told = "were" if len(entries) > 1 else "was"
    what = f"{len(entries)} sample{'s' * (len(entries) > 1)} could not be used and {told} replaced by others."
    if num_changed:
        of_which = "Their" if num_changed == len(entries) else f"Of {num_changed} the"
        what += f" {of_which} bytes are not those that were indexed: a disk or a copy is at fault."
        do = f"copy the shards named again from their source, then `{verify_shards(files)}`"
    else:
        do = f"mend with `{verify_shards(files, repair=True)}`, or leave them out"
    yield Finding("warning" if many or num_changed else "note", "bad shards", what, tuple(evidence), do)


def _num_samples(files: RunFiles) -> int | None:
    for stored in files.checkpoints:
        if stored.num_samples:
            return stored.num_samples
    images, epochs = series.last(files.records, "images"), series.last(files.records, "epoch")
    return round(images / epochs) if images and epochs else None


def check_retries(files: RunFiles) -> Iterator[Finding]:
    """Reads that the storage had to be asked for again."""
    retries = series.last(files.records, "storage_retries") or 0.0
    if not retries:
        return
    own = [record for record in files.records if record.get("attempt") == files.records[-1].get("attempt")]
    steps = max(1.0, series.steps_in(own))
    yield Finding(
        "warning" if retries / steps > limit.MAX_RETRIES_PER_STEP else "note",
        "storage retries",
        f"{retries:.0f} reads of shards failed and were tried again since this start.",
        (f"{retries / steps:.2g} per step over {steps:.0f} steps",),
        "look at the health and the limits of the storage that holds the shards; data.cache keeps what was "
        "read on a local disk; data.timeout_seconds "
        f"({float(files.setting('data.timeout_seconds', 60.0)):g}) is how long a read may take",
    )
