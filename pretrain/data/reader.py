"""Encoded samples out of shards, each byte range checked against the manifest while it is read.

Nothing is decoded, unpickled, unpacked to disk or run through a shell here: a run of samples is one read of
one byte range, taken apart by webdataset's tar reader. A shard that does not hold what its index says is an
error, where a plain tar reader would drop the rest without a word.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.data.manifest import Manifest, Shard
from pretrain.data.order import Run
from pretrain.data.scan import END_MARKER_BYTES, IMAGE_EXTENSIONS
from pretrain.errors import DataError

RETRY_SECONDS = (0.1, 1.0, 5.0)  # waits before a failed read is tried again
SAMPLES_PER_READ = 256  # of a sequential pass
_SENTINEL = "end-of-run"
_SENTINEL_HEADER = tarfile.TarInfo(f"{_SENTINEL}.{_SENTINEL}").tobuf()


@dataclass(frozen=True)
class EncodedSample:
    """One sample as it is stored."""

    key: str
    image: bytes
    extension: str
    label: int | None
    sample_id: int
    shard: str
    offset: int  # of the sample's first header, in the uncompressed tar


class ShardReader:
    """Reads runs of samples; keeps the last shard open, so reading on costs no new open or decompression."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self._open: tuple[int, BinaryIO] | None = None

    def read(self, runs: Sequence[Run]) -> list[EncodedSample]:
        """All samples of some runs, in order; an error if one is missing."""
        return [sample for run in runs for sample in self._read_run(run)]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _read_run(self, run: Run) -> list[EncodedSample]:
        shard = self.shards[run.shard]
        begin, end = int(shard.offsets[run.start]), int(shard.offsets[run.stop])
        data = self._read_bytes(run.shard, begin, end)
        if len(data) < end - begin:
            raise _mismatch(shard, f"it ends at byte {begin + len(data)}, before byte {end}")
        if run.stop == shard.num_samples:
            marker = self._read_bytes(run.shard, end, end + END_MARKER_BYTES)
            if marker != bytes(END_MARKER_BYTES):
                raise _mismatch(shard, f"no end-of-archive marker at byte {end}")
        samples = _parse(shard, data)
        if len(samples) != run.stop - run.start:
            raise _mismatch(
                shard, f"{len(samples)} samples where {run.stop - run.start} begin at byte {begin}"
            )
        return [
            _sample(shard, run.start + place, fields, int(shard.offsets[run.start + place]))
            for place, fields in enumerate(samples)
        ]

    def _read_bytes(self, index: int, begin: int, end: int) -> bytes:
        shard = self.shards[index]
        for wait_seconds in (*RETRY_SECONDS, None):
            try:
                if self._open is None or self._open[0] != index:
                    self.close()
                    self._open = index, open_shard(shard)
                stream = self._open[1]
                stream.seek(begin)
                return stream.read(end - begin)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise _mismatch(shard, str(error)) from error
            except OSError as error:
                self.close()
                if wait_seconds is None:
                    reason = error.strerror or str(error)
                    raise DataError(f"{shard.path}: cannot be read ({reason}); check the storage") from error
                time.sleep(wait_seconds)
        raise AssertionError("the last try returns or raises")


def open_shard(shard: Shard) -> BinaryIO:
    """The uncompressed bytes of a shard, seekable; the one place that knows how storage is opened."""
    file = shard.path.open("rb", buffering=0)
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes != shard.num_bytes:
        file.close()
        raise _mismatch(shard, f"{num_bytes} bytes instead of {shard.num_bytes}")
    if shard.name.endswith("gz"):
        return cast(BinaryIO, _OwningGzip(file))
    return io.BufferedReader(file)


def read_split(manifest: Manifest, split: str) -> Iterator[EncodedSample]:
    """All samples of a split once, in the order they are stored."""
    shards = manifest.split(split).shards
    reader = ShardReader(shards)
    try:
        for index, shard in enumerate(shards):
            for start in range(0, shard.num_samples, SAMPLES_PER_READ):
                stop = min(start + SAMPLES_PER_READ, shard.num_samples)
                yield from reader.read([Run(index, start, stop, epoch=0)])
    finally:
        reader.close()


class _OwningGzip(gzip.GzipFile):
    """Decompresses a file, and closes it too. Seeking forward skips; seeking back starts from the front."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._file = file

    def close(self) -> None:
        super().close()
        self._file.close()


def _parse(shard: Shard, data: bytes) -> list[dict[str, Any]]:
    """The samples in a stretch of a tar, as webdataset's dictionaries of bytes.

    A last member of our own is appended: if the tar reader does not reach it, it gave up before.
    """
    stream = io.BytesIO(data + _SENTINEL_HEADER)
    try:
        members = tar_file_expander([{"url": shard.name, "stream": stream}], eof_value=None)
        samples = list(group_by_keys(members))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise _mismatch(shard, str(error.args[0])) from error
    if not samples or samples.pop()["__key__"] != _SENTINEL:
        raise _mismatch(shard, f"a damaged header after {len(samples)} samples")
    return samples


def _sample(shard: Shard, place: int, fields: dict[str, Any], offset: int) -> EncodedSample:
    extension = next((name for name in IMAGE_EXTENSIONS if name in fields), None)
    if extension is None:
        raise _mismatch(shard, f"sample {fields['__key__']!r} at byte {offset} has no image")
    return EncodedSample(
        key=fields["__key__"],
        image=fields[extension],
        extension=extension,
        label=_label(fields),
        sample_id=shard.first_sample_id + place,
        shard=shard.name,
        offset=offset,
    )


def _label(fields: dict[str, Any]) -> int | None:
    """The class index in `.cls` (ascii digits) or `.json` ({"label": int}); None where there is none."""
    try:
        if "cls" in fields:
            return int(fields["cls"].decode("ascii"))
        label = json.loads(fields["json"])["label"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return label if type(label) is int else None


def _mismatch(shard: Shard, problem: str) -> DataError:
    return DataError(
        f"{shard.path}: does not hold what its index says ({problem}); restore the shard, "
        f"or run `pretrain shards index {shard.path.parent}` if it was changed on purpose"
    )
