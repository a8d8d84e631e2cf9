"""How many images a second this machine reads, decodes and crops, and the settings to use for that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.data.loader import DataConfig, open_batches, open_splits
from pretrain.data.manifest import Split
from pretrain.views.plan import ViewConfig

GOOD_ENOUGH_RATIO = 0.95  # of the best rate: fewer threads are worth more than the last few percent
PREFETCH_BATCHES = (1, 3, 6)
USUAL_PREFETCH = 3
WARM_UP_BATCHES = 3
MAX_LANES = 16


@dataclass(frozen=True)
class BenchRequest:
    """What to measure."""

    shards: str
    split: str = "train"
    view_px: int = 224
    num_views: int = 2
    batch_size: int = 64
    seconds: float = 4.0  # for each setting
    threads: tuple[int, ...] = ()  # () for 1, 2, 4, ... up to the CPU cores of this machine


@dataclass(frozen=True)
class Rate:
    """One setting and what it gave."""

    decode_threads: int
    prefetch_batches: int
    images_per_second: float
    start_seconds: float  # until the first batch


def measure(request: BenchRequest, report: Callable[[str], None]) -> list[Rate]:
    """Each number of threads with the usual prefetching, then the best with more and less of it."""
    (split,) = open_splits(DataConfig(shards=request.shards, split=request.split))
    split.manifest.check_shards()
    report(
        f"{split.num_samples} images of {split.stored_bytes / max(1, split.num_samples) / 1024:.0f} KiB; "
        f"{request.num_views} crops of {request.view_px} px, batches of {request.batch_size}, "
        f"{num_cores()} CPU cores"
    )
    rates = [
        _measure_one(request, split, threads, USUAL_PREFETCH, report)
        for threads in request.threads or _thread_counts(num_cores())
    ]
    chosen = choose(rates).decode_threads
    rates += [
        _measure_one(request, split, chosen, prefetch, report)
        for prefetch in PREFETCH_BATCHES
        if prefetch != USUAL_PREFETCH
    ]
    return rates


def choose(rates: Sequence[Rate]) -> Rate:
    """The fewest threads, then the least prefetching, that come close to the best rate."""
    best = max(rate.images_per_second for rate in rates)
    good = [rate for rate in rates if rate.images_per_second >= GOOD_ENOUGH_RATIO * best]
    return min(good, key=lambda rate: (rate.decode_threads, rate.prefetch_batches))


def advice(rates: Sequence[Rate]) -> str:
    """The setting to use, as it stands in a config."""
    rate = choose(rates)
    return (
        f"use data.decode_threads={rate.decode_threads} data.prefetch_batches={rate.prefetch_batches}: "
        f"{rate.images_per_second:.0f} images/s for one rank alone; the ranks of a node share "
        "its cores"
    )


def num_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _num_lanes(batch_size: int, num_samples: int) -> int:
    """As many as fit, of those that divide the batch; a run has more, which changes little."""
    return max(n for n in range(1, MAX_LANES + 1) if batch_size % n == 0 and n <= num_samples)


def _thread_counts(cores: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= cores:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == cores else [*counts, cores]


def _measure_one(
    request: BenchRequest, split: Split, threads: int, prefetch: int, report: Callable[[str], None]
) -> Rate:
    config = DataConfig(
        shards=request.shards,
        split=request.split,
        lanes=_num_lanes(request.batch_size, split.num_samples),
        decode_threads=threads,
        prefetch_batches=prefetch,
        max_bad_ratio=1.0,  # what a bad image costs is measured too
    )
    views = [ViewConfig(size_px=request.view_px)] * request.num_views
    begin = time.monotonic()
    batches = open_batches(config, [split], views, seed=0, batch_size=request.batch_size)
    try:
        next(batches)
        start_seconds = time.monotonic() - begin
        for _ in range(WARM_UP_BATCHES + prefetch):  # what was made before anyone asked does not count
            next(batches)
        begin, num_batches = time.monotonic(), 0
        while (passed := time.monotonic() - begin) < request.seconds:
            next(batches)
            num_batches += 1
    finally:
        batches.close()
    rate = Rate(threads, prefetch, num_batches * request.batch_size / passed, start_seconds)
    report(
        f"threads {threads:3d}  prefetch {prefetch}  {rate.images_per_second:8.0f} images/s  "
        f"first batch after {start_seconds:.1f} s"
    )
    return rate
