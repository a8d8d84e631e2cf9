"""The process beside each rank that ends a run that hangs and says where; `pretrain.watchdog` runs this file.

It is an interpreter of its own, so it runs while the rank holds its interpreter lock, and it needs the
standard library only, so it starts at once and stays small. The ranks' processes meet in one folder:

alarm                     empty while all is well; grows by a line when a rank is too long in a section
rank-0003.json            where a rank was when the alarm was raised
rank-0003.stacks.txt      the Python stacks of all its threads, and what the kernel says of each
rank-0003.debugged        changes while a debugger is attached to this rank: no rank raises the alarm
verdict.txt               one line: which rank hangs, and where
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # of prctl(2)
PAUSED_POLLS = 10  # so many polls missed in a row: not the rank hangs, the machine stood still
STACKS_SECONDS = 2.0  # for a rank to write its stacks
ALONE_SECONDS = 5.0  # reports are taken seconds apart; who was so much longer in a section was there first


class Settings(NamedTuple):
    """What `pretrain.watchdog` hands over, as JSON on the command line."""

    rank: int
    world_size: int
    pid: int  # of the rank
    folder: str  # shared by all ranks
    limits: dict[str, float]  # seconds by section, in the order of a step
    grace_seconds: float
    poll_seconds: float  # between two looks at the rank
    folder_seconds: float  # between two looks at the folder
    record_fd: int  # memory in which the rank says where it is
    stacks_fd: int
    control_fd: int
    stacks_signal: int


class Place(NamedTuple):
    """Where a rank says it is; times in seconds of the machine's monotonic clock."""

    num_entries: int  # into a section, so far
    section: str
    step: int  # -1: before any
    since: float
    starting_since: float | None  # while the run starts, all of which counts as section init
    is_whole: bool = True  # not a mixture of two places


class Report(NamedTuple):
    """What one rank's process tells the others after the alarm."""

    rank: int
    host: str
    pid: int
    step: int
    section: str
    seconds: float  # in that section
    limited_by: str  # the section whose limit holds: init while the run starts
    counted_seconds: float  # held against that limit
    limit_seconds: float
    state: str  # of /proc/PID/stat: R runs, S sleeps, T stopped, D waits in the kernel

    @property
    def is_over(self) -> bool:
        return self.counted_seconds > self.limit_seconds


class Trainee:
    """The watched rank: where it says it is, and what the kernel says of it."""

    def __init__(self, settings: Settings) -> None:
        self.pid = settings.pid
        self._sections = list(settings.limits)
        memory = mmap.mmap(settings.record_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)
        # numbers of 8 bytes: entries, section, step, since, starting since (ns; 0: started), entries again
        self._record = memoryview(memory).cast("q")
        self._stacks_fd = settings.stacks_fd
        self._stacks_signal = settings.stacks_signal

    def place(self) -> Place:
        """The latest place. The rank writes it from front to back, with the same count at both ends.

        Whole is what had its end before and its front after the rest was read. A rank may be stopped while
        it writes, so this gives up at last; two looks must agree before anything counts as a hang.
        """
        for attempt in range(1, 5000):
            if attempt % 100 == 0:
                time.sleep(0.001)  # it may have lost its turn to us
            end = self._record[5]
            section, step, since, starting = self._record[1:5].tolist()
            front = self._record[0]
            if front == end:
                break
        return Place(
            front,
            self._sections[section],
            step,
            since / 1e9,
            starting / 1e9 if starting else None,
            front == end,
        )

    def state(self) -> str:
        stat = (Path("/proc") / str(self.pid) / "stat").read_text()
        return stat[stat.rindex(")") + 2]  # the name in brackets may hold anything

    def is_traced(self) -> bool:
        status = (Path("/proc") / str(self.pid) / "status").read_text()
        return "\nTracerPid:\t0\n" not in status

    def stacks(self) -> str:
        """The stacks of all threads, which a handler in C writes, whoever holds the interpreter lock."""
        before = size = os.fstat(self._stacks_fd).st_size
        if self.state() not in "Tt":
            os.kill(self.pid, self._stacks_signal)
            deadline = time.monotonic() + STACKS_SECONDS
            while time.monotonic() < deadline:
                time.sleep(0.05)
                last, size = size, os.fstat(self._stacks_fd).st_size
                if size == last > before:
                    break
        text = os.pread(self._stacks_fd, size - before, before).decode(errors="replace")
        return (text or "no stacks: the process does not run\n") + self._threads()

    def _threads(self) -> str:
        lines = ["\nthreads as the kernel sees them: id, name and state, where it waits"]
        for task in sorted(
            (Path("/proc") / str(self.pid) / "task").iterdir(), key=lambda path: int(path.name)
        ):
            with contextlib.suppress(OSError):  # a thread may end meanwhile
                stat = (task / "stat").read_text()
                name, state = stat[stat.index("(") : stat.rindex(")") + 1], stat[stat.rindex(")") + 2]
                lines.append(f"{task.name} {name} {state} {(task / 'wchan').read_text()}")
        return "\n".join(lines) + "\n"


class Folder:
    """Where the ranks' processes meet. Any call may wait for ever when its file system does."""

    def __init__(self, settings: Settings) -> None:
        self.path = Path(settings.folder)
        self.rank = settings.rank
        self.alarm = self.path / "alarm"
        self._verdict = self.path / "verdict.txt"
        self._debugged = self.path / f"rank-{self.rank:04d}.debugged"
        self._marks: dict[str, str] = {}  # of debugged ranks, at the last look
        self.alarm_was_raised = False
        self.trainee_is_traced = False  # told to the other ranks
        self._seconds = settings.folder_seconds

    def watch(self) -> None:
        """Look for an alarm of another rank for ever, in a thread.

        The alarm file exists from the start because a network file system asks the server when a known file
        is opened, and answers from its memory, up to a minute old, when a file is looked for in vain.
        """
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            self._write_to_alarm(b"")
        was_traced = False
        while not self.alarm_was_raised:
            time.sleep(self._seconds)
            with contextlib.suppress(OSError):  # said when there is something to say
                self.alarm_was_raised = bool(self.alarm.read_bytes())
            with contextlib.suppress(OSError):
                if self.trainee_is_traced:
                    self._debugged.write_text(str(time.monotonic_ns()))
                elif was_traced:
                    self._debugged.unlink()
                was_traced = self.trainee_is_traced

    def _write_to_alarm(self, line: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with self.alarm.open("ab") as file:
            file.write(line)

    def raise_alarm(self, report: Report) -> None:
        where = f"rank {report.rank} ({report.host}): '{report.section}' of step {report.step}\n"
        self._write_to_alarm(where.encode())

    def someone_is_debugged(self) -> bool:
        """Whether a debugged rank's mark changed since the last look; one that a dead rank left does not."""
        before = self._marks
        self._marks = {path.name: path.read_text() for path in self.path.glob("rank-*.debugged")}
        return any(before.get(name) != mark for name, mark in self._marks.items())

    def publish(self, report: Report, stacks: str | None = None) -> None:
        """The stacks first: who sees the report may count on them."""
        for name, text in (("stacks.txt", stacks), ("json", json.dumps(report._asdict()))):
            if text is not None:
                path = self.path / f"rank-{self.rank:04d}.{name}"
                half = path.with_name(f".{path.name}.writing")
                half.write_text(text)
                half.replace(path)

    def reporting(self) -> list[int]:
        """The ranks that have reported."""
        return sorted(int(path.stem.removeprefix("rank-")) for path in self.path.glob("rank-*.json"))

    def reports(self) -> list[Report]:
        found = []
        for path in sorted(self.path.glob("rank-*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):  # not whole, or not ours: no sign
                found.append(Report(**json.loads(path.read_text())))
        return found

    def has_verdict(self, wait_seconds: float) -> bool:
        deadline = time.monotonic() + wait_seconds
        while not self._verdict.exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def settle(self, line: str) -> bool:
        """Make this the one verdict of all ranks; False if another rank was first."""
        try:
            with self._verdict.open("x") as file:
                file.write(line + "\n")
        except FileExistsError:
            return False
        return True

    def tidy(self) -> None:
        """Leave nothing behind when nothing happened."""
        if not self.alarm.stat().st_size:
            self.alarm.unlink()
            self.path.rmdir()


def numbers(ranks: Sequence[int]) -> str:
    """'rank 3', 'ranks 2, 4-7'"""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    told = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(told)}"


def furthest_behind(reports: Sequence[Report], order: Sequence[str]) -> list[Report]:
    """Who the others wait for: whoever is at the earliest step, and at the earliest section of it.

    Among equals a stopped rank, or one that was there alone for a while before the others came; where
    neither is to be seen, all of them.
    """
    first = min((report.step, order.index(report.section)) for report in reports)
    equal = [report for report in reports if (report.step, order.index(report.section)) == first]
    stopped = [report for report in equal if report.state in "Tt"]
    if stopped:
        return stopped
    longest, *others = sorted(equal, key=lambda report: report.seconds, reverse=True)
    if others and longest.seconds - others[0].seconds > ALONE_SECONDS:
        return [longest]
    return equal


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _told(reports: Sequence[Report]) -> str:
    """Where these ranks, which are at the same place, have been for how long, and which limit that breaks."""
    over = [report for report in reports if report.is_over]
    one = max(over or reports, key=lambda report: report.seconds)
    many = len(reports) > 1
    text = numbers([report.rank for report in reports])
    if len({report.host for report in reports}) == 1:
        text += f" ({one.host})"
    text += " have" if many else " has"
    at = f"in '{one.section}'" + (f" of step {one.step}" if one.step >= 0 else "")
    if one.limited_by == one.section or not over:
        text += f" been {at} for {_span(one.counted_seconds if over else one.seconds)}"
    else:
        text += f" been in '{one.limited_by}' for {_span(one.counted_seconds)}"
    if over:
        text += f" (limit {one.limit_seconds:g} s, watchdog.{one.limited_by}_seconds)"
        if one.limited_by != one.section:
            text += f", the last {_span(one.seconds)} {at}"
    if one.state in "Tt":
        text += f", and {'are' if many else 'is'} stopped by a signal"
    elif one.state == "D" and not many:
        text += ", and waits in the kernel (storage or a driver)"
    return text


def verdict(reports: Sequence[Report], world_size: int, order: Sequence[str]) -> str:
    """One line: which ranks gave no sign, who is furthest behind, and whose limit was broken."""
    silent = sorted(set(range(world_size)) - {report.rank for report in reports})
    behind = furthest_behind(reports, order)
    line = _told(behind)
    if silent:
        one = len(silent) == 1
        line = (
            f"no sign from {numbers(silent)}: {'has it' if one else 'have they'} died, "
            f"or is {'its' if one else 'their'} node gone? {line}"
        )
    over = [report for report in reports if report.is_over]
    if over and not any(report.is_over for report in behind):
        line += f"; meanwhile {_told([min(over)])}"
    return line


def within(seconds: float, work: Callable[[], None]) -> None:
    """Do `work`, but do not wait for it longer: a call into a dead file system may never return."""
    outcome: list[Exception | None] = []

    def attempt() -> None:
        try:
            work()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"did not answer within {seconds:.0f} s")
    if outcome[0]:
        raise outcome[0]


class Watch:
    """One rank under watch."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.trainee = Trainee(settings)
        self.folder = Folder(settings)
        self.fresh = time.monotonic()  # no limit counts from before

    def run(self) -> None:
        """Look at the rank until it closes the watch, is gone, or has to be ended."""
        settings, last_poll = self.settings, time.monotonic()
        was_over: tuple[str, float] | None = None  # of which section, since when
        if settings.world_size > 1:
            self.folder.watch()
        while True:
            told, _, _ = select.select([settings.control_fd], [], [], settings.poll_seconds)
            if told:
                if os.read(settings.control_fd, 1) and settings.rank == 0:
                    with contextlib.suppress(OSError):
                        within(1.0, self.folder.tidy)
                return
            if os.getppid() != settings.pid:
                return
            now = time.monotonic()
            self.folder.trainee_is_traced = self.trainee.is_traced()
            if self.folder.trainee_is_traced or now - last_poll > PAUSED_POLLS * settings.poll_seconds:
                self.fresh = now
            last_poll = now
            place = self.trainee.place()
            report = self.report(place, now)
            over = (report.limited_by, place.starting_since or place.since) if report.is_over else None
            hangs = over is not None and over == was_over and not self.someone_is_debugged()
            was_over = over
            if hangs or self.folder.alarm_was_raised:
                self.end(report)
                return

    def report(self, place: Place, now: float) -> Report:
        settings = self.settings
        limited_by = place.section if place.starting_since is None else "init"
        since = place.since if place.starting_since is None else place.starting_since
        return Report(
            settings.rank,
            os.uname().nodename,
            settings.pid,
            place.step,
            place.section,
            now - place.since,
            limited_by,
            now - max(since, self.fresh),
            settings.limits[limited_by],
            self.trainee.state(),
        )

    def someone_is_debugged(self) -> bool:
        """Whether a debugger holds another rank, for which this one then waits; then nobody hangs."""
        found = []
        with contextlib.suppress(OSError):
            within(self.settings.grace_seconds, lambda: found.append(self.folder.someone_is_debugged()))
        if any(found):
            self.fresh = time.monotonic()
        return any(found)

    def end(self, report: Report) -> None:
        """Tell the others, agree with them on what happened, say it and kill the rank.

        It is killed, not asked: what hangs may hold the very locks that an orderly end would need.
        """
        settings, folder = self.settings, self.folder
        order = list(settings.limits)
        stacks = self.trainee.stacks()
        # another rank's process may have seen the alarm, and may so end its wait, later by this
        later = 2 * (settings.folder_seconds + settings.poll_seconds)

        def agree() -> None:
            if not folder.alarm_was_raised:
                folder.raise_alarm(report)
            folder.publish(report, stacks)
            deadline = time.monotonic() + settings.grace_seconds
            while len(folder.reporting()) < settings.world_size and time.monotonic() < deadline:
                time.sleep(min(settings.poll_seconds, 0.2))
            # a change of our own makes a network file system look at the folder anew
            folder.publish(report)
            # one reads them all, the lowest rank that is there; the others step in where it fails
            if settings.rank != min(folder.reporting()) and folder.has_verdict(later):
                return
            reports = folder.reports()
            whose = "all ranks" if len(reports) == settings.world_size else "the others"
            found = verdict(reports, settings.world_size, order)
            line = f"pretrain: {found}; stacks of {whose} in {folder.path}"
            if folder.settle(line):
                say(line)

        try:
            within(settings.grace_seconds + later + 1.0, agree)
        except Exception as error:  # whatever it was, the rank still has to end
            problem = error.strerror if isinstance(error, OSError) and error.strerror else error
            line = f"pretrain: {_told([report])}; {folder.path}: {problem}, so its stacks follow"
            say(f"{line}\n{stacks}")
        if os.getppid() == settings.pid:
            os.kill(settings.pid, signal.SIGKILL)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(2, f"{text}\n".encode())  # in one piece, though other ranks write there too


def main() -> None:
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, which decides when to stop
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    Watch(Settings(**json.loads(sys.argv[1]))).run()
    os._exit(0)  # without waiting for a thread that a dead file system holds


if __name__ == "__main__":
    main()
