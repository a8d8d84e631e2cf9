"""A run through everything that happens to long runs, against the same run that nothing happened to.

    python tests/cluster/chaos.py --minutes 30 --seed 0 --out chaos.json

Brings up three nodes (SLURM_TEST_CLUSTER), submits `slurm/pretrain_vitb.sh` on two of them, and for so many
minutes kills, freezes and signals ranks, cuts and powers off nodes, fills the disk and damages checkpoints.
Then the samples of every step and the bits of the last student, teacher and optimizer must be those of the
undisturbed run: exit code 0, else 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from slurm_cluster import OF_A_LAUNCHER, OF_ANOTHER_JOB, REPOSITORY, STOPPED, Job, SlurmCluster, why_absent

from pretrain import attempts, checkpoint

sys.path.insert(0, str(REPOSITORY / "tests"))
from small_shards import make_shards

SCRIPT = REPOSITORY / "slurm" / "pretrain_vitb.sh"
LAYOUT = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2")
EVERY_STEPS = 10  # between two checkpoints
PROBE_STEPS = 60  # taken to measure how long a step is
BUSY_RATIO = 0.5  # of the minutes: how long the run would take undisturbed
BETWEEN_SECONDS = (20.0, 60.0)  # from one event to the next
PEACE_SECONDS = (2.0, 10.0)  # from the first resumed step to the next event, at least
STARTING_RATIO = 0.25  # of events: they do not wait until the run has recovered from the one before
BACK_SECONDS = 300.0  # after which a run that is not back counts as lost
DISK_BYTES = 192 * 2**20
FULL_SECONDS = 15.0
HANG_SECONDS = 15  # in a section, before the watchdog ends the run

# few weights, many patches: steps take time, checkpoints do not fill the disk
CONFIG = f"""
seed: 3
model:
  name: vit_tiny_patch16_224
  img_px: 48
  patch_px: 4
  args: {{depth: 4, embed_dim: 48, num_heads: 3}}
data: {{shards: SHARDS, lanes: 12, shuffle_block: 4}}
views:
  one: &view {{size_px: 48, turn: true, interpolation: bilinear}}
  two: *view
tasks:
  contrastive: {{hidden_dim: 64, out_dim: 32}}
  rotation: {{}}
teacher: {{momentum: 0.99}}
optim: {{base_lr: 0.02}}
schedule: {{steps: {PROBE_STEPS}, warmup_steps: 10}}
batch: {{global_size: 24, accumulation_steps: 2}}
engine: {{precision: fp32}}
checkpoint: {{every_steps: {EVERY_STEPS}, keep_last: 4, max_failures: 1000}}
log: {{every_steps: 1, prometheus: {{enabled: false}}}}
guard: {{max_idle_attempts: 8}}
watchdog:
  data_seconds: {HANG_SECONDS}
  forward_seconds: {HANG_SECONDS}
  backward_seconds: {HANG_SECONDS}
  step_seconds: {HANG_SECONDS}
  checkpoint_seconds: {2 * HANG_SECONDS}
  grace_seconds: 5
cluster: {{timeout_seconds: 120, rendezvous_seconds: 60}}
"""

logger = logging.getLogger("chaos")


class LostError(Exception):
    """The run does not come back, or has ended as it should not."""


class OverError(Exception):
    """The run has come to its end."""


class Records(threading.Thread):
    """Reads metrics.jsonl while it grows: what is in it for a moment counts as well.

    A start of the run rewrites the file up to the step it goes on from, and steps on a full disk leave no
    record, or half of one.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(name="records", daemon=True)
        self.path = path
        self.samples: dict[int, set[float]] = defaultdict(set)  # every digest that a step was seen with
        self.steps: dict[int, dict[int, float]] = defaultdict(dict)  # attempt -> step -> Unix time
        self.num_broken = 0
        self._place = (0, 0)  # inode, bytes read
        self._closing = threading.Event()

    def run(self) -> None:
        while not self._closing.wait(0.25):
            self.read()

    def close(self) -> None:
        self._closing.set()
        self.join()
        self.read()

    def read(self) -> None:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                inode, offset = self._place
                if stat.st_ino != inode or stat.st_size < offset:
                    offset = 0
                file.seek(offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return
        self._place = (stat.st_ino, offset + len(whole) + bool(whole))
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                step, attempt = int(record["step"]), int(record["attempt"])
                samples, unix_time = float(record["samples"]), float(record["unix_time"])
            except (ValueError, KeyError, TypeError):
                self.num_broken += 1
                continue
            self.samples[step].add(samples)
            self.steps[attempt].setdefault(step, unix_time)

    def last_step(self, up_to_attempt: int) -> int:
        """The last step that was taken by this attempt or one before."""
        return max(
            (max(steps) for attempt, steps in list(self.steps.items()) if attempt <= up_to_attempt and steps),
            default=0,
        )

    def first_after(self, attempt: int) -> tuple[int, float] | None:
        """The first later attempt that took a step, and when it took its first."""
        later = sorted(number for number in list(self.steps) if number > attempt)
        return (later[0], min(self.steps[later[0]].values())) if later else None

    def taken_again(self, attempt: int) -> int:
        """The number of steps that an attempt had to take again."""
        return max(0, self.last_step(attempt - 1) - (min(self.steps[attempt]) - 1))


@dataclass
class Event:
    """What was done to the run, and what became of it."""

    kind: str
    while_starting: bool  # the run had not come back from the event before
    details: dict[str, Any] = field(default_factory=dict)
    at_seconds: float = 0.0  # after the submission
    attempt: int = 0  # the newest at that moment
    back_seconds: float | None = None  # from the event to the first resumed step
    back_in: int | None = None  # the attempt that took it
    went_on: bool = False  # without a new start
    num_lost_steps: int = 0  # taken again
    submitted_again: bool = False


class Chaos:
    """The run, what is done to it and how it comes back."""

    def __init__(
        self, cluster: SlurmCluster, config: Path, run: Path, output: Path, disk: Path | None, seed: int
    ) -> None:
        self.cluster, self.config, self.run, self.output, self.disk = cluster, config, run, output, disk
        self.rng = random.Random(seed)
        self.records = Records(run / "metrics.jsonl")
        self.events: list[Event] = []
        self.full: list[tuple[int, float]] = []  # the last step before the disk was full, and when it was not
        self.number = 0
        self.num_submissions = 0
        self.num_released = 0
        self.overrides: tuple[str, ...] = ()
        self.submitted_at = 0.0

    def submit(self) -> None:
        self.number = self.cluster.submit(
            SCRIPT,
            self.output,
            (*LAYOUT, "--time=10:00:00"),
            *self.overrides,
            CONFIG=str(self.config),
            OUTPUT_DIR=str(self.run),
            EXIT_SECONDS="30",
        )
        self.num_submissions += 1

    def begin(self, num_steps: int) -> None:
        self.overrides = (f"schedule.steps={num_steps}",)
        self.submitted_at = time.time()
        self.submit()
        self.records.start()
        self._until(lambda job: self.records.first_after(0) is not None, "the run takes its first step")

    def job(self) -> Job:
        """The job; OverError if it is done, LostError if it has failed. One that was stopped goes on."""
        job = self.cluster.job(self.number)
        if job.state == "COMPLETED":
            raise OverError
        if job.state == "FAILED" and job.exit_code == "75:0":  # TERM: saved, and not requeued by itself
            self.submit()
            self.events[-1].submitted_again = True
            return self.cluster.job(self.number)
        if job.state in STOPPED:
            raise LostError(f"the job has ended: {job.state}, exit code {job.exit_code}")
        if job.state == "PENDING" and "held" in job.reason:
            # Slurm holds a job that it could not launch, as its node went away in that very moment
            self.cluster.control("scontrol", "release", str(self.number))
            self.num_released += 1
        return job

    def _until(
        self, holds: Callable[[Job], bool], what: str, seconds: float = BACK_SECONDS, pause: float = 0.5
    ) -> Job:
        deadline = time.monotonic() + seconds
        while not holds(job := self.job()):
            if time.monotonic() > deadline:
                raise LostError(f"{seconds:.0f} s have passed in vain until {what}: {job}")
            time.sleep(pause)
        return job

    # -- what is done to it -------------------------------------------------------------------------------

    def all_ranks(self, event: Event) -> dict[int, int]:
        """The process of each rank, as soon as all are there; the event begins then."""
        ranks: dict[int, int] = {}

        def are_there(job: Job) -> bool:
            ranks.clear()
            ranks.update(self.cluster.ranks(self.number))
            return len(ranks) == 2

        self._until(are_there, "both ranks have started")
        self._begins(event)
        return ranks

    def _begins(self, event: Event) -> None:
        event.at_seconds, event.attempt = round(time.time() - self.submitted_at, 1), newest_attempt(self.run)

    def _kill(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill_a_rank(self, event: Event) -> None:
        rank, pid = self.rng.choice(sorted(self.all_ranks(event).items()))
        event.details["rank"] = rank
        self._kill(pid, signal.SIGKILL)

    def kill_all_ranks(self, event: Event) -> None:
        for pid in self.all_ranks(event).values():
            self._kill(pid, signal.SIGKILL)

    def ask_all_to_save(self, event: Event) -> None:
        self.all_ranks(event)
        self.cluster.control("scancel", "--signal=USR1", str(self.number))

    def end_a_rank(self, event: Event) -> None:
        rank, pid = self.rng.choice(sorted(self.all_ranks(event).items()))
        event.details["rank"] = rank
        self._kill(pid, signal.SIGTERM)

    def cut_a_node(self, event: Event) -> None:
        name, seconds = self._a_node(event), self.rng.uniform(25.0, 40.0)
        self.cluster.node("cut", name)
        time.sleep(seconds)
        self.cluster.node("join", name)
        event.details["joined_after_seconds"] = round(seconds, 1)

    def power_off_a_node(self, event: Event) -> None:
        name, seconds = self._a_node(event), self.rng.uniform(5.0, 20.0)
        self.cluster.node("kill", name)
        time.sleep(seconds)
        self.cluster.node("boot", name)
        event.details["booted_after_seconds"] = round(seconds, 1)

    def _a_node(self, event: Event) -> str:
        nodes = self._until(lambda job: job.state == "RUNNING" and len(job.nodes) == 2, "the job runs").nodes
        self._begins(event)
        place = self.rng.randrange(2)
        event.details["node"] = "with rank 0" if place == 0 else "with rank 1"
        return nodes[place]

    def fill_the_disk(self, event: Event) -> None:
        assert self.disk is not None
        filler, first = self.disk / "filler", self.records.last_step(event.attempt)
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        with suppress(OSError), filler.open("ab", buffering=0) as file:  # the last pages
            while True:
                file.write(bytes(2**12))
        time.sleep(FULL_SECONDS)
        filler.unlink()
        self.full.append((first, time.time()))

    def freeze_a_rank(self, event: Event) -> None:
        rank, pid = self.rng.choice(sorted(self.all_ranks(event).items()))
        event.details["rank"] = rank
        self._kill(pid, signal.SIGSTOP)  # until somebody kills it

    def kill_and_damage(self, event: Event) -> None:
        ranks = self.all_ranks(event)
        for pid in ranks.values():
            self._kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()) and time.monotonic() < deadline:
            time.sleep(0.02)
        newest = next(iter(checkpoint.list_checkpoints(self.run)), None)
        if newest is None:
            event.details["damaged"] = None
            return
        name = self.rng.choice((checkpoint.STUDENT, checkpoint.OPTIMIZER, checkpoint.STATE))
        damage(newest / name, self.rng)
        event.details["damaged"] = f"{newest.name}/{name}"

    # -- how it comes back --------------------------------------------------------------------------------

    def strike(self, kind: str, while_starting: bool) -> Event:
        """Do something to the run and see it come back, or not wait for that."""
        event = Event(kind, while_starting)
        self._begins(event)
        self.events.append(event)
        KINDS[kind](self, event)
        logger.info("%6.0f s  %s %s", event.at_seconds, kind, event.details or "")
        return event

    def wait_for(self, event: Event) -> None:
        """Until the run has come back from an event."""
        newest = self._newest_step()
        restarts, ended = self.cluster.job(self.number).num_restarts, time.time()

        def has_survived(job: Job) -> bool:
            if job.state != "RUNNING" or job.num_restarts != restarts:
                return False
            if event.kind == FILL:
                return self._newest_step() > newest
            steps = self.records.steps.get(event.attempt, {})
            return event.kind == CUT and any(at > ended + HANG_SECONDS for at in list(steps.values()))

        def is_back(job: Job) -> bool:
            event.went_on = has_survived(job)
            return event.went_on or self.records.first_after(event.attempt) is not None

        self._until(is_back, "the run is back")
        self.note(event)
        if event.back_seconds is None:
            logger.info("          went on")
            return
        logger.info(
            "          back after %.0f s in attempt %d, %d steps to take again",
            event.back_seconds,
            event.back_in,
            event.num_lost_steps,
        )

    def _newest_step(self) -> int:
        return max(
            (checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(self.run)), default=0
        )

    def note(self, event: Event) -> None:
        """When, and from where, an attempt after the event took its first step."""
        back = self.records.first_after(event.attempt)
        if back is None or event.went_on:
            return
        event.back_in, at = back
        event.back_seconds = round(at - self.submitted_at - event.at_seconds, 1)
        event.num_lost_steps = self.records.taken_again(event.back_in)

    def unsettle(self, minutes: float, kinds: list[str]) -> None:
        """One event after another until the time is up; every kind comes as often as the others."""
        deadline = time.monotonic() + 60.0 * minutes
        bag: list[str] = []
        while_starting = False
        due = time.monotonic() + BETWEEN_SECONDS[0]
        while due < deadline:
            self._until_passed(due - time.monotonic())
            bag = bag or self.rng.sample(kinds, len(kinds))
            # what asks for a run that trains has to wait for one
            place = next((i for i, kind in enumerate(bag) if not while_starting or kind in AT_ANY_TIME), None)
            if place is None:
                self.wait_for(self.events[-1])
                place, while_starting = 0, False
            due = time.monotonic() + self.rng.uniform(*BETWEEN_SECONDS)
            event = self.strike(bag.pop(place), while_starting)
            # never two in a row: a run that is never left in peace gets nowhere
            is_going_on = while_starting or event.kind == FILL
            while_starting = not is_going_on and self.rng.random() < STARTING_RATIO
            if not while_starting:
                self.wait_for(event)
            due = max(due, time.monotonic() + self.rng.uniform(*PEACE_SECONDS))

    def _until_passed(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._until(lambda job: time.monotonic() >= until, "the next event", seconds + BACK_SECONDS)

    def end(self, seconds: float) -> None:
        """Let the run come to its end."""
        with suppress(OverError):
            self._until(lambda job: False, "the run has ended", seconds, pause=1.0)


FILL, CUT = "fill the disk for 15 s", "cut a node's network for 25 to 40 s"
KINDS: dict[str, Callable[[Chaos, Event], None]] = {
    "kill -9 a rank": Chaos.kill_a_rank,
    "kill -9 all ranks": Chaos.kill_all_ranks,
    "USR1 by scancel": Chaos.ask_all_to_save,
    "TERM to a rank": Chaos.end_a_rank,
    CUT: Chaos.cut_a_node,
    "power off a node": Chaos.power_off_a_node,
    FILL: Chaos.fill_the_disk,
    "freeze a rank": Chaos.freeze_a_rank,
    "kill, damage newest checkpoint": Chaos.kill_and_damage,
}
AT_ANY_TIME = ("kill -9 a rank", "kill -9 all ranks", "USR1 by scancel", CUT, "power off a node")


def damage(path: Path, rng: random.Random) -> None:
    """Turn one bit somewhere in a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def newest_attempt(run: Path) -> int:
    found = [int(path.stem) for path in (run / attempts.FOLDER).glob("[0-9]*.json")]
    return max(found, default=0)


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Tensors of the last student, teacher and optimizer that are not the same, bit for bit."""
    found = []
    (one, _), (other, _) = checkpoint.newest_valid(run), checkpoint.newest_valid(undisturbed)
    if one is None or other is None or checkpoint.step_of(one) != checkpoint.step_of(other):
        return [f"last checkpoint: {one and one.name}, undisturbed {other and other.name}"]
    for name in (checkpoint.STUDENT, checkpoint.TEACHER, checkpoint.OPTIMIZER):
        ours, theirs = load_file(one / name), load_file(other / name)
        if ours.keys() != theirs.keys():
            found.append(f"{name}: other tensors")
            continue
        found += [f"{name}: {key}" for key, value in ours.items() if not torch.equal(value, theirs[key])]
    return found


def differing_steps(records: Records, undisturbed: Records) -> list[int]:
    """Steps that were ever seen with other samples than in the undisturbed run."""
    expected = {step: samples for step, samples in undisturbed.samples.items() if samples}
    return sorted(step for step, samples in records.samples.items() if samples != expected.get(step))


def unrecorded(records: Records, num_steps: int, full: list[tuple[int, float]]) -> tuple[int, list[int]]:
    """How many steps have no record because the disk was full, and those that have none for no reason.

    full: the last step before each time that the disk was full, and the Unix time at which it no longer was.
    """
    missing = [step for step in range(1, num_steps + 1) if step not in records.samples]
    excused: set[int] = set()
    for first, freed in full:
        later = [
            step
            for steps in records.steps.values()
            for step, at in steps.items()
            if at > freed and step > first
        ]
        excused.update(step for step in missing if first < step < min(later, default=num_steps + 1))
    return len(excused), sorted(set(missing) - excused)


def read_records(run: Path) -> Records:
    records = Records(run / "metrics.jsonl")
    records.read()
    return records


def train_here(config: Path, run: Path, *overrides: str) -> float:
    """Two ranks on this machine, by nothing interrupted; gives the seconds of a step."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(OF_ANOTHER_JOB) and name not in OF_A_LAUNCHER
    }
    with run.with_suffix(".out").open("w") as output:
        subprocess.run(
            [
                *(sys.executable, "-m", "pretrain", "train", str(config), *overrides),
                *("--nproc", "2", "--output-dir", str(run)),
            ],
            env={**variables, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=True,
        )
    times = read_records(run).steps[1]
    first, last = min(times), max(times)
    return (times[last] - times[first]) / (last - first)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path | None]:
    """A file system of its own, so that it can be full; None where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        for _ in range(20):  # what runs on the nodes ends when they do
            if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.5)


def summary(chaos: Chaos) -> list[dict[str, Any]]:
    """Of each kind of event: how often, the median time until the first resumed step, steps taken again.

    An event that was followed by another before the run was back has no time of its own.
    """
    rows = []
    for kind in KINDS:
        events = [event for event in chaos.events if event.kind == kind]
        seconds = [event.back_seconds for event in events if event.back_seconds is not None]
        rows.append(
            {
                "kind": kind,
                "number": len(events),
                "went_on": sum(event.went_on for event in events),
                "struck_again_before_back": sum(
                    not event.went_on and event.back_in is None for event in events
                ),
                "median_back_seconds": round(statistics.median(seconds), 1) if seconds else None,
                "max_back_seconds": max(seconds, default=None),
                "steps_taken_again": sum(event.num_lost_steps for event in events),
            }
        )
    return rows


def told_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'event':<38}{'number':>7}{'went on':>9}{'median s':>10}{'max s':>8}{'steps again':>12}"]
    for row in rows:
        median, most = (
            "-" if row[name] is None else f"{row[name]:.0f}"
            for name in ("median_back_seconds", "max_back_seconds")
        )
        lines.append(
            f"{row['kind']:<38}{row['number']:>7}{row['went_on']:>9}{median:>10}{most:>8}"
            f"{row['steps_taken_again']:>12}"
        )
    return "\n".join(lines)


def outcomes(run: Path) -> list[dict[str, Any]]:
    """Every attempt: where it began and how it says it ended."""
    found = []
    for path in sorted((run / attempts.FOLDER).glob("[0-9]*.json")):
        with suppress(ValueError):
            record: Mapping[str, Any] = json.loads(path.read_text())
            found.append({name: record.get(name) for name in ("attempt", "began_from", "outcome", "step")})
    return found


def report(chaos: Chaos, undisturbed: Path, num_steps: int, step_seconds: float) -> dict[str, Any]:
    wall_seconds = time.time() - chaos.submitted_at
    told = chaos.output.read_text(errors="replace") if chaos.output.exists() else ""
    excused, absent = unrecorded(chaos.records, num_steps, chaos.full)
    return {
        "num_steps": num_steps,
        "undisturbed_step_seconds": round(step_seconds, 4),
        "wall_seconds": round(wall_seconds, 1),
        "goodput_ratio": round(num_steps * step_seconds / wall_seconds, 3),
        "events": len(chaos.events),
        "attempts": newest_attempt(chaos.run),
        "submissions": chaos.num_submissions,
        "released_from_hold": chaos.num_released,
        "steps_taken_again": sum(map(chaos.records.taken_again, sorted(chaos.records.steps))),
        "checkpoints_refused": sorted(
            set(re.findall(r"checkpoint rejected: \S*/(step-\S+: .*)", told)),
        ),
        "steps_unrecorded_on_full_disk": excused,
        "broken_records": chaos.records.num_broken,
        "steps_absent": absent,
        "steps_with_other_samples": differing_steps(chaos.records, read_records(undisturbed)),
        "tensors_that_differ": differences(chaos.run, undisturbed),
        "by_kind": summary(chaos),
        "attempt_files": outcomes(chaos.run),
        "log": [vars(event) for event in chaos.events],
    }


def put_through(
    work: Path, closing: ExitStack, minutes: float, seed: int, kinds: list[str]
) -> dict[str, Any]:
    make_shards(work / "shards", [48] * 4, height=48, width=48)
    config = work / "tiny.yaml"
    config.write_text(CONFIG.replace("SHARDS", str(work / "shards")))
    probed = train_here(config, work / "probe")
    num_steps = max(4 * EVERY_STEPS, int(BUSY_RATIO * 60.0 * minutes / probed))
    logger.info("%.3f s a step: %d steps; first undisturbed", probed, num_steps)
    undisturbed = work / "undisturbed"
    step_seconds = train_here(config, undisturbed, f"schedule.steps={num_steps}")
    # before the nodes are made, which see what is mounted by then
    disk = closing.enter_context(small_disk(work / "disk", DISK_BYTES))
    if disk is None:
        logger.info("no disk of limited size may be mounted here: none will be full")
    cluster = SlurmCluster(Path(os.environ["SLURM_TEST_CLUSTER"]).resolve(), work / "c")
    closing.callback(cluster.down)
    cluster.up()
    chaos = Chaos(cluster, config, work / "disk" / "run", work / "job.out", disk, seed)
    problem = None
    try:
        try:
            chaos.begin(num_steps)
            chaos.unsettle(minutes, [kind for kind in kinds if kind != FILL or disk])
        except OverError:
            logger.info("the run ended before the time was up")
        logger.info("no more events; the run goes on to its end")
        left = num_steps - chaos.records.last_step(newest_attempt(chaos.run))
        chaos.end(BACK_SECONDS + 4.0 * left * step_seconds)
    except LostError as error:
        problem = str(error)
    chaos.records.close()
    result = report(chaos, undisturbed, num_steps, step_seconds)
    if problem:
        told = chaos.output.read_text(errors="replace").replace(str(work), "")
        result = {"problem": problem, **result, "end_of_output": told.splitlines()[-60:]}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of events; the run goes on a while")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, ranks, nodes and pauses")
    parser.add_argument("--out", type=Path, required=True, help="where to write the result as JSON")
    parser.add_argument("--only", metavar="WORD", help="events whose name holds this regular expression")
    parser.add_argument("--keep", action="store_true", help="leave the run folder and the output")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    kinds = [kind for kind in KINDS if re.search(arguments.only or "", kind)]
    absent = why_absent() if kinds else f"--only {arguments.only}: none of {', '.join(KINDS)}"
    if absent:
        logger.info("chaos: %s", absent)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the cluster is taken down
    work = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: the path of a socket is made of it
    with ExitStack() as closing:
        if not arguments.keep:
            closing.callback(shutil.rmtree, work, ignore_errors=True)
        result = put_through(work, closing, arguments.minutes, arguments.seed, kinds)
        if arguments.keep:
            logger.info("kept: %s", work)
            shutil.copytree(work / "disk", work / "kept", dirs_exist_ok=True)
    result = {
        "command": f"python tests/cluster/chaos.py --minutes {arguments.minutes:g} --seed {arguments.seed}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        **result,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    logger.info("%s", told_table(result["by_kind"]))
    hidden = ("by_kind", "attempt_files", "log", "end_of_output", "command", "machine")
    for name, value in result.items():
        if name not in hidden:
            logger.info("%s: %s", name.replace("_", " "), value)
    for line in result.get("end_of_output", ()):
        logger.info("| %s", line)
    wrong = ("problem", "steps_absent", "steps_with_other_samples", "tensors_that_differ")
    return int(any(result.get(name) for name in wrong))


if __name__ == "__main__":
    sys.exit(main())
