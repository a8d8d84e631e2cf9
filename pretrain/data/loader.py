"""Open the batches of some splits: streamed by a loader process, or resident on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.data.batch import Batch, Batches, DataConfig, pool_bytes, ring_bytes
from pretrain.data.inline import InlineBatches
from pretrain.data.manifest import Split
from pretrain.data.resident import ResidentBatches
from pretrain.data.sources import mixture_of, open_splits
from pretrain.data.streaming import StreamingBatches
from pretrain.data.transfer import DeviceBatches
from pretrain.data.worker import Work
from pretrain.views.plan import ViewConfig

__all__ = [
    "Batch",
    "Batches",
    "DataConfig",
    "mixture_of",
    "open_batches",
    "open_splits",
    "pool_bytes",
    "ring_bytes",
]


def open_batches(
    config: DataConfig,
    splits: Sequence[Split],
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

    splits: of the sources of `config`, as `open_splits` gives them. batch_size: samples of one micro step
    over all ranks. Batches lie on `device`; streamed ones on the CPU in memory shared with the loader
    process.
    """
    mixture = mixture_of(config, splits, seed, batch_size)
    mixture.lanes_of(rank, world_size)  # an impossible sharing is told here, not by the loader process
    if config.resident:
        return ResidentBatches(
            config,
            mixture,
            views,
            rank=rank,
            world_size=world_size,
            start_micro_step=start_micro_step,
            device=device,
            quarantine_path=quarantine_path,
        )
    work = Work(
        config=config,
        splits=tuple(splits),
        views=tuple(views),
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        start_micro_step=start_micro_step,
        quarantine_path=quarantine_path,
    )
    if config.decode_threads == 0:
        return InlineBatches(work)
    batches = StreamingBatches(work)
    device = torch.device(device)
    return DeviceBatches(batches, device) if device.type == "cuda" else batches
