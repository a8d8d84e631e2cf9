"""Speed and memory over time, and between ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pretrain.doctor import series
from pretrain.doctor import thresholds as limit
from pretrain.doctor.finding import Finding
from pretrain.doctor.run_files import RunFiles

_SLOW = re.compile(r"step (\d+): (rank \d+(?: \([^)]*\))?) works at ([0-9.]+) of the speed of the others")
_RECOVERED = re.compile(r"step \d+: (rank \d+(?: \([^)]*\))?) is as fast as the others again")


def check_straggler(files: RunFiles) -> Iterator[Finding]:
    """A rank that the others wait for."""
    slow: dict[str, str] = {}
    for line in files.log:
        if found := _SLOW.match(line):
            slow[found[2]] = line
        elif found := _RECOVERED.match(line):
            slow.pop(found[1], None)
    below = float(files.setting("guard.straggler.below", 0.6))
    recent = series.timed(files)
    speed = series.median(recent, "slowest_rank_speed")
    if not slow and (speed is None or speed >= below):
        return
    ranks = ", ".join(slow) or f"rank {series.last(recent, 'slowest_rank') or 0:.0f}"
    evidence = list(slow.values())
    if speed is not None:
        evidence.append(
            f"the slowest rank works at {speed:.2f} of the others' speed over {series.span(recent)}"
        )
    yield Finding(
        "warning",
        "straggler",
        f"All ranks wait for {ranks}.",
        tuple(evidence),
        "look at its machine for another job, a hot or throttled GPU (`nvidia-smi -q -d PERFORMANCE`), or a "
        "slow disk; if it stays so, leave that node out (srun --exclude=NODE) and continue",
    )


def check_slowing(files: RunFiles) -> Iterator[Finding]:
    """Steps take longer than they did at first."""
    own = series.own_records(files)
    begin, recent = own[: len(series.recent(files))], series.recent(files)
    first, now = series.median(begin, "step_seconds"), series.median(recent, "step_seconds")
    apart = len(own) >= 2 * len(recent) and series.seconds_in(own) >= limit.MIN_SLOWING_SECONDS
    if not apart or not first or not now or now < limit.NOTED_SLOWING * first:
        return
    waits = (
        series.median(begin, "data_wait_seconds") or 0.0,
        series.median(recent, "data_wait_seconds") or 0.0,
    )
    yield Finding(
        "warning" if now >= limit.MAX_SLOWING * first else "note",
        "getting slower",
        f"A step takes {now / first:.1f} times as long as at first.",
        (
            f"{first:.3f} s over {series.span(begin)}, {now:.3f} s over {series.span(recent)}",
            f"of which waiting for data: {waits[0]:.3f} s, then {waits[1]:.3f} s",
        ),
        "look for other work on the same machines, throttled GPUs, and memory that is swapped",
    )


def check_memory(files: RunFiles) -> Iterator[Finding]:
    grown = memory_growth(files)
    if grown and files.state == "running":
        yield Finding(
            "warning",
            "memory grows",
            "The memory of the training process grows and grows; the kernel will kill it in the end.",
            (grown,),
            "lower data.prefetch_batches and data.shuffle_block; if that changes nothing, report it",
        )


def memory_growth(files: RunFiles) -> str | None:
    """How the memory of the training process grew over the newest start, if it did."""
    own = series.own_records(files)
    sizes = series.values(own, "resident_bytes")
    if len(sizes) < limit.MIN_MEMORY_RECORDS:
        return None
    quarter = len(sizes) // 4
    means = [sum(part) / len(part) for part in (sizes[quarter : 2 * quarter], sizes[2 * quarter : -quarter])]
    means.append(sum(sizes[-quarter:]) / quarter)
    grows = means[0] < means[1] < means[2]
    enough = (
        means[2] - means[0] > limit.MIN_MEMORY_GROWTH_BYTES and means[2] > limit.MAX_MEMORY_GROWTH * means[0]
    )
    if not (grows and enough):
        return None
    return f"its memory grew from {means[0] / 1e9:.1f} to {means[2] / 1e9:.1f} GB over {series.span(own)}"
