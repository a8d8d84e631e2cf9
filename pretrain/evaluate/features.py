"""Frozen features of a stream of labelled images: prepare, encode, gather, in the order of the stream."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from pretrain.errors import DataError, UserError
from pretrain.evaluate.encoder import Encoder

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG_EVERY_SECONDS = 10.0

logger = logging.getLogger(__name__)

Image = TypeVar("Image")


@dataclass(frozen=True)
class Features:
    """One vector and one class per image, on the host."""

    features: Tensor  # (N, D) float32, finite
    labels: Tensor  # (N,) int64

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            raise ValueError(f"features {tuple(self.features.shape)}, labels {tuple(self.labels.shape)}")
        if not len(self.labels):
            raise DataError("there are no images to take features of")
        if not torch.isfinite(self.features).all():
            raise UserError(
                "the network gives features that are NaN or Inf; its weights or its input are broken"
            )


def extract(
    encoder: Encoder,
    images: Iterable[tuple[Image, int]],
    prepare: Callable[[Image], Tensor],
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    accelerator: Accelerator | None = None,
    num_threads: int | None = None,
) -> Features:
    """Encode every image once; each process takes every world-size-th image, and all get all features.

    images: the same stream (image, label) in every process. prepare: image -> uint8 (3, size, size), run in
    threads, for this process's images only. batch_size: images per process. The stream is cut into rounds of
    one batch per process; where the last round does not fill every process, black images stand in, and their
    features are dropped after the gathering.
    """
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = accelerator.device if accelerator else device
    encoder = encoder.to(device)
    features: list[Tensor] = []
    labels: list[int] = []
    noted = time.monotonic()
    with ThreadPoolExecutor(num_threads or min(16, os.cpu_count() or 1)) as pool:
        for round_labels, mine in _rounds(images, prepare, batch_size, rank, world_size, pool):
            share = -(-len(round_labels) // world_size)
            batch = torch.zeros(share, 3, encoder.crop.size_px, encoder.crop.size_px, dtype=torch.uint8)
            for row, image in enumerate(mine):
                batch[row] = image.result()
            encoded = encoder.encode(batch.to(device))
            if accelerator is not None and world_size > 1:
                gathered = accelerator.gather(encoded)  # (world * share, D), by rank
                encoded = gathered.unflatten(0, (world_size, share)).transpose(0, 1).flatten(0, 1)
            features.append(encoded[: len(round_labels)].cpu())
            labels += round_labels
            if time.monotonic() - noted > LOG_EVERY_SECONDS:
                noted = time.monotonic()
                logger.info("encoded %d images", len(labels))
    if not features:
        raise DataError("there are no images to take features of")
    return Features(torch.cat(features), torch.tensor(labels))


def _rounds(
    images: Iterable[tuple[Image, int]],
    prepare: Callable[[Image], Tensor],
    batch_size: int,
    rank: int,
    world_size: int,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[list[int], list[Future[Tensor]]]]:
    """The labels of each round and this process's images, the next round being prepared meanwhile."""
    stream = iter(images)

    def begin() -> tuple[list[int], list[Future[Tensor]]]:
        taken = list(itertools.islice(stream, batch_size * world_size))
        mine = [pool.submit(prepare, image) for image, _ in taken[rank::world_size]]
        return [label for _, label in taken], mine

    current = begin()
    while current[0]:
        following = begin()
        yield current
        current = following
