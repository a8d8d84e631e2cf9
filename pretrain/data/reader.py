"""Encoded samples out of shards: a run of samples is one read of one byte range, cut up by the index.

Nothing is decoded, unpickled, unpacked to disk or run through a shell here. A shard that does not have the
bytes its index says is an error at once. What is damaged inside a sample shows in the hash over the sample,
which is compared where the image is decoded, by many threads: `EncodedSample.is_intact`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import xxhash

from pretrain.data.columns import NO_LABEL
from pretrain.data.manifest import Shard, Split
from pretrain.data.order import Run
from pretrain.data.scan import group
from pretrain.data.storage import RangeFile, StorageError, open_file
from pretrain.data.tar import END_MARKER_BYTES, READ_BYTES, walk
from pretrain.errors import DataError

SAMPLES_PER_READ = 256  # of a sequential pass
NUM_GZIP_TRIES = 2  # a compressed stream that broke is opened once more


class OpenShard(Protocol):
    """How shards are opened."""

    def __call__(self, shard: Shard) -> RangeFile: ...

    def distrust(self, shard: Shard) -> bool:
        """Drop a copy of this shard if it is damaged; False where shards are read where they lie."""


class _WhereItLies:
    def __call__(self, shard: Shard) -> RangeFile:
        return open_file(shard.location)

    def distrust(self, shard: Shard) -> bool:
        return False


@dataclass(frozen=True)
class EncodedSample:
    """One sample as it is stored."""

    data: bytes = field(repr=False)  # of all samples that were read together
    begin: int  # in `data`: of all its members, tar headers included
    end: int
    image_begin: int  # in `data`
    image_end: int
    hash: int  # XXH3 that its members should have
    label: int | None
    sample_id: int
    shard: str
    offset: int  # of the sample's first header, in the uncompressed tar

    @property
    def image(self) -> bytes:
        """A copy, so ask once."""
        return self.data[self.image_begin : self.image_end]

    @property
    def is_intact(self) -> bool:
        """Whether these are the bytes that were indexed."""
        return xxhash.xxh3_64_intdigest(memoryview(self.data)[self.begin : self.end]) == self.hash

    @property
    def key(self) -> str:
        """The name of the sample, for people; '?' where damage makes it unreadable."""
        with contextlib.suppress(StopIteration):
            return next(group(walk(io.BytesIO(self.data[self.begin : self.end])), problems=[])).key
        return "?"


class ShardReader:
    """Reads runs of samples, each by one read of the storage.

    A plain tar is open only while it is read. A compressed one stays open, for it can only be read on.
    """

    def __init__(
        self,
        split: Split,
        open_shard: OpenShard | None = None,
        first_sample_id: int = 0,  # added to the manifest's own sample ids
    ) -> None:
        self.split = split
        self.first_sample_id = first_sample_id
        self.open_shard = open_shard or _WhereItLies()
        self._stream: tuple[int, _GzipStream] | None = None

    def read(self, runs: Sequence[Run]) -> list[EncodedSample]:
        """All samples of some runs, in order; an error if one is missing."""
        return [sample for run in runs for sample in self._read_run(run)]

    def another(self) -> ShardReader:
        """A reader of the same, for another thread."""
        return ShardReader(self.split, self.open_shard, self.first_sample_id)

    def reread(self, sample: EncodedSample) -> EncodedSample:
        """A sample whose bytes are wrong, once more from the source if it came from a copy."""
        manifest = self.split.manifest
        own_id = sample.sample_id - self.first_sample_id
        index = int(np.searchsorted(manifest.ends, own_id, side="right"))
        shard = manifest.shard(index)
        if not self.open_shard.distrust(shard):
            return sample
        place = int(np.searchsorted(self.split.indices, index))
        start = own_id - shard.first_sample_id
        (again,) = self.another().read([Run(place, start, start + 1, epoch=0)])
        return again

    def close(self) -> None:
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None

    def _read_run(self, run: Run) -> list[EncodedSample]:
        shard = self.split.shard(run.shard)
        samples = self.split.samples(shard).part(run.start, run.stop)
        begin, end = int(samples.starts[0]), int(samples.starts[-1])
        is_last = run.stop == shard.num_samples
        data = self._read_bytes(shard, begin, end + END_MARKER_BYTES * is_last)
        if len(data) < end - begin:
            raise _mismatch(shard, f"it ends at byte {begin + len(data)}, before byte {end}")
        if is_last and data[end - begin :] != bytes(END_MARKER_BYTES):
            raise _mismatch(shard, f"no end-of-archive marker at byte {end}")
        starts = (samples.starts - begin).tolist()
        columns = zip(
            samples.image_begins.tolist(),
            samples.image_bytes.tolist(),
            samples.hashes.tolist(),
            samples.labels.tolist(),
            strict=True,
        )
        first_sample_id = self.first_sample_id + shard.first_sample_id + run.start
        return [
            EncodedSample(
                data=data,
                begin=starts[place],
                end=starts[place + 1],
                image_begin=starts[place] + image_begin,
                image_end=starts[place] + image_begin + image_bytes,
                hash=hash_,
                label=None if label == NO_LABEL else label,
                sample_id=first_sample_id + place,
                shard=shard.name,
                offset=begin + starts[place],
            )
            for place, (image_begin, image_bytes, hash_, label) in enumerate(columns)
        ]

    def _read_bytes(self, shard: Shard, begin: int, end: int) -> bytes:
        try:
            if shard.name.endswith("gz"):
                return self._read_compressed(shard, begin, end)
            with contextlib.closing(self._open(shard)) as file:
                return file.read(begin, end)
        except StorageError as error:
            more = " (`ulimit -n`), or use fewer data.lanes" if "too many open files" in str(error) else ""
            raise DataError(f"{error}{more}") from error

    def _open(self, shard: Shard) -> RangeFile:
        file = self.open_shard(shard)
        if file.num_bytes != shard.num_bytes:
            file.close()
            raise _mismatch(shard, f"{file.num_bytes} bytes instead of {shard.num_bytes}")
        return file

    def _read_compressed(self, shard: Shard, begin: int, end: int) -> bytes:
        for tries_left in reversed(range(NUM_GZIP_TRIES)):
            try:
                if self._stream is None or self._stream[0] != shard.index or self._stream[1].offset > begin:
                    self.close()
                    self._stream = shard.index, _GzipStream(self._open(shard))
                return self._stream[1].read(begin, end)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self.close()
                if not tries_left:
                    raise _mismatch(shard, f"the compressed data: {error}") from error
        raise AssertionError("the last try returns or raises")


def read_split(
    split: Split, open_shard: OpenShard | None = None, first_sample_id: int = 0
) -> Iterator[EncodedSample]:
    """All samples of a split once, in the order they are stored."""
    with contextlib.closing(ShardReader(split, open_shard, first_sample_id)) as reader:
        for place, num_samples in enumerate(split.shard_sizes.tolist()):
            for start in range(0, num_samples, SAMPLES_PER_READ):
                stop = min(start + SAMPLES_PER_READ, num_samples)
                yield from reader.read([Run(place, start, stop, epoch=0)])


class _GzipStream:
    """The uncompressed bytes of a shard, readable forwards."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._content = gzip.GzipFile(fileobj=io.BufferedReader(_Sequential(file), READ_BYTES), mode="rb")
        self.offset = 0

    def read(self, begin: int, end: int) -> bytes:
        """From `begin`, which must not lie before what was read last, to `end` or the end of the data."""
        while self.offset < begin:
            skipped = len(self._content.read(min(begin - self.offset, READ_BYTES)))
            if not skipped:
                return b""
            self.offset += skipped
        data = self._content.read(end - begin)
        self.offset += len(data)
        return data

    def close(self) -> None:
        self._content.close()
        self._file.close()


class _Sequential(io.RawIOBase):
    """A file of ranges as a stream."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._place = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._place + len(buffer), self._file.num_bytes)
        data = self._file.read(self._place, end)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _mismatch(shard: Shard, problem: str) -> DataError:
    return DataError(
        f"{shard.location}: does not hold what its index says ({problem}); restore the shard, or run "
        "`pretrain shards index` on its folder if it was changed on purpose"
    )
