"""Open the batches of a split: streamed by a loader process, or resident on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.data.batch import Batch, Batches, DataConfig, order_of, pool_bytes, ring_bytes
from pretrain.data.manifest import Manifest
from pretrain.data.resident import ResidentBatches
from pretrain.data.streaming import StreamingBatches
from pretrain.data.worker import Work
from pretrain.views.plan import ViewConfig

__all__ = ["Batch", "Batches", "DataConfig", "open_batches", "order_of", "pool_bytes", "ring_bytes"]


def open_batches(
    config: DataConfig,
    manifest: Manifest,
    views: Sequence[ViewConfig],
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_micro_step: int = 0,
    device: torch.device | str = "cpu",
    quarantine_path: Path | None = None,
) -> Batches:
    """Batches from `start_micro_step` on; nothing else is needed to continue a run.

    batch_size: samples of one micro step over all ranks. Resident batches lie on `device`, streamed ones in
    shared memory on the CPU.
    """
    split = manifest.split(config.split)
    order = order_of(config, split, seed, batch_size)
    order.lanes_of(rank, world_size)  # an impossible sharing is told here, not by the loader process
    if config.resident:
        return ResidentBatches(
            config,
            manifest,
            order,
            views,
            rank=rank,
            world_size=world_size,
            start_micro_step=start_micro_step,
            device=device,
            quarantine_path=quarantine_path,
        )
    work = Work(
        split=split,
        order=order,
        views=tuple(views),
        rank=rank,
        world_size=world_size,
        start_micro_step=start_micro_step,
        decode_threads=config.decode_threads,
        quarantine_path=quarantine_path,
        max_bad_ratio=config.max_bad_ratio,
    )
    return StreamingBatches(config, work)
