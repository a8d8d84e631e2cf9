"""Where the samples of a shard lie, as columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

NO_LABEL = -1


@dataclass(frozen=True)
class SampleColumns:
    """The samples of one shard, or some that follow each other there. Offsets count uncompressed bytes."""

    starts: NDArray[np.int64]  # (n + 1,): where each sample's first header begins, then where the data end
    image_begins: NDArray[np.uint32]  # (n,): where the image's data begin, counted from the sample's start
    image_bytes: NDArray[np.uint32]  # (n,)
    hashes: NDArray[np.uint64]  # (n,): XXH3 of all bytes from a sample's start to the next one's
    labels: NDArray[np.int32]  # (n,): -1 for none

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> SampleColumns:
        own = slice(start, stop)
        return SampleColumns(
            self.starts[start : stop + 1],
            self.image_begins[own],
            self.image_bytes[own],
            self.hashes[own],
            self.labels[own],
        )

    def digest(self) -> int:
        """64 bits over all columns."""
        state = xxhash.xxh3_64()
        for column in (self.starts, self.image_begins, self.image_bytes, self.hashes, self.labels):
            state.update(np.ascontiguousarray(column).data)
        return state.intdigest()
