"""What a rank has read so far, in numbers: for its metrics, and for what all ranks agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReadCounts:
    """Since the data were opened. Plain numbers: a loader process sends them along with every batch."""

    bad_by_reason: Mapping[str, int] = field(default_factory=dict)  # distinct samples; decode.py's reasons
    num_retries: int = 0  # reads from storage that were tried again
    num_shards_opened: int = 0
    num_cache_hits: int = 0  # shards that were on this node already
    num_cache_misses: int = 0  # shards that had to be fetched

    @property
    def num_bad(self) -> int:
        return sum(self.bad_by_reason.values())
