"""From settings to what is read: the splits they name, the mixture of them, and how a shard is opened."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from pretrain.data.batch import DataConfig
from pretrain.data.cache import CacheConfig, ShardCache
from pretrain.data.manifest import Manifest, Shard, Split
from pretrain.data.mixture import Mixture, mix
from pretrain.data.storage import RangeFile, StorageConfig, open_file, parse_location
from pretrain.errors import ConfigError
from pretrain.read_counts import ReadCounts


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


class ShardOpener:
    """Opens shards where they lie, or through the node's cache if there is one, and counts. Thread-safe."""

    def __init__(self, config: DataConfig) -> None:
        self._storage = storage_of(config)
        self._num_retries = self._num_opened = 0
        self._counting = threading.Lock()
        self._cache: ShardCache | None = None
        if config.cache is not None:
            limits = CacheConfig(config.cache.folder, int(config.cache.max_gib * 2**30))
            self._cache = ShardCache(limits, self._storage, self._retried)

    def __call__(self, shard: Shard) -> RangeFile:
        with self._counting:
            self._num_opened += 1
        if self._cache is None:
            return open_file(shard.location, self._storage, self._retried)
        return self._cache.open(shard.location, shard.num_bytes, shard.sha256)

    def _retried(self, reason: str) -> None:
        with self._counting:
            self._num_retries += 1

    def counts(self, bad_by_reason: Mapping[str, int]) -> ReadCounts:
        """What was opened so far, beside the samples that were no good."""
        hits, misses = (self._cache.num_hits, self._cache.num_misses) if self._cache else (0, 0)
        return ReadCounts(dict(bad_by_reason), self._num_retries, self._num_opened, hits, misses)

    def distrust(self, shard: Shard) -> bool:
        """Drop a copy of this shard if it is damaged; False where shards are read where they lie."""
        if self._cache is None:
            return False
        self._cache.drop(shard.sha256)
        return True


def storage_of(config: DataConfig) -> StorageConfig:
    return StorageConfig(timeout_seconds=config.timeout_seconds)
