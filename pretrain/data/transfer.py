"""Move batches to a CUDA device beside the computation: out of pinned memory, on a stream of their own."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.data.streaming import StreamingBatches
from pretrain.errors import TrainingError, UserError
from pretrain.read_counts import ReadCounts

logger = logging.getLogger("pretrain")


class DeviceBatches:
    """A stream of batches, each copied while the one before it is being computed on.

    The shared memory of the loader is registered with CUDA, so a batch is copied straight out of it. Its slot
    goes back to the loader once the copy is known to be complete.
    """

    def __init__(self, batches: StreamingBatches, device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ahead: tuple[Batch, torch.cuda.Event] | None = None
        self._copied: torch.cuda.Event | None = None  # the newest copy out of the ring
        self._pinned = [tensor for tensor in batches.shared_tensors if _pin(tensor, device)]

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> Batch:
        batch, event = self._ahead or self._begin()
        self._ahead = None
        if self.batches.is_ready:  # else waiting here would hold up the step that can begin
            with contextlib.suppress(UserError, TrainingError):  # told when that batch is asked for
                self._ahead = self._begin()
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(event)
        for tensor in _tensors(batch):
            tensor.record_stream(computing)
        return batch

    @property
    def counts(self) -> ReadCounts:
        return self.batches.counts

    @property
    def process_ids(self) -> tuple[int, ...]:
        return self.batches.process_ids

    @property
    def wait_seconds(self) -> float:
        return self.batches.wait_seconds

    def close(self) -> None:
        try:
            self._stream.synchronize()
            for tensor in self._pinned:
                _runtime().cudaHostUnregister(tensor.data_ptr())
        finally:
            self._pinned = []
            self.batches.close()

    def _begin(self) -> tuple[Batch, torch.cuda.Event]:
        """Start copying the next batch."""
        if self._copied is not None:
            self._copied.synchronize()  # asking for the next batch gives the slot of the last one away
        host = next(self.batches)
        with torch.cuda.stream(self._stream):
            crops = tuple(crop.to(self.device, non_blocking=True) for crop in host.crops)
            sample_ids, epochs, labels = (
                numbers.to(self.device, non_blocking=True)
                for numbers in (host.sample_ids, host.epochs, host.labels)
            )
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._copied = event
        return Batch(crops, sample_ids, epochs, labels), event


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return (*batch.crops, batch.sample_ids, batch.epochs, batch.labels)


def _pin(tensor: Tensor, device: torch.device) -> bool:
    """Register memory with CUDA; without it copies are only slower."""
    status = int(_runtime().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0))
    if status == 0:
        return True
    logger.warning("CUDA error %d: batches are copied out of memory that is not pinned", status)
    with contextlib.suppress(RuntimeError):  # CUDA reports the refusal once more, at whatever comes next
        torch.zeros(1, device=device).add_(1)
    return False


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
