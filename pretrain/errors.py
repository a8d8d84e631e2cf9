"""Errors that are the user's to mend, each told in one line: what is wrong, where, and the remedy."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75


class UserError(Exception):
    """Wrong input; the command line prints it as one line and exits with 2."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type or impossible."""


class DataError(UserError):
    """Shards that are missing, not indexed, or damaged."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used: absent, damaged, or of another model."""


class PreemptedError(Exception):
    """A run that was asked to stop, has saved its state after `step` steps, and can be continued (75)."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class TrainingError(Exception):
    """A run that must stop through no fault of its input (exit code 1)."""


# trouble of a disk or its server, which another start may not meet
_MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


def cannot_write(folder: Path, error: OSError) -> UserError | TrainingError:
    """What to raise where a run folder cannot be written: a full disk is no fault of the input."""
    what = f"{folder}: cannot be written ({error.strerror or error})"
    if error.errno in _MAY_PASS:
        return TrainingError(f"{what}; make room or mend the disk, then start again with --resume auto")
    return UserError(f"{what}; choose another --output-dir")


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known name, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
