"""Batches from a loader process of this rank's own, through a ring of shared memory."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from pretrain.data.batch import Batch, crop_sizes, ring_bytes
from pretrain.data.crop_writer import Ring
from pretrain.data.worker import IGNORED_SIGNALS, Failure, Ready, Work, run
from pretrain.errors import DataError, TrainingError
from pretrain.read_counts import ReadCounts

SHARED_MEMORY = Path("/dev/shm")
CLOSE_SECONDS = 5.0
# of the loader process; tests that start many fork a prepared one instead
START_METHOD = "spawn"


class StreamingBatches:
    """The trainer's end: takes finished batches by slot number and gives the slots back."""

    def __init__(self, work: Work) -> None:
        self.counts = ReadCounts()
        self.wait_seconds = 0.0
        self._rank = work.rank
        self._micro_step = work.start_micro_step
        self._failure: Exception | None = None
        self._held: int | None = None  # the slot the trainer is using
        self._ring = _make_ring(work)
        context: Any = torch.multiprocessing.get_context(START_METHOD)
        ours, theirs = context.Pipe()
        self._loader: Connection = ours
        self._process = context.Process(
            target=run, args=(self._ring, theirs), name=f"loader-{work.rank}", daemon=True
        )
        # blocked here, so inherited as blocked: a signal to the whole job cannot hit a loader that starts
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self._send_work(work)
        atexit.register(self.close)  # before multiprocessing waits for a process that heeds no signal

    def _send_work(self, work: Work) -> None:
        """Through the pipe, and not as an argument: what is wrong with it is then told like any failure."""
        with contextlib.suppress(OSError):  # it has ended; the first batch that is asked for says how
            self._loader.send(work)

    def __iter__(self) -> StreamingBatches:
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        if self._failure is not None:
            raise self._failure
        slot = self._next_slot()
        self.wait_seconds += time.monotonic() - begin
        self._held = slot
        self._micro_step += 1
        sample_ids, epochs, labels = self._ring.numbers[slot].unbind()
        return Batch(tuple(crops[slot] for crops in self._ring.crops), sample_ids, epochs, labels)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the loader, whose memory belongs to this rank."""
        return () if self._process.pid is None else (self._process.pid,)

    @property
    def is_ready(self) -> bool:
        """Whether the next batch can be had without waiting."""
        return self._failure is None and bool(self._loader.poll())

    @property
    def shared_tensors(self) -> tuple[Tensor, ...]:
        """The memory that the batches lie in."""
        return (*self._ring.crops, self._ring.numbers)

    def close(self) -> None:
        """End the loader process; safe to call twice."""
        atexit.unregister(self.close)
        self._failure = self._failure or TrainingError("the loader was closed")
        self._loader.close()  # ends a loader that waits for a slot or hands one over
        self._process.kill()
        self._process.join(CLOSE_SECONDS)

    def _next_slot(self) -> int:
        try:
            if self._held is not None:
                self._loader.send(self._held)
                self._held = None
            wait([self._loader, self._process.sentinel])
            message = self._loader.recv() if self._loader.poll() else None
        except (EOFError, OSError):
            message = None
        if isinstance(message, Ready):
            self.counts = message.counts
            return message.slot
        self._failure = self._explain(message)
        raise self._failure

    def _explain(self, failure: Failure | None) -> Exception:
        if failure is not None and failure.error is not None:
            return failure.error
        where = f"the loader process of rank {self._rank} at micro step {self._micro_step}"
        if failure is not None:
            return TrainingError(f"{where} failed:\n{failure.trace}")
        self._process.join(CLOSE_SECONDS)
        code = self._process.exitcode
        how = (
            f"was killed by signal {-code}"
            if code is not None and code < 0
            else f"ended with exit code {code}"
        )
        hint = "; if the machine ran out of memory, lower data.shuffle_block or data.lanes"
        return TrainingError(f"{where} {how}{hint if code == -signal.SIGKILL else ''}")


def check_shared_memory(needed_bytes: int) -> None:
    """Raises DataError where the batches of a node would not fit: writing to them would crash."""
    if not SHARED_MEMORY.is_dir():
        return
    status = os.statvfs(SHARED_MEMORY)
    if (free := status.f_bavail * status.f_frsize) < needed_bytes:
        raise DataError(
            f"{SHARED_MEMORY}: the batches need {needed_bytes / 2**20:.0f} MiB of shared memory, "
            f"{free / 2**20:.0f} MiB are free; lower data.prefetch_batches or mount it larger (for docker: "
            "--shm-size)"
        )


def _make_ring(work: Work) -> Ring:
    num_slots = work.config.prefetch_batches + 1
    local_batch_size = work.batch_size // work.world_size
    needed = ring_bytes(work.config, work.views, local_batch_size)
    check_shared_memory(needed)
    sizes = [view.size_px for view in work.views]
    crops = tuple(
        _shared((num_slots, sizes.count(size), local_batch_size, size, size, 3), torch.uint8)
        for size in crop_sizes(work.views)
    )
    return Ring(crops, _shared((num_slots, 3, local_batch_size), torch.int64))


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    try:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        num_mib = tensor.numel() * tensor.element_size() / 2**20
        raise DataError(
            f"{SHARED_MEMORY}: {num_mib:.0f} MiB of shared memory cannot be had ({error}); "
            "lower data.prefetch_batches or mount it larger"
        ) from error
    return tensor
