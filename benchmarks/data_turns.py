"""What every measured process of `benchmarks/data.py` does: start, say so, and take turns when told.

It speaks lines of JSON: `{"start_seconds": ...}` once the first batch is there, then one `{"images": ...}`
for each turn. Who reads them stops the whole process group between turns, so a loader cannot work ahead.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

BATCH_SIZE = 64
SIZE_PX = 224
SCALE = (0.08, 1.0)  # torchvision's default and SimCLR's
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """Where a variant finds its images and may put files of its own."""

    shards: str  # folder with an index
    cifar: str  # another, or empty
    images: str  # the same JPEG files as a folder of classes
    tars: str  # the same shards, or links to them, and nothing else
    work: str  # an empty folder
    num_cores: int


@dataclass(frozen=True)
class Stream:
    """Endless batches: the number of images of each, and the batch itself (None where it is dropped)."""

    batches: Iterator[tuple[int, Any]]
    even: bool = True  # two workers deliver in pairs, so count whole pairs


Make = Callable[[Source], Callable[[], Stream]]  # prepares files, which is not timed; then starts


def cpu_seconds() -> float:
    """CPU time of this process and of all below it."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total + own.cpu_times().children_user + own.cpu_times().children_system


def describe(batch: Any) -> str:
    """Type and shape of a batch, as evidence of what was delivered."""
    if batch is None:
        return "dropped"
    if isinstance(batch, tuple | list):
        return " + ".join(describe(part) for part in batch)
    return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"


def take_turn(stream: Stream, seconds: float) -> dict[str, float]:
    """Images, wall and CPU seconds of whole batches, from the end of one that is not counted."""
    next(stream.batches)
    begin, cpu_begin = time.perf_counter(), cpu_seconds()
    num_images = num_batches = 0
    while time.perf_counter() - begin < seconds or (stream.even and num_batches % 2):
        num_images += next(stream.batches)[0]
        num_batches += 1
    wall_seconds = time.perf_counter() - begin
    return {
        "images": num_images,
        "wall_seconds": round(wall_seconds, 4),
        "cpu_seconds": round(cpu_seconds() - cpu_begin, 3),
    }


def pin(num_cores: int) -> None:
    """Keep this process, and those it starts, to the first cores that it may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])


def serve(make: Make, source: Source) -> None:
    """Answer on what was stdout when called; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    try:
        start = make(source)
        begin = time.perf_counter()
        stream = start()
        num_images, first = next(stream.batches)
        start_seconds = time.perf_counter() - begin
        answer(start_seconds=round(start_seconds, 2), images=num_images, batch=describe(first))
        for line in sys.stdin:
            answer(**take_turn(stream, float(line)))
    except ModuleNotFoundError as error:
        answer(missing=str(error))
    except Exception as error:
        answer(failed=f"{type(error).__name__}: {error}".splitlines()[0][:200])
        raise
