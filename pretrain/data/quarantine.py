"""The record of samples that do not decode, and the budget that says how many a run may meet."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from threading import Lock

from pretrain.data.reader import EncodedSample
from pretrain.data.tar import safe_name
from pretrain.errors import DataError

CHECKSUM = "checksum"  # the reason where a sample's bytes are not those that were indexed


class Quarantine:
    """Counts and records each bad sample once, also over restarts; more than the budget is an error.

    The budget is `max_bad_ratio` of the split's samples, rounded down, but at least one: a single bad file
    does not stop a run on a small data set. A rank holds against it what it met and what the file held at its
    start, and reports what it met.
    """

    def __init__(self, path: Path | None, num_samples: int, max_bad_ratio: float) -> None:
        self.path = path
        self.num_allowed = max(1, int(max_bad_ratio * num_samples))
        self._known = _recorded(path)
        self._num_before = len(self._known)
        self._lock = Lock()

    @property
    def num_bad(self) -> int:
        """Distinct samples on record, of earlier runs in the same folder too."""
        return len(self._known)

    @property
    def num_met(self) -> int:
        """Distinct samples that this process added to the record."""
        return len(self._known) - self._num_before

    def add(self, sample: EncodedSample, reason: str) -> None:
        """Record a sample that did not decode. Called from many threads."""
        with self._lock:
            if sample.sample_id not in self._known:
                self._known.add(sample.sample_id)
                self._append(sample, reason)
            if self.num_bad > self.num_allowed:
                where = f", listed in {self.path}" if self.path else ""
                raise DataError(
                    f"{self.num_bad} samples do not decode{where}, {self.num_allowed} are allowed; the last "
                    f"is {safe_name(sample.key)!r} in {sample.shard} at byte {sample.offset} ({reason}). "
                    "Repair the shards or raise data.max_bad_ratio"
                )

    def _append(self, sample: EncodedSample, reason: str) -> None:
        if self.path is None:
            return
        record = {
            "sample_id": sample.sample_id,
            "shard": sample.shard,
            "offset": sample.offset,
            "key": safe_name(sample.key),
            "reason": reason,
        }
        # a full disk must not end a run for the sake of a note; the sample is counted all the same
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")  # one short write: lines of several ranks do not mix


def _recorded(path: Path | None) -> set[int]:
    """Sample ids on record; a line cut short by a crash counts for nothing."""
    known: set[int] = set()
    if path is not None and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                known.add(int(json.loads(line)["sample_id"]))
    return known
