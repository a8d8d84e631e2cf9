"""From settings to what is read: the splits they name, the mixture of them, and how a shard is opened."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pretrain.data.batch import DataConfig
from pretrain.data.cache import CacheConfig, ShardCache
from pretrain.data.manifest import Manifest, Shard, Split
from pretrain.data.mixture import Mixture, mix
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
            manifests[location.url] = Manifest.load(location, storage_of(config))
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


class ShardOpener:
    """Opens shards where they lie, or through the node's cache if there is one."""

    def __init__(self, config: DataConfig, on_retry: OnRetry | None = None) -> None:
        self._storage = storage_of(config)
        self._on_retry = on_retry
        self._cache: ShardCache | None = None
        if config.cache is not None:
            limits = CacheConfig(config.cache.folder, int(config.cache.max_gib * 2**30))
            self._cache = ShardCache(limits, self._storage, on_retry)

    def __call__(self, shard: Shard) -> RangeFile:
        if self._cache is None:
            return open_file(shard.location, self._storage, self._on_retry)
        return self._cache.open(shard.location, shard.num_bytes, shard.sha256)

    def distrust(self, shard: Shard) -> bool:
        """Drop a copy of this shard if it is damaged; False where shards are read where they lie."""
        if self._cache is None:
            return False
        self._cache.drop(shard.sha256)
        return True


def storage_of(config: DataConfig) -> StorageConfig:
    return StorageConfig(timeout_seconds=config.timeout_seconds)
