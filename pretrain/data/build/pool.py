"""The worker processes of a build. Which of them writes a shard makes no difference to its bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

from pretrain.data.build.layout import ShardPlan
from pretrain.data.build.listing import Listing
from pretrain.data.build.shard_writer import FinishedShard, WriteSettings, finish_shard
from pretrain.errors import DataError

POLL_SECONDS = 0.5
_state: dict[str, Any] = {}  # of a worker process: what `_begin` was given


def finish_shards(
    listing: Path,
    settings: WriteSettings,
    plans: Sequence[ShardPlan],
    num_workers: int,
    progress: Callable[[int], None],
) -> Iterator[FinishedShard]:
    """Finish all shards; `progress` is told how many images are done in all."""
    num_workers = min(num_workers, len(plans))
    if num_workers == 1:
        yield from _finish_here(listing, settings, plans, progress)
        return
    # a fork server starts from a clean process: no threads, locks or open files of ours are copied
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    num_done = context.Value("q", 0)
    pool = ProcessPoolExecutor(num_workers, context, _begin, (listing, settings, num_done))
    try:
        waiting = {pool.submit(_finish_in_worker, plan) for plan in plans}
        while waiting:
            done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            progress(num_done.value)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed (out of memory?); run the command again with fewer --workers: "
            "it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish_here(
    listing: Path, settings: WriteSettings, plans: Sequence[ShardPlan], progress: Callable[[int], None]
) -> Iterator[FinishedShard]:
    opened = Listing.load(listing)
    num_done = 0

    def count(num_images: int) -> None:
        nonlocal num_done
        num_done += num_images
        progress(num_done)

    try:
        for plan in plans:
            yield finish_shard(opened, settings, plan, count)
    finally:
        opened.close()


def _begin(listing: Path, settings: WriteSettings, num_done: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the shards under way are finished, then all end
    _state.update(listing=Listing.load(listing), settings=settings, num_done=num_done)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _finish_in_worker(plan: ShardPlan) -> FinishedShard:
    def count(num_images: int) -> None:
        with _state["num_done"].get_lock():
            _state["num_done"].value += num_images

    return finish_shard(_state["listing"], _state["settings"], plan, count)
