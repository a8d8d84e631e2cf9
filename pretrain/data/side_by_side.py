"""The same work on every shard, side by side."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from pretrain.errors import ConfigError, DataError

SMALL_BYTES = 1 << 29  # for less, threads: a process takes seconds to start

Task = TypeVar("Task")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_tasks: int,
    num_bytes: int,
    num_workers: int | None,
) -> Iterator[Result]:
    """The results in order. Tasks are drawn as they are needed: a few lie ready for each worker.

    num_bytes: of all shards, as far as known.
    """
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"workers: {num_workers} is not above 0; use 1 or more")
    num_workers = max(1, min(num_workers or len(os.sched_getaffinity(0)), num_tasks))
    pool: Executor
    if num_bytes < SMALL_BYTES or num_workers == 1:
        pool = ThreadPoolExecutor(num_workers)
    else:
        pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("forkserver"))
    tasks = iter(tasks)
    waiting: deque[Future[Result]] = deque()
    try:
        while True:
            for task in islice(tasks, 2 * num_workers - len(waiting)):
                waiting.append(pool.submit(function, task))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed (out of memory?); run it on fewer CPU cores, "
            "as with `taskset -c 0-3`, or with more memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
