"""Batches made in the trainer's own process and thread, when they are asked for: slow, and easy to debug."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

import torch

from pretrain.data.batch import Batch, crop_sizes
from pretrain.data.crop_writer import Ring
from pretrain.data.worker import Work, begin_work
from pretrain.read_counts import ReadCounts

T = TypeVar("T")


class InlineBatches:
    """The batches of a loader process, without the process."""

    is_ready = False
    process_ids: tuple[int, ...] = ()

    def __init__(self, work: Work) -> None:
        self.wait_seconds = 0.0
        self._micro_step = work.start_micro_step
        local_batch_size = work.batch_size // work.world_size
        sizes = [view.size_px for view in work.views]
        crops = tuple(
            torch.empty((1, sizes.count(size), local_batch_size, size, size, 3), dtype=torch.uint8)
            for size in crop_sizes(work.views)
        )
        self._ring = Ring(crops, torch.empty((1, 3, local_batch_size), dtype=torch.int64))
        self._writer, self._lanes, self._opener = begin_work(work, self._ring, _Here())

    def __iter__(self) -> InlineBatches:
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        picks = [pick for lane in self._lanes for pick in lane.picks(self._micro_step)]
        for task in self._writer.begin(0, picks):
            task.result()
        self._micro_step += 1
        sample_ids, epochs, labels = self._ring.numbers[0].unbind()
        self.wait_seconds += time.monotonic() - begin
        return Batch(tuple(crops[0] for crops in self._ring.crops), sample_ids, epochs, labels)

    @property
    def counts(self) -> ReadCounts:
        return self._opener.counts(self._writer.quarantine.met_by_reason)

    def close(self) -> None:
        """Let the reads in progress come to their end, and close what they read."""
        for lane in self._lanes:
            lane.readers.shutdown(cancel_futures=True)
            lane.reader.close()


class _Here(Executor):
    """Does each task at once, in the thread that hands it in."""

    def submit(self, task: Callable[..., T], /, *arguments: Any, **settings: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(task(*arguments, **settings))
        except Exception as error:
            future.set_exception(error)
        return future
