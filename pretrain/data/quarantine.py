"""The record of samples that cannot be used, and the budget that says how many a run may meet."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import IO

from pretrain.data.reader import EncodedSample
from pretrain.data.tar import safe_name
from pretrain.errors import DataError

CHECKSUM = "checksum"  # the reason where a sample's bytes are not those that were indexed


def num_allowed(max_bad_ratio: float, num_samples: int) -> int:
    """Bad samples that a run may meet: a single bad file does not stop a run on a small data set."""
    return max(1, int(max_bad_ratio * num_samples))


class Quarantine:
    """Counts and records each bad sample once, over all ranks that share the file, and over restarts.

    The budget is `max_bad_ratio` of the samples, rounded down, but at least one: a single bad file does not
    stop a run on a small data set. It is held against all that is on record of the same data.
    """

    def __init__(self, path: Path | None, num_samples: int, max_bad_ratio: float, data: str = "") -> None:
        self.path = path
        self.num_allowed = num_allowed(max_bad_ratio, num_samples)
        self.met_by_reason: Counter[str] = Counter()  # samples that this process put on record
        self._data = data  # says which data the ids are of
        self._known: set[int] = set()
        self._num_read = 0  # bytes of the file
        self._lock = Lock()
        with contextlib.suppress(OSError):
            if path is not None and path.is_file():
                with path.open("rb") as file:
                    self._read_on(file)

    @property
    def num_met(self) -> int:
        """Samples that this process put on record."""
        return self.met_by_reason.total()

    @property
    def num_bad(self) -> int:
        """Distinct samples on record, of other ranks and of earlier runs in the same folder too."""
        return len(self._known)

    def add(self, sample: EncodedSample, reason: str) -> None:
        """Record a sample that cannot be used. Called from many threads."""
        with self._lock:
            if sample.sample_id not in self._known:
                self._record(sample, reason)
            if self.num_bad > self.num_allowed:
                where = f", listed in {self.path}" if self.path else ""
                raise DataError(
                    f"{self.num_bad} samples do not decode{where}, {self.num_allowed} are allowed; the last "
                    f"is {safe_name(sample.key)!r} in {sample.shard} at byte {sample.offset} ({reason}). "
                    "Repair the shards or raise data.max_bad_ratio"
                )

    def _record(self, sample: EncodedSample, reason: str) -> None:
        # a full disk must not end a run for the sake of a note; the sample is counted all the same
        with contextlib.suppress(OSError), self._shared_file() as file:
            if file is not None:
                self._read_on(file)
                if sample.sample_id in self._known:  # another rank was first
                    return
                self._append(file, sample, reason)
        self._known.add(sample.sample_id)
        self.met_by_reason[reason] += 1

    @contextlib.contextmanager
    def _shared_file(self) -> Iterator[IO[bytes] | None]:
        """The file, for this process alone; None where there is none."""
        if self.path is None:
            yield None
            return
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file, and with the process
            yield file

    def _read_on(self, file: IO[bytes]) -> None:
        """Take in what others have written; a line cut short by a crash counts for nothing."""
        file.seek(self._num_read)
        lines = file.read()
        self._num_read += len(lines)
        for line in lines.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry.get("data", "") == self._data:
                    self._known.add(int(entry["sample_id"]))

    def _append(self, file: IO[bytes], sample: EncodedSample, reason: str) -> None:
        entry = {
            "sample_id": sample.sample_id,
            "shard": sample.shard,
            "offset": sample.offset,
            "key": safe_name(sample.key),
            "reason": reason,
            "data": self._data,
        }
        line = json.dumps(entry).encode() + b"\n"
        file.seek(max(0, self._num_read - 1))
        if self._num_read and file.read(1) != b"\n":
            line = b"\n" + line  # the line before was cut short
        file.write(line)
        file.flush()
        self._num_read += len(line)
