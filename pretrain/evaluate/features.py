"""Frozen features of labelled images: prepare, encode, gather, in the order in which they are stored."""

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

LOG_EVERY_SECONDS = 30.0
CHECK_AT_ONCE = 4096  # rows that are looked at for NaN and Inf

logger = logging.getLogger(__name__)

Image = TypeVar("Image")


@dataclass(frozen=True)
class Features:
    """One vector and one class per image, on the host."""

    features: Tensor  # (N, D) float32 or float16, finite
    labels: Tensor  # (N,) int64

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            raise ValueError(f"features {tuple(self.features.shape)}, labels {tuple(self.labels.shape)}")
        if not len(self.labels):
            raise DataError("there are no images to take features of")
        # in parts: the comparison of a whole bank would take its memory several times over
        if not all(torch.isfinite(part).all() for part in torch.split(self.features, CHECK_AT_ONCE)):
            raise UserError(
                "the network gives features that are NaN or Inf; its weights or its input are broken"
            )


def extract(
    encoder: Encoder,
    images: Iterable[tuple[Image, int]],
    prepare: Callable[[Image], Tensor],
    batch_size: int = 256,
    *,
    num_images: int,
    keep: Callable[[Tensor], Tensor] | None = None,
    device: str | torch.device = "cpu",
    accelerator: Accelerator | None = None,
    num_threads: int | None = None,
) -> Features:
    """Encode every image once; each process takes every world-size-th image, and all get all features.

    images: the same stream (image, label) in every process, `num_images` long. prepare: image -> uint8
    (3, size, size), run in threads, for this process's images only. batch_size: images per process. The
    stream is cut into rounds of one batch per process; where the last round does not fill every process,
    black images stand in, and their features are dropped after the gathering. keep: what is stored of
    float32 (B, D), such as a rounded copy; it goes straight into one table: there are never two of them.
    """
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = accelerator.device if accelerator else device
    encoder = encoder.to(device)
    table: Tensor | None = None
    labels: list[int] = []
    noted = time.monotonic()
    with ThreadPoolExecutor(num_threads or min(16, os.cpu_count() or 1)) as pool:
        for round_labels, mine in _rounds(images, prepare, batch_size, rank, world_size, pool):
            share = -(-len(round_labels) // world_size)
            batch = torch.zeros(share, 3, encoder.crop.size_px, encoder.crop.size_px, dtype=torch.uint8)
            for row, image in enumerate(mine):
                batch[row] = image.result()
            encoded = encoder.encode(batch.to(device))
            encoded = keep(encoded) if keep else encoded
            if accelerator is not None and world_size > 1:
                gathered = accelerator.gather(encoded)  # (world * share, D), by rank
                encoded = gathered.unflatten(0, (world_size, share)).transpose(0, 1).flatten(0, 1)
            if table is None:
                table = torch.empty(num_images, encoded.shape[1], dtype=encoded.dtype)
            table[len(labels) : len(labels) + len(round_labels)] = encoded[: len(round_labels)]
            labels += round_labels
            if time.monotonic() - noted > LOG_EVERY_SECONDS:
                noted = time.monotonic()
                logger.info("encoded %d of %d images", len(labels), num_images)
    if table is None:
        raise DataError("there are no images to take features of")
    assert len(labels) == num_images, (len(labels), num_images)
    return Features(table, torch.tensor(labels))


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
