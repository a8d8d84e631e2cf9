"""From settings to what is read: the splits they name, the mixture of them, and how a shard is opened."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pretrain.data.batch import DataConfig
from pretrain.data.cache import CacheConfig, ShardCache
from pretrain.data.manifest import Manifest, Shard, Split
from pretrain.data.mixture import Mixture, mix
from pretrain.data.reader import OpenShard
from pretrain.data.storage import OnRetry, RangeFile, StorageConfig, open_file, parse_location
from pretrain.errors import ConfigError


def open_splits(config: DataConfig) -> tuple[Split, ...]:
    """The split of each source. Opens the indexes, looks at no shard."""
    manifests: dict[str, Manifest] = {}
    splits: list[Split] = []
    for place, source in enumerate(config.all_sources):
        where = f"data.sources[{place}].shards" if config.sources else "data.shards"
        location = parse_location(source.shards, where)
        if location.url not in manifests:
            manifests[location.url] = Manifest.load(location)
        split = manifests[location.url].split(source.split)
        if any((other.manifest.hash, other.name) == (split.manifest.hash, split.name) for other in splits):
            raise ConfigError(
                f"{where}: split '{split.name}' of {location} is already a source, here or as a copy; "
                "give that one a larger weight"
            )
        splits.append(split)
    return tuple(splits)


def mixture_of(config: DataConfig, splits: Sequence[Split], seed: int, batch_size: int) -> Mixture:
    """The order in which the splits are read; `batch_size` counts one micro step over all ranks."""
    return mix(
        splits,
        [source.weight for source in config.all_sources],
        seed=seed,
        lanes=config.lanes,
        shuffle_block=config.shuffle_block,
        batch_size=batch_size,
    )


class Retries:
    """Counts reads that had to be tried again."""

    def __init__(self) -> None:
        self.num = 0
        self._lock = threading.Lock()

    def __call__(self, reason: str) -> None:
        with self._lock:
            self.num += 1


def shard_opener(config: DataConfig, on_retry: OnRetry | None = None) -> OpenShard:
    """Opens shards where they lie, or through the node's cache if there is one."""
    storage = StorageConfig(timeout_seconds=config.timeout_seconds)
    if config.cache is None:
        return lambda shard: open_file(shard.location, storage, on_retry)
    cache = ShardCache(CacheConfig(config.cache.folder, int(config.cache.max_gib * 2**30)), storage, on_retry)

    def opened(shard: Shard) -> RangeFile:
        return cache.open(shard.location, shard.num_bytes, shard.sha256)

    return opened
