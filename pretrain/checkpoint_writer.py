"""Write checkpoints beside the training, outlive a disk in trouble, and keep which ones are worth keeping.

One thread writes: hashing, writing and fsync all release the interpreter lock, so the training loop goes on.
A second one copies to the mirror, which may be slow or away for hours without holding up a checkpoint.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from pretrain import checkpoint, mirror
from pretrain.attempts import lineage, refuse_stale
from pretrain.errors import ConfigError, TrainingError, UserError

logger = logging.getLogger("pretrain")

BEST = "best.json"  # beside the checkpoints
FINAL_RETRY_SECONDS = (0.5, 2.0, 5.0)  # waits before the last checkpoint of a run is tried again
WRITER_NICE = 10  # of the writing threads
HEADROOM_BYTES = 2**20  # for headers, state.json, config.yaml, MANIFEST.json and folders

Count = Annotated[int, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeepBestConfig(_Settings):
    """Checkpoints that stay because a number of their log record is among the best."""

    metric: str  # such as `total` or `contrastive/accuracy`
    mode: Literal["min", "max"]
    count: Count = 1


class CheckpointConfig(_Settings):
    every_steps: Count = 1000
    keep_last: Count = 3
    keep_every_steps: Count | None = None  # milestones that are never removed
    keep_best: KeepBestConfig | None = None
    asynchronous: bool = True  # written beside the training; costs host memory for up to two checkpoints
    max_failures: Count = 3  # in a row; then the run stops
    mirror: str | None = None  # a folder or s3://BUCKET/FOLDER; there each run has a folder of its own name

    @field_validator("mirror")
    @classmethod
    def _mirror_is_writable(cls, address: str | None) -> str | None:
        if address is not None:
            try:
                mirror.parse_mirror(address, where="")
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return address


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step, apart from the run that goes on; its tensors belong to the writer."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # file name inside the checkpoint -> named tensors on the CPU
    state: Mapping[str, Any]
    values: Mapping[str, float]  # of the step's log record

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for named in self.tensors.values() for t in named.values())


@dataclass(frozen=True)
class Written:
    """A checkpoint that is safe, in the run folder or on the mirror."""

    step: int
    seconds: float
    num_bytes: int
    folder: Path
    free_bytes: int | None = None  # of the disk, then; None where the system does not say


@dataclass(frozen=True)
class Failure:
    step: int
    reason: str  # one line


@dataclass(frozen=True)
class Report:
    """What has happened since the last report."""

    written: tuple[Written, ...] = ()
    failures: tuple[Failure, ...] = ()
    failures_in_a_row: int = 0  # up to now
    mirrored: tuple[Written, ...] = ()
    mirror_failures: tuple[Failure, ...] = ()  # never a reason to stop


class CheckpointWriter:
    """Writes the checkpoints of a run, on its rank 0.

    Host memory holds at most two snapshots: the one being written and the one that waits in `submit`. One
    that could not be written is held until the next is submitted, for `close` to try again if it is the last.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, config_yaml: str, attempt: int = 1) -> None:
        self._run_dir = run_dir
        self._config = config
        self._config_yaml = config_yaml
        self._attempt = attempt
        self._folder = run_dir / checkpoint.FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)  # once: see _check_room
        self._changed = threading.Condition()  # guards all below
        self._snapshot: Snapshot | None = None  # handed over, or being written
        self._failed: Snapshot | None = None  # the last one, if it could not be written
        self._closed = False
        self._written: list[Written] = []
        self._failures: list[Failure] = []
        self._failures_in_a_row = 0
        self._newest_step = 0  # written by this attempt
        self._mirrored: list[Written] = []
        self._mirror_failures: list[Failure] = []
        self._mirror_due = bool(config.mirror)  # at once: the attempt before may not have come to it
        self._mirror_busy = False
        self._mirror_settled: set[str] = set()  # names there, or not worth another try
        if config.asynchronous:
            # daemons: a disk or store that hangs cannot keep the process from ending
            threading.Thread(target=self._write_submitted, name="checkpoint-writer", daemon=True).start()
        if config.mirror:
            threading.Thread(target=self._mirror_when_due, name="checkpoint-mirror", daemon=True).start()

    def submit(self, snapshot: Snapshot) -> float:
        """Take over a snapshot to be written; gives the seconds that the caller was held up.

        That is until the write before has finished or, if not asynchronous, until this one has.
        """
        assert not self._closed, "the writer is closed"
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._snapshot is None)
            self._failed = None  # a newer one takes its place
            self._snapshot = snapshot
            self._changed.notify_all()
        if not self._config.asynchronous:
            self._write(snapshot)
        return time.monotonic() - started

    def poll(self) -> Report:
        """What has happened since the last call; never waits for a disk."""
        with self._changed:
            report = Report(
                tuple(self._written),
                tuple(self._failures),
                self._failures_in_a_row,
                tuple(self._mirrored),
                tuple(self._mirror_failures),
            )
            for news in (self._written, self._failures, self._mirrored, self._mirror_failures):
                news.clear()
        return report

    @property
    def is_busy(self) -> bool:
        """A write is under way, for which `submit` would wait."""
        with self._changed:
            return self._snapshot is not None

    def wait(self) -> None:
        """Until no write is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._snapshot is None)

    def finish(self, timeout_seconds: float = 600.0) -> None:
        """Wait for the last write, tried again a few times if it fails; one that does not end has failed."""
        deadline = time.monotonic() + timeout_seconds
        for wait_seconds in (*FINAL_RETRY_SECONDS, None):
            with self._changed:
                self._changed.wait_for(lambda: self._snapshot is None, _left(deadline))
                if self._failed is None or wait_seconds is None or _left(deadline) <= wait_seconds:
                    break
            time.sleep(wait_seconds)
            self._try_again()
        with self._changed:
            unwritten = self._snapshot
            self._failed = None  # given up
        if unwritten is not None:
            problem = f"not finished within {timeout_seconds:g} s"
            failure = self._told(unwritten.step, problem, "the run ends without it")
            with self._changed:
                self._failures.append(failure)
                self._failures_in_a_row += 1

    def wait_for_mirror(self, timeout_seconds: float = 600.0) -> None:
        """Until the mirror has what the run folder has, or so long."""
        with self._changed:
            is_there = self._changed.wait_for(lambda: not self._mirror_is_behind, timeout_seconds)
        if not is_there:
            self._mirror_has_failed(f"not finished within {timeout_seconds:.3g} s")

    def close(self, timeout_seconds: float = 600.0, mirror_seconds: float | None = None) -> Report:
        """Wait for the last write and then for the mirror, by default in what is left of the time."""
        deadline = time.monotonic() + timeout_seconds
        self.finish(timeout_seconds)
        if mirror_seconds is None:
            mirror_seconds = _left(deadline)
        if mirror_seconds:
            self.wait_for_mirror(mirror_seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return self.poll()

    def _try_again(self) -> None:
        with self._changed:
            snapshot, self._failed = self._failed, None
            assert snapshot is not None
            logger.info("trying again to write the checkpoint of step %d", snapshot.step)
            self._snapshot = snapshot
            self._changed.notify_all()
        if not self._config.asynchronous:
            self._write(snapshot)

    @property
    def _mirror_is_behind(self) -> bool:
        return self._mirror_due or self._mirror_busy

    def _write_submitted(self) -> None:
        """The life of the writing thread."""
        _yield_cores()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._snapshot is not None or self._closed)
                if self._snapshot is None:
                    return
                snapshot = self._snapshot
            self._write(snapshot)
            del snapshot  # or it would live on while this thread waits for the next

    def _write(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        try:
            _check_finite(snapshot)
            self._check_room(snapshot)
            folder = checkpoint.write_checkpoint(
                self._run_dir,
                snapshot.step,
                snapshot.tensors,
                snapshot.state,
                self._config_yaml,
                attempt=self._attempt,
            )
            self._check_complete(folder)
        except OSError as error:
            self._has_failed(snapshot, _reason(error))
        except TrainingError as error:  # a newer attempt has taken over the run, or there is nothing to keep
            self._has_failed(snapshot, str(error), keep=False)
        except BaseException as error:  # whatever it is: training must hear of it, from a thread that lives
            logger.exception("writing the checkpoint of step %d met an error of the program", snapshot.step)
            self._has_failed(snapshot, f"{type(error).__name__}: {error}", keep=False)
        else:
            seconds, num_bytes = time.monotonic() - started, _size(folder)
            self._retain(snapshot, folder)
            done = Written(snapshot.step, seconds, num_bytes, folder, free_bytes(folder.parent))
            with self._changed:
                self._written.append(done)
                self._failures_in_a_row = 0
                self._newest_step = snapshot.step
                self._mirror_due = bool(self._config.mirror)
                self._snapshot = None
                self._changed.notify_all()

    def _has_failed(self, snapshot: Snapshot, reason: str, keep: bool = True) -> None:
        with self._changed:
            num_failures = self._failures_in_a_row + 1
        if num_failures >= self._config.max_failures:
            then = f"this is failure {num_failures} in a row, {self._config.max_failures} end the run"
        else:
            then = "training goes on, the checkpoints before stay, the next is written when it is due"
        failure = self._told(snapshot.step, reason, then)
        with self._changed:
            self._failures.append(failure)
            self._failures_in_a_row = num_failures
            self._failed = snapshot if keep else None
            self._snapshot = None
            self._changed.notify_all()

    def _told(self, step: int, reason: str, then: str) -> Failure:
        failure = Failure(step, " ".join(reason.split()))
        logger.warning(
            "the checkpoint of step %d was not written to %s: %s; %s",
            step,
            self._folder,
            failure.reason,
            then,
        )
        return failure

    def _check_room(self, snapshot: Snapshot) -> None:
        """Fail before the first byte where the disk is away or too full.

        The folder of the checkpoints is made once, when the run starts. If it is gone, so is the disk below
        it: to make it anew would fill whatever lies under the mount point.
        """
        if not self._folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "is gone; bring back its disk or folder", str(self._folder))
        disk = os.statvfs(self._folder)
        free, needed = disk.f_bavail * disk.f_frsize, snapshot.num_bytes + HEADROOM_BYTES
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB left; "
                "free some, or lower checkpoint.keep_last",
                str(self._folder),
            )

    def _check_complete(self, folder: Path) -> None:
        """The folder may have been moved away while it was written; part of it would be elsewhere then."""
        files: dict[str, str] = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
        missing = sorted(name for name in files if not (folder / name).is_file())
        if missing:
            checkpoint.remove_checkpoint(folder)
            raise FileNotFoundError(errno.ENOENT, "vanished while the checkpoint was written", missing[0])

    def _retain(self, snapshot: Snapshot, folder: Path) -> None:
        """Remove what need not be kept. What goes wrong here costs disk space, not the new checkpoint."""
        keep = self._config
        try:
            refuse_stale(self._run_dir, self._attempt)
            best = self._best(snapshot, folder, keep.keep_best) if keep.keep_best else []
            checkpoint.prune(self._run_dir, keep.keep_last, keep.keep_every_steps, best)
        except (OSError, TrainingError) as error:
            logger.warning("older checkpoints in %s were not removed: %s", self._folder, error)
        except Exception:
            logger.exception("removing older checkpoints in %s met an error of the program", self._folder)

    def _best(self, snapshot: Snapshot, folder: Path, wanted: KeepBestConfig) -> list[Path]:
        """The best checkpoints up to now, which are noted on disk."""
        noted = read_best(self._run_dir)
        values = dict(noted.values) if (noted.metric, noted.mode) == (wanted.metric, wanted.mode) else {}
        values.pop(folder.name, None)  # of the same step, written before
        value = snapshot.values.get(wanted.metric)
        if value is None:
            known = ", ".join(sorted(snapshot.values))
            logger.warning(
                "checkpoint.keep_best: the log of step %d has no '%s'; it has %s",
                snapshot.step,
                wanted.metric,
                known,
            )
        elif math.isfinite(value):
            values[folder.name] = float(value)
        sign = 1.0 if wanted.mode == "min" else -1.0
        present = {path.name for path in self._local_checkpoints()}
        ranked = sorted(
            (name for name in values if name in present),
            key=lambda name: (sign * values[name], checkpoint.step_of(Path(name))),
        )[: wanted.count]
        best = {name: values[name] for name in ranked}
        text = json.dumps({"metric": wanted.metric, "mode": wanted.mode, "best": best}, indent=1)
        _replace_text(self._folder / BEST, text)
        return [self._folder / name for name in ranked]

    def _local_checkpoints(self) -> list[Path]:
        return checkpoint.list_checkpoints(self._run_dir)

    def _mirror_when_due(self) -> None:
        """The life of the mirroring thread."""
        _yield_cores()
        while True:
            with self._changed:
                self._mirror_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._mirror_due or self._closed)
                if self._closed:
                    return
                self._mirror_due, self._mirror_busy = False, True
            try:
                self._mirror_all()
            except (TrainingError, UserError, OSError) as error:
                self._mirror_has_failed(str(error))
            except BaseException as error:
                logger.exception("mirroring met an error of the program")
                self._mirror_has_failed(f"{type(error).__name__}: {error}")

    def _mirror_all(self) -> None:
        """Bring every checkpoint of the run folder to the mirror, newest first, and prune it alike."""
        address, keep = self._config.mirror, self._config
        assert address is not None
        mirror.claim(address, self._run_dir)
        for folder in self._local_checkpoints():
            if folder.name in self._mirror_settled:
                continue
            started = time.monotonic()
            try:
                num_bytes = mirror.push(folder, address)
            except (mirror.DamagedError, OSError) as error:
                if folder.is_dir():  # else it was removed meanwhile, as newer ones are there
                    self._mirror_settled.add(folder.name)  # damage does not heal
                    self._mirror_has_failed(str(error), folder)
                continue
            self._mirror_settled.add(folder.name)
            if num_bytes:
                seconds = time.monotonic() - started
                with self._changed:
                    self._mirrored.append(Written(checkpoint.step_of(folder), seconds, num_bytes, folder))
        refuse_stale(self._run_dir, self._attempt)
        mirror.prune(
            address,
            self._run_dir,
            keep.keep_last,
            keep.keep_every_steps,
            keep=read_best(self._run_dir).values if keep.keep_best else (),
            allows=lineage(self._run_dir).allows,
            attempt=self._attempt,
        )

    def _mirror_has_failed(self, reason: str, damaged: Path | None = None) -> None:
        address, reason = self._config.mirror, " ".join(reason.split())
        if damaged:
            logger.warning("%s was not copied to %s: %s", damaged, address, reason)
        else:
            logger.warning(
                "the mirror %s is not up to date: %s; the checkpoints stay in %s, the next one tries again",
                address,
                reason,
                self._folder,
            )
        with self._changed:
            step = checkpoint.step_of(damaged) if damaged else self._newest_step
            self._mirror_failures.append(Failure(step, reason))


@dataclass(frozen=True)
class Best:
    """The checkpoints with the best values of a metric."""

    metric: str = ""
    mode: str = ""
    values: Mapping[str, float] = field(default_factory=dict)  # folder name -> value


def read_best(run_dir: Path) -> Best:
    """The list beside the checkpoints; empty where there is none or it is damaged."""
    path = run_dir / checkpoint.FOLDER / BEST
    try:
        read = json.loads(path.read_text())
        values = {str(name): float(value) for name, value in read["best"].items()}
        return Best(str(read["metric"]), str(read["mode"]), values)
    except FileNotFoundError:
        return Best()
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s is not readable; the best checkpoints are counted anew", path)
        return Best()


def _check_finite(snapshot: Snapshot) -> None:
    """A run could neither go on from such a checkpoint nor go back to it."""
    for file, named in snapshot.tensors.items():
        for name, value in named.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise TrainingError(f"'{name}' in {file} is not finite")


def _reason(error: OSError) -> str:
    """`path: reason`, as far as the error knows them."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _yield_cores() -> None:
    """Let training have the cores where they are too few; on Linux a thread has a nice of its own."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICE)


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:  # of a figure for the log
        return 0


def free_bytes(folder: Path) -> int | None:
    """Of the disk that a folder lies on; None where the system does not say."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _replace_text(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one."""
    writing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        writing.rename(path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
