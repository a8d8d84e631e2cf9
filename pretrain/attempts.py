"""Every start of a run is an attempt with a number: who holds the run folder, and whose checkpoints count.

attempts/
    0001.json    who, where, with what command, from which checkpoint it began and how it ended
    0001.beat    a counter that the attempt raises for as long as it lives

After a network cut the old ranks of a run live on for half a minute and more, and keep writing beside the
requeued job. So the newest attempt alone holds the folder, what an attempt writes carries its number, and the
lineage tells what a stale attempt wrote after another had gone on without it. No clock of another machine is
ever believed: attempts are ordered by number, and a foreign one lives if its counter rises while we watch.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter

from pretrain.errors import TrainingError, UserError, cannot_write

FOLDER = "attempts"
MAX_RACES = 100  # lost in a row, after which something else is wrong

Outcome = Literal["done", "preempted", "failed"]

logger = logging.getLogger("pretrain")

_NUMBER = re.compile(r"([0-9]+)\.json")
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class FencedError(TrainingError):
    """A newer attempt of the run has taken over; this one must not write any more."""


@dataclass(frozen=True)
class Owner:
    """The process that writes for an attempt: its rank 0."""

    host: str
    boot_id: str  # of the kernel; a pid means nothing after a reboot; "" where the system has none
    pid: int
    start_ticks: int  # of /proc/PID/stat: the pid may be given to another process
    job: str | None = None  # as the scheduler calls it, such as "slurm 123"
    restart: int = 0  # how often the scheduler has started this job again
    pid_namespace: str = ""  # of a container, in which pids are its own

    def __str__(self) -> str:
        of_job = f", {self.job} (restart {self.restart})" if self.job else ""
        return f"pid {self.pid} on {self.host}{of_job}"


@dataclass(frozen=True)
class Origin:
    """Where an attempt began: at a checkpoint of an earlier attempt, or of none of this run."""

    attempt: PositiveInt | None
    step: NonNegativeInt


@dataclass(frozen=True)
class Record:
    """What attempts/0001.json says."""

    attempt: PositiveInt
    owner: Owner
    since: str  # for people; never compared
    about: dict[str, Any] = field(default_factory=dict)  # command, versions, commit
    began_from: Origin | None = None
    outcome: Outcome | None = None
    step: NonNegativeInt | None = None  # at which it ended

    def __str__(self) -> str:
        return f"attempt {self.attempt} ({self.owner}, since {self.since})"


_RECORD = TypeAdapter(Record)


def this_process(job: str | None = None, restart: int = 0) -> Owner:
    return Owner(
        host=socket.gethostname(),
        boot_id=_text_of(Path("/proc/sys/kernel/random/boot_id")),
        pid=os.getpid(),
        start_ticks=_start_ticks(os.getpid()) or 0,
        job=job,
        restart=restart,
        pid_namespace=_pid_namespace(),
    )


class Attempt:
    """One start of a run, as seen by one of its ranks; rank 0 owns it, and alone writes."""

    def __init__(self, run_dir: Path, number: int, lease_seconds: float, record: Record | None) -> None:
        self.run_dir = run_dir
        self.number = number
        self.lease_seconds = lease_seconds
        self._record = record
        self._count = 0
        self._is_silent = False  # has told of an error that each beat may meet again
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def began_from(self, attempt: int | None, step: int) -> None:
        """Record the checkpoint it goes on from: attempt is None where that is none of this run."""
        assert self._record is not None, "rank 0 alone writes"
        if self.is_fenced():
            raise FencedError(f"{self.run_dir}: {self.newer()} has taken over from attempt {self.number}")
        self._record = replace(self._record, began_from=Origin(attempt, step))
        try:
            _replace(_path(self.run_dir, self.number), _RECORD.dump_json(self._record, indent=1))
        except OSError as error:
            raise cannot_write(self.run_dir, error) from None

    def beat(self) -> None:
        """Raise the counter. A disk that is full or gone is told once, and stops nothing.

        Written in place: a reader on NFS sees a changed file sooner than a replaced one.
        """
        assert self._record is not None, "rank 0 alone writes"
        self._count += 1
        try:
            handle = os.open(_beat_path(self.run_dir, self.number), os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(handle, b"%020d\n" % self._count, 0)
            finally:
                os.close(handle)  # NFS writes, and may fail, here
        except OSError as error:
            self._tell_once(f"attempt {self.number} cannot show that it lives: {error}")

    def is_fenced(self) -> bool:
        """A newer attempt holds the run folder. Unknown, where the folder cannot be read, counts as no."""
        try:
            return _newest(self.run_dir) > self.number
        except OSError as error:
            self._tell_once(f"attempt {self.number} cannot see whether another has taken over: {error}")
            return False

    def newer(self) -> str:
        """The newest attempt, in words."""
        number = _newest(self.run_dir)
        record = _read(_path(self.run_dir, number))
        return str(record) if record else f"attempt {number}"

    def watch(self, on_fenced: Callable[[str], None]) -> None:
        """Beat in the background, and call `on_fenced` once, from there, when a newer attempt has begun.

        On NFS a listing may be a minute old: until it is seen, names and lineage are what protects.
        """
        assert self._thread is None, "watched already"
        self._thread = threading.Thread(target=self._watch, args=(on_fenced,), name="attempt", daemon=True)
        self._thread.start()

    def _watch(self, on_fenced: Callable[[str], None]) -> None:
        while not self._stopping.wait(self.lease_seconds / 6):
            if self.is_fenced():
                try:
                    newer = self.newer()
                except OSError:
                    newer = "a newer attempt"
                on_fenced(newer)
                return
            if self._record:
                self.beat()

    def finish(self, outcome: Outcome, step: int) -> None:
        """Record how it ended and stop watching; the first outcome stays. On other ranks it only stops."""
        self._stopping.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)  # it may hang on a storage that is gone
        if self._record is None or self._record.outcome:
            return
        self._record = replace(self._record, outcome=outcome, step=step)
        try:
            _replace(_path(self.run_dir, self.number), _RECORD.dump_json(self._record, indent=1))
        except OSError as error:
            logger.warning("how attempt %d ended could not be written down: %s", self.number, error)

    def _tell_once(self, message: str) -> None:
        if not self._is_silent:
            logger.warning("%s; this is told once, the run goes on", message)
        self._is_silent = True


def begin(
    run_dir: Path,
    owner: Owner,
    lease_seconds: float = 60.0,
    *,
    above: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Attempt:
    """Take the run folder, as its newest attempt; a UserError says who holds it.

    A full disk is a TrainingError, for it may have room at another start.

    An attempt on another machine is watched for `lease_seconds` before it counts as dead.
    above: the highest number that a checkpoint carries, lest a lost attempt file give it out twice.
    about: what the attempt file tells of command and versions.
    """
    try:
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        for line in lineage(run_dir).problems:
            logger.warning("%s", line)
        newest = 0
        for _ in range(MAX_RACES):
            newest = max(newest, _newest(run_dir))
            if newest and not _is_over(run_dir, newest, owner, lease_seconds):
                continue
            number = max(newest, above) + 1
            record = Record(number, owner, datetime.now(UTC).isoformat(timespec="seconds"), dict(about or {}))
            if _create(_path(run_dir, number), _RECORD.dump_json(record, indent=1)):
                for left in (run_dir / FOLDER).glob(".*.new"):  # of starts that were killed or have lost
                    left.unlink(missing_ok=True)
                attempt = Attempt(run_dir, number, lease_seconds, record)
                attempt.beat()
                return attempt
            newest = number  # exists, though an old listing may not show it yet
    except OSError as error:
        raise cannot_write(run_dir, error) from None
    raise UserError(f"{run_dir}: too many starts at the same time; start one of them again")


def joined(run_dir: Path, number: int, lease_seconds: float = 60.0) -> Attempt:
    """The attempt of a rank other than 0: it watches and writes nothing."""
    return Attempt(run_dir, number, lease_seconds, None)


def refuse_stale(run_dir: Path, number: int) -> None:
    """Raise FencedError if a newer attempt than `number` has begun."""
    newest = _newest(run_dir)
    if newest > number:
        raise FencedError(f"{run_dir}: attempt {newest} has taken over from attempt {number}")


def last_outcome(run_dir: Path) -> Outcome | None:
    """How the newest attempt ended; None if it has not, or there is none."""
    record = _read(_path(run_dir, _newest(run_dir)))
    return record.outcome if record else None


def num_preempted(run_dir: Path) -> int:
    """Attempts that ended on request, with their state saved."""
    return sum(record.outcome == "preempted" for record in _records(run_dir).values() if record is not None)


def is_over(run_dir: Path, number: int) -> bool:
    """Certain that nothing of this attempt writes any more, or may: ended, dead on this machine, or stale."""
    newest = _newest(run_dir)
    if number != newest:
        return number < newest
    record = _read(_path(run_dir, number))
    return record is not None and (record.outcome is not None or _lives(record.owner) is False)


def _is_over(run_dir: Path, number: int, owner: Owner, lease_seconds: float) -> bool:
    """Whether this attempt may be taken over from; False asks to look again, a UserError says it lives."""
    record = _read(_path(run_dir, number))
    name = str(record) if record else f"attempt {number}, whose file is damaged,"
    if record and record.outcome:
        return True
    if record and owner.job and record.owner.job == owner.job and record.owner.restart < owner.restart:
        logger.info("%s: %s is taken over from: its job has been started again", run_dir, name)
        return True
    lives = _lives(record.owner) if record else None
    if lives is None:
        logger.info(
            "%s: watching for %g s whether %s still lives, on another machine", run_dir, lease_seconds, name
        )
        lives = _beats(run_dir, number, lease_seconds, record)
        if lives is None:
            return False
    if lives:
        raise UserError(
            f"{run_dir}: {name} still runs there; wait for its end or stop it, or choose another --output-dir"
        )
    logger.warning("%s: %s was not ended but is dead; taken over from", run_dir, name)
    return True


def _beats(run_dir: Path, number: int, lease_seconds: float, record: Record | None) -> bool | None:
    """Whether the counter changes within the lease, by our own monotonic clock; None: it ends meanwhile."""
    path, pause = _beat_path(run_dir, number), min(lease_seconds / 20, 3.0)
    before, watched = _text_of(path), 0.0
    while watched < lease_seconds:
        began = time.monotonic()
        time.sleep(pause)
        if _newest(run_dir) > number or _read(_path(run_dir, number)) != record:
            return None
        if _text_of(path) != before:
            return True
        # a look that took long does not count: storage or machine stood still, perhaps for the other too
        watched += min(time.monotonic() - began, 2 * pause)
    return False


def _lives(owner: Owner) -> bool | None:
    """Whether its process lives, which can be seen on its own machine only; else None."""
    here = this_process()
    is_here = (owner.host, owner.boot_id, owner.pid_namespace) == (
        here.host,
        here.boot_id,
        here.pid_namespace,
    )
    if not is_here or not owner.boot_id:
        return None
    return _start_ticks(owner.pid) == owner.start_ticks


@dataclass(frozen=True)
class Lineage:
    """Which checkpoints of a run its newest attempt descends from, or wrote."""

    last_step: Mapping[int, float] | None  # of each attempt that counts; None: nothing is known, all count
    problems: tuple[str, ...] = ()  # attempt files that say nothing

    def allows(self, attempt: int, step: int) -> bool:
        return self.last_step is None or step <= self.last_step.get(attempt, -1)


def lineage(run_dir: Path) -> Lineage:
    """Follow the newest attempt back to where it began, and that one to where it began.

    A damaged attempt file is believed in nothing. Its attempt has held the run like any other, so that its
    checkpoints stay; where it began is unknown, so those of the attempt before it stay too. Attempts that
    never recorded where they began have written nothing.
    """
    records = _records(run_dir)
    problems = tuple(
        f"{_path(run_dir, number)}: is damaged; where this attempt began is unknown"
        for number, record in records.items()
        if record is None
    )
    written = [number for number, record in records.items() if record is None or record.began_from]
    if not written:
        return Lineage(None, problems)
    last_step: dict[int, float] = {}
    number, bound = max(written), math.inf
    while number and number not in last_step:
        last_step[number] = bound
        record = records.get(number)
        if record is not None and record.began_from:
            number = record.began_from.attempt or 0
            bound = min(bound, record.began_from.step)
        elif number in records:
            number = max((other for other in written if other < number), default=0)
        else:
            break  # older than the first attempt file
    return Lineage(last_step, problems)


def check_progress(run_dir: Path, newest_step: int, limit: int) -> None:
    """Refuse to start once more what has begun `limit` times in a row and come no further (a requeue loop).

    newest_step: of the newest checkpoint that verifies, 0 if there is none. limit: 0 allows any number.
    """
    idle: list[int] = []
    for number, record in sorted(_records(run_dir).items(), reverse=True):
        if record is None or (record.outcome is None and _is_this_process(record.owner)):
            continue
        # one that was over before it began from anywhere came no further either
        began_before = record.began_from is not None and record.began_from.step < newest_step
        if record.outcome == "done" or began_before:
            break
        idle.append(number)
    if limit <= 0 or len(idle) < limit:
        return
    raise UserError(
        f"{run_dir}: attempts {', '.join(map(str, reversed(idle)))} wrote no checkpoint beyond step "
        f"{newest_step}; mend what the end of {run_dir / 'train.log'} shows, then start with "
        f"guard.max_idle_attempts above {len(idle)} (0: no limit)"
    )


def progress_lost(run_dir: Path, has_folder: bool) -> str | None:
    """How it is known that a run whose folder has no checkpoint did have some; None if it may begin.

    has_folder: the folder of its checkpoints is there, which every attempt makes before it is recorded where
    that begins.
    """
    for number, record in _records(run_dir).items():
        if record is None or record.began_from is None:
            continue
        reached = max(record.began_from.step, record.step or 0)
        if reached:
            return f"attempt {number} came to step {reached}, and no checkpoint is here"
        if not has_folder:
            return f"attempt {number} trained here, and the folder of its checkpoints is gone"
    return None


def _is_this_process(owner: Owner) -> bool:
    return owner.pid == os.getpid() and _lives(owner) is not False


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / FOLDER / f"{number:04d}.json"


def _beat_path(run_dir: Path, number: int) -> Path:
    return _path(run_dir, number).with_suffix(".beat")


def _numbers(run_dir: Path) -> list[int]:
    try:
        names = os.listdir(run_dir / FOLDER)  # noqa: PTH208  (names are all that is wanted)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(found[1]) for found in map(_NUMBER.fullmatch, names) if found and int(found[1]) > 0)


def _newest(run_dir: Path) -> int:
    return max(_numbers(run_dir), default=0)


def _records(run_dir: Path) -> dict[int, Record | None]:
    """Every attempt by number; None for a file that is damaged."""
    return {number: _read(_path(run_dir, number)) for number in _numbers(run_dir)}


def _read(path: Path) -> Record | None:
    try:
        record = _RECORD.validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None
    return record if path.name == f"{record.attempt:04d}.json" else None


def _create(path: Path, content: bytes) -> bool:
    """Make the file, complete, unless it exists. Two machines cannot both succeed, on NFS neither."""
    new = _new_file(path, content)
    try:
        os.link(new, path)
    except FileNotFoundError:  # swept by the start that has won
        return False
    except FileExistsError:
        try:
            return new.stat().st_nlink == 2  # NFS may ask twice, and take its first success for another's
        except FileNotFoundError:
            return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _create_in_place(path, content)
    finally:
        new.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    """For file systems without hard links: another start may see half of it, and then watches its beat."""
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _replace(path: Path, content: bytes) -> None:
    new = _new_file(path, content)
    try:
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _new_file(path: Path, content: bytes) -> Path:
    """The content, durable, under a name that no other process uses."""
    new = path.with_name(f".{path.stem}-{secrets.token_hex(6)}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return new


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _text_of(path: Path) -> str:
    """A small file's content; "" where it cannot be read."""
    try:
        return path.read_bytes().decode("ascii", "replace").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115  (it names no file)
    except OSError:
        return ""


def _start_ticks(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None if it is gone, or dead and not yet reaped."""
    of_process = _text_of(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()  # the name may hold anything
    if len(of_process) < 20 or of_process[0] in ("Z", "X"):
        return None
    return int(of_process[19])
