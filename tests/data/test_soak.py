"""A loader that runs for long needs no more memory, descriptors or shared memory than at its start."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from small_shards import make_shards, real_data

from pretrain.data.indexing import index_folder
from pretrain.data.loader import DataConfig, mixture_of, open_batches, open_splits, pool_bytes, ring_bytes
from pretrain.data.streaming import StreamingBatches
from pretrain.views.plan import ViewConfig


class Usage:
    """What a loader process holds."""

    def __init__(self, process: psutil.Process) -> None:
        memory = process.memory_full_info()
        self.private_mib = memory.uss / 2**20
        self.num_descriptors = process.num_fds()
        self.num_threads = process.num_threads()
        self.num_shared = sum("torch_" in m.path or "/dev/shm" in m.path for m in process.memory_maps())


def soak(config: DataConfig, view_px: int, batch_size: int, num_epochs: int) -> tuple[list[Usage], float]:
    """The loader's use after the second epoch and each that follows, and MiB of its configured buffers."""
    views = [ViewConfig(size_px=view_px)] * 2
    splits = open_splits(config)
    mixture = mixture_of(config, splits, 0, batch_size)
    buffers = pool_bytes(config, mixture, config.lanes) + ring_bytes(config, views, batch_size)
    batches = open_batches(config, splits, views, seed=0, batch_size=batch_size)
    assert isinstance(batches, StreamingBatches)
    usages = []
    try:
        process = psutil.Process(batches._process.pid)
        for epoch in range(num_epochs):
            for _ in range(mixture.num_samples // batch_size):
                next(batches)
            if epoch >= 1:
                usages.append(Usage(process))
    finally:
        batches.close()
    return usages, buffers / 2**20


def assert_flat(usages: list[Usage], slack_mib: float) -> None:
    first, rest = usages[0], usages[1:]
    assert max(usage.private_mib for usage in rest) < first.private_mib + slack_mib
    assert {usage.num_shared for usage in rest} == {first.num_shared}
    assert max(usage.num_descriptors for usage in rest) <= first.num_descriptors + 8  # files being read
    assert max(usage.num_threads for usage in rest) <= first.num_threads + 8  # of reads, kept for the next


@pytest.mark.parametrize("suffix", [".tar", pytest.param(".tar.gz", marks=pytest.mark.slow)])
def test_sixty_short_epochs_cost_no_more_than_two(tmp_path: Path, suffix: str) -> None:
    make_shards(tmp_path, [40, 24], suffix)
    config = DataConfig(shards=str(tmp_path), lanes=4, shuffle_block=4)
    usages, _ = soak(config, view_px=32, batch_size=16, num_epochs=60)
    assert_flat(usages[18:], slack_mib=8)


@pytest.mark.slow
def test_twelve_epochs_of_real_images_cost_no_more_than_two(tmp_path: Path) -> None:
    index_folder(real_data("imagenet-sample"), out=tmp_path)
    config = DataConfig(shards=str(tmp_path), lanes=16, shuffle_block=16)
    usages, buffers_mib = soak(config, view_px=224, batch_size=48, num_epochs=12)
    told = ", ".join(f"{usage.private_mib:.0f}" for usage in usages)
    print(f"loader's private MiB after each epoch: {told}; configured buffers {buffers_mib:.0f} MiB")  # noqa: T201
    assert_flat(usages, slack_mib=64)
