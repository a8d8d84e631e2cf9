"""OUT/.build, the memory of an unfinished build, as it survives a kill at any moment.

`plan.json` says what the build is; it is written last of the preparations, and from then on the build can be
continued. `listing/` holds the list of images and the spool, `done/` one note per finished shard, and `lock`
is held while a build runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.data.build.sources.source import Source
from pretrain.data.manifest import INDEX_NAME
from pretrain.errors import DataError

WORK_NAME = ".build"
REJECTED_NAME = "rejected.jsonl"
_PLAN = "plan.json"
_MAX_NAMED = 3


class WorkFolder:
    """The hidden folder in OUT."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / WORK_NAME
        self.listing = self.path / "listing"
        self.done = self.path / "done"

    @property
    def is_unfinished(self) -> bool:
        return (self.path / _PLAN).is_file()

    def open(self) -> None:
        """Take a new folder or an unfinished build; refuse anything else."""
        if self.out.exists() and not self.out.is_dir():
            raise DataError(f"{self.out}: is a file; name a new folder")
        present = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
        if INDEX_NAME in present and not self.is_unfinished:
            shutil.rmtree(self.path, ignore_errors=True)  # of a build killed in its very last step
            raise DataError(f"{self.out}: holds finished shards with their index; name a new folder")
        if not self.is_unfinished and present - {WORK_NAME}:
            raise DataError(
                f"{self.out}: is not empty ({sorted(present - {WORK_NAME})[0]}) and no unfinished build; "
                "name a new folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.out}: cannot be made ({error.strerror}); name a writable folder"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One build at a time; the system opens the lock when a process dies."""
        import fcntl

        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{self.out}: another build is writing here; wait for its end") from error
            except OSError:
                pass  # a file system without locks
            yield

    def clear_preparations(self) -> None:
        for folder in (self.listing, self.done):
            shutil.rmtree(folder, ignore_errors=True)

    def write_plan(self, identity: dict[str, Any], listing_sha256: str) -> None:
        self.done.mkdir(exist_ok=True)
        temporary = self.path / f"{_PLAN}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"identity": identity, "listing_sha256": listing_sha256}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / _PLAN)

    def check_plan(self, identity: dict[str, Any]) -> str:
        """That the unfinished build is this one; gives the sha256 of its list."""
        plan = json.loads((self.path / _PLAN).read_text(encoding="utf-8"))
        theirs, ours = plan["identity"], json.loads(json.dumps(identity))
        differing = [key for key in ours if key != "files" and theirs.get(key) != ours[key]]
        if differing:
            told = ", ".join(
                f"{key}: {theirs.get(key)} there, {ours[key]} now" for key in differing[:_MAX_NAMED]
            )
            raise DataError(
                f"{self.out}: holds an unfinished build with other settings ({told}); "
                "run it as it was begun, or name a new folder"
            )
        if theirs["files"] != ours["files"]:
            raise self.source_changed()
        return str(plan["listing_sha256"])

    def source_changed(self) -> DataError:
        return DataError(
            f"{self.out}: the source has changed since this build was begun; name a new folder, "
            "or put the source back as it was"
        )

    def remove_temporaries(self) -> None:
        for folder in (self.out, self.done):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The plan last: killed in between, the same command finishes again."""
        self.clear_preparations()
        (self.path / _PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def stamps(source: Source) -> list[list[Any]]:
    """What tells that one of the source's files has changed."""
    found = []
    for path in source.files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); fetch this file again") from error
        found.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return found
