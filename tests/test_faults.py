"""What a run does when something goes wrong: the fault catalogue, through the real command.

Numbers in docstrings are rows of that catalogue. An undisturbed run is what a disturbed one is compared with,
bit by bit.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fault_runs import ACCUMULATION_STEPS, Fault, Started, die_with_parent, fault
from fault_runs import start as start_ranks
from outcomes import assert_same_tensors, records
from safetensors.torch import load_file
from small_shards import make_shards, samples, write_shard

from pretrain import checkpoint
from pretrain.config import load_config
from pretrain.data.indexing import index_folder
from pretrain.data.loader import mixture_of, open_splits
from pretrain.metrics.exporter import PORT_TRIES

NUM_STEPS = 12
CONFIG = """
seed: 3
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 8, args: {depth: 1, embed_dim: 24, num_heads: 2}}
data: {shards: SHARDS, lanes: 12, shuffle_block: 4, resident: true}
views:
  one: &view {size_px: 32, turn: true, interpolation: bilinear}
  two: *view
tasks:
  contrastive: {hidden_dim: 32, out_dim: 16}
  rotation: {}
balance: {kind: fixed}
teacher: {momentum: 0.9}
optim: {base_lr: 0.02}
schedule: {steps: 12, warmup_steps: 2}
batch: {global_size: 24, accumulation_steps: 2}
engine: {precision: fp32, deepspeed: {zero_optimization: {stage: 0}}}
checkpoint: {every_steps: 2, keep_last: 20}
log: {every_steps: 1, prometheus: {enabled: false}}
watchdog: {enabled: false}
"""
LOCAL = "engine.kind=local"


class Runs:
    """Starts runs of one config, each in a folder of its own."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config = config
        self.folder = folder

    def start(
        self,
        run: str,
        *faults: Fault,
        ranks: int = 1,
        settings: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        of_rank: Mapping[int, Sequence[str]] | None = None,
        resume: str = "none",
    ) -> Started:
        """One rank trains with plain torch, several with DeepSpeed. of_rank: settings of single ranks."""
        arguments = ["train", str(self.config), "--output-dir", str(self.folder / run), "--resume", resume]
        arguments += [LOCAL] if ranks == 1 else []
        arguments += settings
        return start_ranks(arguments, self.folder, *faults, ranks=ranks, variables=variables, of_rank=of_rank)

    def go_on(self, run: str, *faults: Fault, **settings: Any) -> Started:
        return self.start(run, *faults, **settings, resume="auto")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write_shard(folder / f"images-{number}.tar", samples(number * 20, 20, height=32, width=32))
    index_folder(folder)
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(folder)))
    return path


@pytest.fixture
def runs(config: Path, tmp_path: Path) -> Runs:
    return Runs(config, tmp_path)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    Runs(config, folder).start("one").ends(0)
    return folder / "one"


@pytest.fixture(scope="module")
def whole_of_two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    Runs(config, folder).start("two", ranks=2).ends(0)
    return folder / "two"


def anomalies(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "anomalies.jsonl").read_text().splitlines()]


def digests(run: Path) -> list[float]:
    """Of the samples of each step."""
    assert [record["step"] for record in records(run)] == list(range(1, len(records(run)) + 1))
    return [record["samples"] for record in records(run)]


def steps_saved(run: Path) -> list[int]:
    return sorted(checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run))


def attempt(run: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "attempts" / f"{number:04d}.json").read_text())
    return found


def saved_at(run: Path, step: int) -> Path:
    """The newest checkpoint of a step, whichever attempt wrote it."""
    return next(f for f in checkpoint.list_checkpoints(run) if checkpoint.step_of(f) == step)


def assert_same_end(run: Path, other: Path) -> None:
    """The same samples in every step, and the same state after the last, bit by bit."""
    assert digests(run) == digests(other)
    assert len(digests(run)) == NUM_STEPS
    one, two = saved_at(run, NUM_STEPS), saved_at(other, NUM_STEPS)
    assert_same_tensors(one, two)
    guards = [json.loads((folder / checkpoint.STATE).read_text())["guard"] for folder in (one, two)]
    assert guards[0] == guards[1]


def assert_finite(folder: Path) -> None:
    for name in (checkpoint.STUDENT, checkpoint.TEACHER, checkpoint.OPTIMIZER):
        for key, value in load_file(folder / name).items():
            assert bool(torch.isfinite(value).all()), f"{name}: {key}"


def damage(folder: Path) -> None:
    """One bit of the weights of a checkpoint."""
    path = folder / checkpoint.STUDENT
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sample_ids(config: Path, data_step: int) -> list[int]:
    """Of a global batch, in the order in which one rank reads it."""
    settings = load_config(config)
    splits = open_splits(settings.data)
    size = settings.batch.global_size // ACCUMULATION_STEPS
    mixture = mixture_of(settings.data, splits, settings.seed, size)
    first = data_step * ACCUMULATION_STEPS
    return [
        sample
        for micro in range(first, first + ACCUMULATION_STEPS)
        for sample in mixture.batch(micro, 0, 1).sample_ids.tolist()
    ]


def assert_plain(started: Started) -> None:
    """What went wrong is told, not thrown."""
    assert "Traceback" not in started.all_output(), started.all_output()
    assert "Logging error" not in started.all_output(), started.all_output()


# -- the disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_goes_on_while_its_disk_is_full_and_saves_again_when_there_is_room(
    asynchronous: str, runs: Runs, whole: Path
) -> None:
    """Row 2."""
    settings = ["checkpoint.max_failures=5", f"checkpoint.asynchronous={asynchronous}"]
    run, full = runs.folder / "run", fault("full_disk", checkpoints=[4, 6])
    started = runs.start("run", full, fault("pace", seconds=0.05), settings=settings).ends(0)
    assert_same_end(run, whole)
    assert steps_saved(run) == [2, 8, 10, 12]
    assert not list((run / "checkpoints").glob(".writing*"))
    assert started.metric("pretrain_checkpoint_failures_total") == 2
    assert started.metric("pretrain_checkpoint_step") == 12
    for step in (4, 6):
        assert f"the checkpoint of step {step} was not written" in started.output()
    assert "No space left on device; training goes on" in started.output()
    assert_plain(started)


def test_a_run_stops_after_so_many_checkpoints_in_a_row_that_it_could_not_write(
    runs: Runs, whole: Path
) -> None:
    """Rows 2 and 47: the folder of the checkpoints vanishes for good, and for a while."""
    run, faults = runs.folder / "run", [fault("disk_away", from_step=3), fault("quick_retries")]
    settings = ["checkpoint.max_failures=3", "checkpoint.asynchronous=false"]
    started = runs.start("run", *faults, settings=settings).ends(1)
    last = started.output().splitlines()[-1]
    assert last.startswith("stopped: 3 checkpoints in a row could not be written: ")
    assert "is gone; bring back its disk or folder" in last
    assert "continue with --resume auto" in last
    assert digests(run) == digests(whole)[:9], "it failed at 4, 6 and 8, which step 9 told all ranks"
    assert started.metric("pretrain_checkpoint_failures_total") >= 3
    assert attempt(run, 1)["outcome"] == "failed"
    assert_plain(started)

    (run / "elsewhere").rename(run / "checkpoints")
    away = fault("disk_away", from_step=5, to_step=9)
    started = runs.go_on("run", away, settings=settings).ends(0)
    assert "resumed from" in started.output()
    assert_same_end(run, whole)
    assert steps_saved(run) == [2, 4, 10, 12]
    assert started.metric("pretrain_checkpoint_failures_total") == 2


def test_a_run_whose_last_checkpoint_cannot_be_written_has_failed(runs: Runs) -> None:
    """Row 2, at the end, where nothing comes after."""
    faults = [fault("full_disk", checkpoints=[12]), fault("quick_retries")]
    started = runs.start("run", *faults, settings=["checkpoint.max_failures=9"]).ends(1)
    assert started.output().count("trying again to write the checkpoint of step 12") == 3
    assert "stopped: the last checkpoint could not be written: " in started.output()
    assert steps_saved(runs.folder / "run") == [2, 4, 6, 8, 10]


def test_logs_that_cannot_be_written_are_told_once_and_stop_nothing(runs: Runs, whole: Path) -> None:
    """Row 48; anomalies.jsonl too, for which a step is spoilt."""
    spoilt = fault("spoil_loss", data_steps=[6])
    started = runs.start("run", fault("logs_fail", step=4), spoilt).ends(0)
    run = runs.folder / "run"
    for name in ("metrics.jsonl", "anomalies.jsonl", "train.log"):
        assert len(re.findall(rf"{name} cannot be written", started.output())) == 1, started.output()
    assert "step 12/12" in started.output()
    assert steps_saved(run) == [2, 4, 6, 8, 10, 12]
    assert_same_tensors(saved_at(run, 6), saved_at(whole, 6))
    assert attempt(run, 1)["outcome"] == "done"
    assert_plain(started)


@pytest.mark.parametrize("since", [{"from_step": 5}, {"writing": 6}], ids=["a step", "within a checkpoint"])
def test_a_run_whose_whole_folder_is_away_for_a_while_loses_nothing_but_lines_of_its_logs(
    since: dict[str, int], runs: Runs, whole: Path
) -> None:
    """Row 47: nothing is made anew in the place where the folder was."""
    away = fault("disk_away", **since, to_step=9, whole=True)
    started = runs.start("run", away, settings=["checkpoint.asynchronous=false"]).ends(0)
    run = runs.folder / "run"
    assert not (runs.folder / "elsewhere").exists()
    away_after = since.get("from_step", 6)
    assert [record["step"] for record in records(run)] == [*range(1, away_after + 1), 10, 11, 12]
    assert steps_saved(run) == [2, 4, 10, 12]
    assert_same_tensors(saved_at(run, 12), saved_at(whole, 12))
    assert started.metric("pretrain_checkpoint_failures_total") == 2
    assert len(re.findall(r"metrics.jsonl cannot be written", started.output())) == 1
    assert attempt(run, 1)["outcome"] == "done"
    assert_plain(started)


@pytest.mark.parametrize("file", ["student.safetensors", "optimizer.safetensors"])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    file: str, runs: Runs, whole: Path
) -> None:
    """Row 1, of a whole run: the files before the one under way are complete, or there are none."""
    run, dies = runs.folder / "run", fault("die_writing", step=6, file=file)
    runs.start("run", dies, fault("pace", seconds=0.05)).ends(-signal.SIGKILL)
    assert steps_saved(run) == [2, 4]
    assert len(list((run / "checkpoints").glob(f".writing-step-00000006-*/*/{file}"))) == 1
    started = runs.go_on("run").ends(0)
    assert "step-00000004 at step 4" in started.output()
    assert not list((run / "checkpoints").glob(".writing-*"))
    assert_same_end(run, whole)


@pytest.mark.parametrize("elsewhere", ["nowhere", "an empty mirror"])
@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("TERM", "attempt 1 came to step 7, and no checkpoint is here"),
        ("KILL", "attempt 1 trained here, and the folder of its checkpoints is gone"),
    ],
    ids=["TERM", "KILL"],
)
def test_a_run_that_has_lost_its_checkpoints_does_not_start_anew(
    ending: str, told: str, elsewhere: str, runs: Runs, whole: Path
) -> None:
    """Rows 4 and 47: at the next start their folder is not there, such as a disk that is not mounted."""
    run, stopped = runs.folder / "run", fault("send_signals", step=6, names=(ending,))
    runs.start("run", stopped, fault("pace", seconds=0.05)).ends(75 if ending == "TERM" else -signal.SIGKILL)
    (run / "checkpoints").rename(runs.folder / "elsewhere")
    before = (run / "metrics.jsonl").read_bytes()
    mirrored = [f"checkpoint.mirror={runs.folder / 'mirror'}"] if elsewhere != "nowhere" else []
    started = runs.go_on("run", settings=mirrored).ends(2)
    line = started.output().splitlines()[-1]
    assert line.startswith(f"pretrain: {run}: {told}")
    assert "bring it back, or start anew with another --output-dir" in line
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not (run / "checkpoints").exists()

    (runs.folder / "elsewhere").rename(run / "checkpoints")
    runs.go_on("run").ends(0)
    assert_same_end(run, whole)


@pytest.mark.parametrize("left", ["nothing", "damaged ones", "an older one", "an older one, and no mirror's"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_that_it_or_its_mirror_has(
    left: str, runs: Runs, whole: Path
) -> None:
    """Rows 3, 4 and 47: of steps 6 and 3 the run folder has lost or damaged one, or both."""
    run, mirror = runs.folder / "run", runs.folder / "mirror"
    settings = ["checkpoint.every_steps=3", f"checkpoint.mirror={mirror}"]
    runs.start("run", settings=settings).ends(0)
    for folder in (run / "checkpoints", mirror / "run"):
        for step in (9, 12):
            shutil.rmtree(folder / f"step-{step:08d}")
    if left == "nothing":
        shutil.rmtree(run / "checkpoints")
    else:
        damage(checkpoint.step_folder(run, 6))
    if left == "damaged ones":
        damage(checkpoint.step_folder(run, 3))
    if left.endswith("no mirror's"):
        damage(mirror / "run" / "step-00000006")
    begins = 3 if left.endswith("no mirror's") else 6

    started = runs.go_on("run", settings=settings).ends(0)
    fetched = f"step-{begins:08d} was fetched from {mirror}"
    assert (fetched in started.output()) == (begins == 6), started.output()
    assert f"resumed from {checkpoint.step_folder(run, begins)} at step {begins}" in started.output()
    assert f"{12 - begins} steps beyond the checkpoint are taken again" in started.output()
    assert attempt(run, 2)["began_from"]["step"] == begins
    assert_same_end(run, whole)
    assert not any(checkpoint.verify(saved_at(run, step)) for step in range(begins, NUM_STEPS + 1, 3))
    assert_plain(started)


def test_a_lost_run_folder_comes_back_from_the_mirror(runs: Runs, whole: Path) -> None:
    """Row 47, for good: what is left is on other storage."""
    run, mirrored = runs.folder / "run", f"checkpoint.mirror={runs.folder / 'mirror'}"
    kill = fault("send_signals", step=7, names=("KILL",))
    slow = fault("pace", seconds=0.1)
    runs.start("run", kill, slow, settings=[mirrored]).ends(-signal.SIGKILL)
    shutil.rmtree(run)
    started = runs.go_on("run", settings=[mirrored]).ends(0)
    assert "has no whole checkpoint: step-0000000" in started.output()
    assert f"was fetched from {runs.folder / 'mirror'}" in started.output()
    begun = attempt(run, 1)["began_from"]["step"]
    assert begun in (4, 6), "the last before the kill, or the one before"
    assert [record["samples"] for record in records(run)] == digests(whole)[begun:]
    assert_same_tensors(saved_at(run, 12), saved_at(whole, 12))


# -- signals, and who holds the run --------------------------------------------------------------------------


def fake_slurm(folder: Path) -> tuple[dict[str, str], Path]:
    """The variables of a job, and the file that takes down what `scontrol` was asked."""
    bin_folder, asked = folder / "bin", folder / "asked"
    bin_folder.mkdir()
    command = bin_folder / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    command.chmod(0o755)
    return {"SLURM_JOB_ID": "417", "PATH": f"{bin_folder}:{os.environ['PATH']}"}, asked


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_nothing_is_lost(
    runs: Runs, whole_of_two: Path
) -> None:
    """Rows 10 and 11: USR1 to rank 1, then TERM to rank 0, then to the end.

    Row 45: it goes on twice, the first time from the very end of an epoch.
    """
    slurm, asked = fake_slurm(runs.folder)
    run = runs.folder / "run"
    usr1 = fault("send_signals", on=1, step=4, names=("USR1",))
    late = fault("signal_at_end", signal_name="TERM")  # of Slurm, as soon as the job is requeued
    started = runs.start("run", usr1, late, ranks=2, variables=slurm).ends(75)
    told = "stopped: signal USR1: saved at step 5 of 12; slurm 417 was requeued; continue with --resume auto"
    assert started.output().splitlines()[-1] == told
    assert asked.read_text() == "requeue 417\n"
    assert steps_saved(run) == [2, 4, 5]
    assert records(run)[-1]["epoch"] == 2.0
    found = attempt(run, 1)
    assert (found["outcome"], found["step"]) == ("preempted", 5)
    assert_plain(started)

    term = fault("send_signals", on=0, step=8, names=("TERM",))
    started = runs.go_on("run", term, ranks=2, variables={**slurm, "SLURM_RESTART_COUNT": "1"}).ends(75)
    told = "stopped: signal TERM: saved at step 9 of 12; continue with --resume auto"
    assert started.output().splitlines()[-1] == told
    assert asked.read_text() == "requeue 417\n", "what a person has cancelled is not started again"

    started = runs.go_on("run", ranks=2, variables={**slurm, "SLURM_RESTART_COUNT": "2"}).ends(0)
    assert_same_end(run, whole_of_two)
    assert [attempt(run, number)["began_from"]["step"] for number in (1, 2, 3)] == [0, 5, 9]
    assert [record["attempt"] for record in records(run)] == [1] * 5 + [2] * 4 + [3] * 3


def test_a_second_signal_ends_a_run_at_once(runs: Runs) -> None:
    """Row 10: of another kind, while the step that the first waits for is under way."""
    both = fault("send_signals", step=4, names=("USR1", "TERM"))
    settings = ["checkpoint.asynchronous=false"]
    started = runs.start("run", both, settings=settings).ends(128 + signal.SIGTERM)
    assert "pretrain: SIGTERM after SIGUSR1: ends at once" in started.output()
    assert steps_saved(runs.folder / "run") == [2, 4]
    assert attempt(runs.folder / "run", 1)["outcome"] is None


def test_a_run_stops_by_itself_after_its_minutes_and_is_requeued(runs: Runs) -> None:
    """Row 10: the time limit, counted from the start of the process."""
    slurm, asked = fake_slurm(runs.folder)
    settings = ["preempt.max_minutes=0.05", "schedule.steps=100000", "checkpoint.every_steps=50000"]
    started = runs.start("run", settings=settings, variables=slurm).ends(75)
    told = re.search(
        r"stopped: time limit: saved at step (\d+) of 100000; slurm 417 was req", started.output()
    )
    assert told, started.output()
    assert steps_saved(runs.folder / "run") == [int(told[1])]
    assert asked.read_text() == "requeue 417\n"


def test_a_run_that_was_not_given_the_time_to_save_goes_on_from_its_last_checkpoint(
    runs: Runs, whole: Path
) -> None:
    """Row 12: TERM, and KILL before the step under way ends."""
    run, killed = runs.folder / "run", fault("send_signals", step=5, names=("TERM", "KILL"))
    settings = ["checkpoint.asynchronous=false"]  # so that the one of step 4 is there
    runs.start("run", killed, fault("pace", seconds=0.05), settings=settings).ends(-signal.SIGKILL)
    started = runs.go_on("run").ends(0)
    assert f"resumed from {run / 'checkpoints' / 'step-00000004'} at step 4" in started.output()
    assert "attempt 1" in started.output()
    assert "was not ended but is dead; taken over from" in started.output()
    assert "\n1 steps beyond the checkpoint are taken again" in started.output()
    assert_same_end(run, whole)


def test_a_run_that_gets_nowhere_is_not_started_for_ever(runs: Runs, whole: Path) -> None:
    """Row 13, and row 45: killed three times before its first checkpoint."""
    killed = fault("send_signals", step=1, names=("KILL",))
    for _ in range(3):
        runs.go_on("run", killed).ends(-signal.SIGKILL)
    started = runs.go_on("run", killed).ends(2)
    line = started.output().splitlines()[-1]
    assert "attempts 1, 2, 3 wrote no checkpoint beyond step 0" in line
    assert "guard.max_idle_attempts above 3" in line
    runs.go_on("run", settings=["guard.max_idle_attempts=4"]).ends(0)
    assert_same_end(runs.folder / "run", whole)


def test_a_run_folder_is_held_by_one_start_and_taken_over_from_a_dead_one(runs: Runs) -> None:
    """Row 9; and a start that has lost the folder to another ends by itself."""
    run, settings = runs.folder / "run", ["schedule.steps=100000"]
    slow, lease = fault("pace", seconds=0.05), fault("short_lease", seconds=1.2)
    first = runs.start("run", slow, lease, settings=settings)
    first.wait_for(lambda: len(records(run)) > 2)
    second = runs.go_on("run", settings=settings).ends(2)
    [line] = second.output().splitlines()
    assert line.startswith(f"pretrain: {run}: attempt 1 (pid {first.processes[0].pid} on ")
    assert "still runs there; wait for its end or stop it" in line

    seen = len(records(run))
    first.wait_for(lambda: len(records(run)) > seen)
    other = {**attempt(run, 1), "attempt": 2, "began_from": {"attempt": 1, "step": 2}}
    (run / "attempts" / "0002.json").write_text(json.dumps(other))
    first.ends(1, seconds=20)
    assert re.search(r"pretrain: attempt 2 \(.*\) has taken over this run; ends", first.output())
    assert attempt(run, 1)["outcome"] is None
    third = runs.go_on("run", fault("send_signals", step=100, names=("KILL",)), settings=settings)
    third.wait_for(lambda: "resumed from" in third.output())
    third.processes[0].kill()
    third.ends(-signal.SIGKILL)
    assert "attempt 2" in third.output()
    assert attempt(run, 3)["began_from"] == {"attempt": 1, "step": 2}


# -- ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_when_a_rank_dies_the_others_end_and_say_so(runs: Runs, whole_of_two: Path) -> None:
    """Row 14: as under srun, where nobody stops the others."""
    died = fault("end_process", on=1, step=3, code=7)
    started = runs.start("run", died, ranks=2).ends(1, 7)
    assert re.search(
        r"^stopped: step 4, rank 0: another rank has ended or does not answer", started.output(), re.MULTILINE
    )
    assert_plain(started)
    runs.go_on("run", ranks=2).ends(0)
    assert_same_end(runs.folder / "run", whole_of_two)


@pytest.mark.distributed
def test_a_rank_that_hangs_is_named_and_ends_the_run(runs: Runs) -> None:
    """Row 15: rank 1 waits for its data for ever; rank 0 waits for rank 1."""
    hangs = fault("slow_data", on=1, seconds=600.0, steps=[3])
    limits = ", ".join(f"{name}_seconds: 2.0" for name in ("data", "forward", "backward", "step"))
    settings = [f"watchdog={{enabled: true, grace_seconds: 5.0, {limits}}}"]
    started = runs.start("run", hangs, ranks=2, settings=settings).ends(-signal.SIGKILL)
    told = [line for line in started.all_output().splitlines() if "stacks of" in line]
    assert len(told) == 1, started.all_output()
    assert re.match(r"pretrain: rank 1 \(.*\) has been in 'data' of step 3 for \S+ s \(limit 2 s", told[0])
    health = runs.folder / "run" / "health" / "attempt-0001"
    assert "in slow" in (health / "rank-0001.stacks.txt").read_text()
    assert "train_step" in (health / "rank-0000.stacks.txt").read_text()


@pytest.mark.distributed
def test_a_slow_rank_is_named_and_measured_and_the_run_goes_on(runs: Runs) -> None:
    """Row 16, and row 18: a loss, and row 21: a gradient, that is not finite in one rank's share alone."""
    settings = ["guard.straggler={below: 0.6, window: 4}", "checkpoint.every_steps=1"]
    faults = [
        fault("slow_data", on=1, seconds=0.2),
        fault("spoil_loss", on=1, steps=[4]),
        fault("spoil_gradient", on=1, step=6),
    ]
    started = runs.start("run", *faults, ranks=2, settings=settings).ends(0)
    run = runs.folder / "run"
    assert re.search(r"^step \d+: rank 1 works at 0\.\d\d of the speed of the others", started.output(), re.M)
    assert "rank 0 works at" not in started.output()
    assert started.metric("pretrain_rank_speed_ratio", rank=1) < 0.6
    assert started.metric("pretrain_rank_speed_ratio", rank=0) > 1.0

    assert [record["step"] for record in records(run) if record["skipped_steps"]] == [5, 7]
    assert started.metric("pretrain_nonfinite_steps_total") == 2
    for step in (5, 7):
        assert_same_tensors(saved_at(run, step - 1), saved_at(run, step))
        with pytest.raises(AssertionError):
            assert_same_tensors(saved_at(run, step), saved_at(run, step + 1))
    noted = anomalies(run)
    assert [(found["step"], found["kind"]) for found in noted] == [(5, "not finite"), (7, "not finite")]
    for found in noted:
        assert sorted(found["sample_ids"]) == sorted(sample_ids(runs.config, found["step"] - 1))


@pytest.mark.distributed
def test_one_rank_without_memory_ends_all_and_says_what_needs_less(runs: Runs) -> None:
    """Row 23."""
    started = runs.start("run", fault("out_of_memory", on=1, step=3), ranks=2).ends(1)
    [line] = started.output(1).splitlines()
    assert line.startswith("stopped: step 4, rank 1: memory of ") or line.startswith(
        "stopped: step 4, rank 1: host memory ran out (OutOfMemoryError, tried to allocate 2.00 GiB)"
    )
    assert "micro batch 6 = global batch 24 / accumulation 2 / ranks 2" in line
    assert "engine.recompute=true" in line
    assert "stopped: step 4, rank 0: another rank has ended" in started.output()
    assert_plain(started)


@pytest.mark.distributed
def test_ranks_with_different_software_do_not_start(runs: Runs) -> None:
    """Row 42."""
    started = runs.start("run", fault("other_software", on=1), ranks=2).ends(2)
    for rank in (0, 1):
        line = started.output(rank).splitlines()[-1]
        assert "timm: differs between ranks: " in line
        assert "0.0.1 on rank 1 on " in line
    assert not (runs.folder / "run" / "checkpoints").exists() or not steps_saved(runs.folder / "run")
    assert_plain(started)


def assert_both_refuse(started: Started, told: str) -> None:
    for rank in (0, 1):
        line = started.output(rank).splitlines()[-1]
        assert line.startswith(f"pretrain: {'rank 1: ' if rank else ''}{told}: differs between ranks: "), line
        assert " on rank 0 on " in line
        assert " on rank 1 on " in line
        assert line.endswith("; give every rank the same software, configuration and data")
    assert_plain(started)


@pytest.mark.distributed
def test_ranks_with_different_settings_do_not_start(runs: Runs) -> None:
    """Row 42: a launcher that gave one rank another command."""
    started = runs.start("run", ranks=2, of_rank={1: ["optim.base_lr=0.01"]}).ends(2)
    assert_both_refuse(started, "configuration")
    assert not records(runs.folder / "run")


@pytest.mark.distributed
def test_ranks_with_different_shards_do_not_start(runs: Runs) -> None:
    """Row 42: the same path, below which each node has other images."""
    nodes = [runs.folder / name for name in ("one", "other")]
    make_shards(nodes[0] / "shards", [20, 20, 20], height=32, width=32)
    make_shards(nodes[1] / "shards", [20, 21, 19], height=32, width=32)
    apart = fault("work_in", folders=[str(node) for node in nodes])
    started = runs.start("run", apart, ranks=2, settings=["data.shards=shards"]).ends(2)
    assert_both_refuse(started, "index of shards (train)")
    assert not records(runs.folder / "run")


@pytest.mark.distributed
def test_a_run_that_goes_on_with_other_numbers_of_ranks_reads_the_same_samples(
    runs: Runs, whole: Path
) -> None:
    """Row 6: on 4 ranks, then on 2, then on 3."""
    run = runs.folder / "run"
    for ranks, step in ((4, 4), (2, 8)):
        stopped = fault("send_signals", on=0, step=step, names=("TERM",))
        runs.go_on("run", stopped, ranks=ranks).ends(75, seconds=120)
    runs.go_on("run", ranks=3).ends(0, seconds=120)
    assert [attempt(run, number)["began_from"]["step"] for number in (1, 2, 3)] == [0, 5, 9]
    assert [record["attempt"] for record in records(run)] == [1] * 5 + [2] * 4 + [3] * 3
    assert digests(run) == digests(whole)
    # of the first step to the last digits; Adam then magnifies the rounding of gradients near zero
    for found, wanted in zip(records(run), records(whole), strict=True):
        assert found["total"] == pytest.approx(wanted["total"], rel=1e-5 if found["step"] == 1 else 1e-2)


@pytest.mark.distributed
@pytest.mark.parametrize("part", ["student", "teacher"])
def test_a_rank_whose_weights_drift_is_named(part: str, runs: Runs) -> None:
    """Row 50: one bit, in one of three ranks."""
    drifts = fault("drift", on=1, after_step=4, part=part)
    started = runs.start("run", drifts, ranks=3, settings=["guard.checksum_every_steps=1"]).ends(1)
    for rank in range(3):
        line = started.output(rank).splitlines()[-1]
        assert line.startswith("stopped: step 5: the weights of rank 1 are not those of the others")
    assert steps_saved(runs.folder / "run") == [2, 4]


# -- the training itself -------------------------------------------------------------------------------------


def assert_passed_over(run: Path, whole: Path, first: int, last: int) -> None:
    """Data steps first to last were left out: every other step has the samples of an undisturbed run."""
    found, expected = digests(run), digests(whole)
    left = [*expected[:first], *expected[last + 1 :]]
    assert found[: len(left)] == left
    assert len(found) == NUM_STEPS


INLINE = ("data.resident=false", "data.decode_threads=0")


def test_a_run_goes_back_passes_over_what_spoilt_it_and_can_be_resumed_at_any_moment(
    runs: Runs, whole: Path
) -> None:
    """Row 19: three steps in a row whose data give NaN.

    The checkpoint of step 4 is of the time when one of them had been skipped; the run goes back to step 2 and
    writes it anew.
    """
    settings = ["guard.max_nonfinite_steps=3", *INLINE]
    poison = fault("spoil_loss", data_steps=[3, 4, 5])
    started = runs.start("one", poison, settings=settings).ends(0)
    one = runs.folder / "one"
    assert "went back to step 2 (" in started.output()
    assert "the samples of steps 4 to 6 are passed over (1 of 2 times)" in started.output()
    assert_passed_over(one, whole, 3, 5)
    assert started.metric("pretrain_rollbacks_total") == 1
    assert steps_saved(one) == [2, 4, 6, 8, 10, 12]
    assert started.output().count("checkpoint of step 2 written") == 1
    assert all(not checkpoint.verify(folder) for folder in checkpoint.list_checkpoints(one))
    noted = anomalies(one)
    kinds = [(found["step"], found["kind"]) for found in noted]
    assert kinds == [*((step, "not finite") for step in (4, 5, 6)), (3, "went back")]
    assert [found["sample_ids"] for found in noted[:3]] == [sample_ids(runs.config, s) for s in (3, 4, 5)]
    assert not any(record["skipped_steps"] for record in records(one))
    assert_plain(started)

    # stopped twice since: right after it went back, before any new checkpoint, and at a later step
    other = runs.folder / "other"
    killed = fault("send_signals", data_step=6, names=("KILL",))
    slow = fault("pace", seconds=0.05)
    runs.start("other", poison, killed, slow, settings=settings).ends(-signal.SIGKILL)
    assert steps_saved(other) == [2]
    stopped = fault("send_signals", step=6, names=("TERM",))
    started = runs.go_on("other", poison, stopped, settings=settings).ends(75)
    assert "went back" not in started.output(), "what is passed over outlives the process"
    runs.go_on("other", poison, settings=settings).ends(0)
    assert_same_end(other, one)


@pytest.mark.parametrize(("after_step", "every_steps"), [(4, 4), (4, 2), (5, 2), (7, 4)])
def test_a_run_whose_weights_are_spoilt_goes_back_and_never_to_such_weights(
    after_step: int, every_steps: int, runs: Runs, whole: Path
) -> None:
    """Row 19: NaN in the student, which would land in no checkpoint, or in one before the run goes back."""
    settings = ["guard.max_nonfinite_steps=2", f"checkpoint.every_steps={every_steps}"]
    started = runs.start("run", fault("spoil_weights", after_step=after_step), settings=settings).ends(0)
    run = runs.folder / "run"
    assert "went back to step 4 (" in started.output()
    assert started.metric("pretrain_rollbacks_total") == 1
    spoilt = [step for step in range(after_step + 1, after_step + 3) if step % every_steps == 0]
    assert started.metric("pretrain_checkpoint_failures_total") == len(spoilt)
    for step in spoilt:
        assert f"the checkpoint of step {step} was not written" in started.output()
        assert f"in {checkpoint.STUDENT} is not finite" in started.output()
    assert_passed_over(run, whole, after_step + 1, after_step + 2)
    assert steps_saved(run) == list(range(every_steps, NUM_STEPS + 1, every_steps))
    for folder in checkpoint.list_checkpoints(run):
        assert_finite(folder)
    assert_plain(started)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_go_back_together_where_the_loss_of_one_is_spoilt(runs: Runs, whole_of_two: Path) -> None:
    """Row 19, with DeepSpeed: weights, optimizer, teacher and loader are put back in place."""
    poison = fault("spoil_loss", on=1, data_steps=[5, 6])
    settings = ["guard.max_nonfinite_steps=2", "engine.deepspeed.zero_optimization.stage=1", *INLINE]
    started = runs.start("run", poison, ranks=2, settings=settings).ends(0)
    assert "went back to step 4 (" in started.output()
    assert_passed_over(runs.folder / "run", whole_of_two, 5, 6)
    again = runs.start("again", poison, ranks=2, settings=settings).ends(0)
    assert again.metric("pretrain_rollbacks_total") == 1
    assert_same_end(runs.folder / "again", runs.folder / "run")


def test_a_run_that_stays_spoilt_stops_after_so_many_times(runs: Runs) -> None:
    """Row 19: the fault is not in the data, so that passing over them does not help."""
    settings = ["guard.max_nonfinite_steps=2", "guard.max_rollbacks=2"]
    started = runs.start("run", fault("spoil_loss", steps=range(5, 100)), settings=settings).ends(1)
    last = started.output().splitlines()[-1]
    assert last.startswith("stopped: step 7: 2 steps in a row were not finite")
    assert last.endswith("after going back 2 times")
    assert started.metric("pretrain_rollbacks_total") == 2
    assert json.loads((runs.folder / "run" / "rollbacks.json").read_text())["passed_over"] == [[5, 8]]
    # the count outlives the process: it does not begin again
    started = runs.go_on("run", fault("spoil_loss", steps=range(5, 100)), settings=settings).ends(1)
    assert started.output().splitlines()[-1].endswith("after going back 2 times")
    assert "went back" not in started.output()


def test_a_run_that_has_nothing_to_go_back_to_says_so(runs: Runs) -> None:
    """Row 19, before the first checkpoint."""
    spoilt = fault("spoil_loss", data_steps=[0, 1])
    started = runs.start("run", spoilt, settings=["guard.max_nonfinite_steps=2"]).ends(1)
    assert "stopped: step 2: there is no checkpoint to go back to" in started.output()
    last = (runs.folder / "run" / "train.log").read_text().splitlines()[-1]
    assert " stopped: step 2: there is no checkpoint to go back to" in last


LATE = fault("numbers_come_late")


def test_numbers_that_come_a_step_late_change_nothing(runs: Runs, whole: Path) -> None:
    runs.start("run", LATE, settings=["checkpoint.every_steps=5"]).ends(0)
    run = runs.folder / "run"
    assert digests(run) == digests(whole)
    timeless = ("total", "grad_norm", "lr", "momentum", "backbone_calls", "feature_std")
    for found, expected in zip(records(run), records(whole), strict=True):
        assert {name: found[name] for name in timeless} == {name: expected[name] for name in timeless}
    assert_same_but_for_rounding(run, whole)


def assert_same_but_for_rounding(run: Path, other: Path) -> None:
    """The teacher's average is a sum of two products there, and the device decides whether it moves."""
    one, two = (checkpoint.list_checkpoints(folder)[0] for folder in (run, other))
    assert_same_tensors(one, two, checkpoint.STUDENT, checkpoint.OPTIMIZER)
    found, expected = (load_file(folder / checkpoint.TEACHER) for folder in (one, two))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_a_run_goes_back_a_step_late_to_the_same_place(runs: Runs, whole: Path) -> None:
    """The step that was taken before it was known leaves no trace: its samples come again."""
    settings = ["guard.max_nonfinite_steps=3", "checkpoint.every_steps=3", *INLINE]
    poison = fault("spoil_loss", data_steps=[3, 4, 5, 6])
    runs.start("early", poison, settings=settings).ends(0)
    started = runs.start("late", poison, LATE, settings=settings).ends(0)
    assert "the samples of steps 4 to 6 are passed over (1 of 2 times)" in started.output()
    late, early = runs.folder / "late", runs.folder / "early"
    assert digests(late) == digests(early)
    assert_same_but_for_rounding(late, early)
    noted = [(found["step"], found["kind"]) for found in anomalies(late)]
    assert noted == [(found["step"], found["kind"]) for found in anomalies(early)]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_that_is_known_a_step_late_stops_all_ranks_together(runs: Runs, whole_of_two: Path) -> None:
    term = fault("send_signals", on=0, step=4, names=("TERM",))
    settings = ["checkpoint.every_steps=50"]
    started = runs.start("run", LATE, term, ranks=2, settings=settings).ends(75)
    assert "stopped: signal TERM: saved at step 6 of 12" in started.output()
    runs.go_on("run", LATE, ranks=2, settings=settings).ends(0)
    assert digests(runs.folder / "run") == digests(whole_of_two)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_a_spike_that_is_known_a_step_late_is_acted_on(action: str, runs: Runs, whole: Path) -> None:
    spike = f"guard.loss_spike={{window: 8, min_steps: 4, threshold: 30.0, action: {action}}}"
    spoilt = fault("spoil_loss", data_steps=[6], factor=100.0)
    started = runs.start("run", LATE, spoilt, settings=[spike]).ends(1 if action == "stop" else 0)
    run = runs.folder / "run"
    assert anomalies(run)[0]["sample_ids"] == sample_ids(runs.config, 6)
    if action == "rollback":
        assert_passed_over(run, whole, 6, 6)
    else:
        assert "stopped: step 7: the loss is" in started.output()
        assert steps_saved(run) == [2, 4, 6]


@pytest.mark.parametrize("action", ["log", "rollback", "stop"])
def test_a_loss_spike_is_told_with_its_samples_and_acted_on(action: str, runs: Runs, whole: Path) -> None:
    """Row 20: a loss times 100, in one step."""
    spike = f"guard.loss_spike={{window: 8, min_steps: 4, threshold: 30.0, action: {action}}}"
    spoilt = fault("spoil_loss", data_steps=[7], factor=100.0)
    started = runs.start("run", spoilt, settings=[spike]).ends(1 if action == "stop" else 0)
    run = runs.folder / "run"
    assert re.search(r"^(stopped: )?step 8: the loss is .* scaled deviations above", started.output(), re.M)
    found = anomalies(run)[0]
    assert (found["step"], found["kind"]) == (8, "loss spike")
    assert found["score"] > 30
    assert found["sample_ids"] == sample_ids(runs.config, 7)
    if action == "log":
        assert digests(run) == digests(whole)
    elif action == "rollback":
        assert "went back to step 6 (" in started.output()
        assert_passed_over(run, whole, 7, 7)
        assert all(math.isfinite(record["total"]) and record["total"] < 50 for record in records(run))
    else:
        assert steps_saved(run) == [2, 4, 6]


@pytest.mark.parametrize("action", ["log", "stop"])
def test_collapsed_features_are_told_and_may_end_the_run(action: str, runs: Runs) -> None:
    """Row 22: the encoder gives the same for every image."""
    settings = [f"guard.collapse={{min_feature_std: 0.02, patience_steps: 3, action: {action}}}"]
    same = fault("constant_features", from_step=4)
    started = runs.start("run", same, settings=settings).ends(1 if action == "stop" else 0)
    told = r"step 7: features of different images have been nearly the same for 3 steps \(feature_std 0\.00"
    assert len(re.findall(told, started.output())) == 1
    assert started.metric("pretrain_feature_std") < 0.02
    assert [(found["step"], found["kind"]) for found in anomalies(runs.folder / "run")] == [(7, "collapse")]
    if action == "stop":
        assert steps_saved(runs.folder / "run") == [2, 4, 6]


def test_a_task_that_trains_nothing_is_refused_unless_that_is_meant(runs: Runs) -> None:
    """Row 49."""
    started = runs.start("run", settings=["tasks.rotation.weight=0"]).ends(2)
    line = started.output().splitlines()[-1]
    assert line.startswith("pretrain: tasks: ")
    assert "trained parameters got no gradient in the first step ('tasks.rotation." in line
    assert "engine.allow_without_gradient" in line
    meant = ["tasks.rotation.weight=0", 'engine.allow_without_gradient=["*rotation*"]', "schedule.steps=3"]
    runs.start("meant", settings=meant).ends(0)


def test_a_run_goes_on_with_another_task_only_when_told(runs: Runs, whole: Path) -> None:
    """Row 7, through the command."""
    run, changed = runs.folder / "run", ["tasks.contrastive.temperature=0.3"]
    runs.start("run", settings=["schedule.steps=4"]).ends(0)
    refused = runs.go_on("run", settings=changed).ends(2)
    assert "tasks.contrastive.temperature: was " in refused.output()
    assert "--allow-change tasks" in refused.output()
    started = runs.go_on("run", settings=[*changed, "--allow-change", "tasks"]).ends(0)
    assert re.search(r"changed since then: .*schedule.steps: was 4, now 12", started.output())
    assert digests(run) == digests(whole), "the place in the data is kept"
    with pytest.raises(AssertionError):
        assert_same_tensors(saved_at(run, 12), saved_at(whole, 12), checkpoint.STUDENT)
    assert yaml.safe_load((run / "config.yaml").read_text())["tasks"]["contrastive"]["temperature"] == 0.3


# -- clocks, and who looks on ------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_and_forth_changes_nothing(runs: Runs, whole: Path) -> None:
    """Row 40: by hours and days, all the time, and through a resume."""
    run, jumps = runs.folder / "run", fault("clock_jumps", seconds=3600.0)
    runs.start("run", jumps, fault("send_signals", step=6, names=("TERM",))).ends(75)
    started = runs.go_on("run", jumps).ends(0)
    assert_same_end(run, whole)
    assert all(0 < record["step_seconds"] < 60 for record in records(run))
    assert all(0 <= record["data_wait_seconds"] < 60 for record in records(run))
    times = [record["unix_time"] for record in records(run)]
    assert max(times) - min(times) > 86400, "the clock was meant to jump"
    seconds = re.findall(r"checkpoint of step \d+ written in (\S+) s", started.output())
    assert all(0 <= float(each) < 60 for each in seconds)
    assert started.metric("pretrain_step_seconds_sum") < 60
    assert_plain(started)


@pytest.mark.parametrize("port", ["some port", "the last port"])
def test_a_run_whose_port_for_metrics_is_taken_trains_as_ever(port: str, runs: Runs, whole: Path) -> None:
    """Row 39: the next port is taken or, where there is none, metrics are not served."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0 if port == "some port" else 65535))
        held.listen()
        taken = held.getsockname()[1]
        settings = [f"log.prometheus={{enabled: true, port: {taken}}}"]
        started = runs.start("run", settings=settings).ends(0)
    served = re.search(r"^metrics at http://127\.0\.0\.1:(\d+)/metrics$", started.output(), re.MULTILINE)
    if port == "some port":
        assert served, started.output()
        assert taken < int(served[1]) < taken + PORT_TRIES
    else:
        assert served is None
        assert "metrics of rank 0 are not served: 127.0.0.1:65535: Address already in use" in started.output()
    assert started.metric("pretrain_steps_total") == NUM_STEPS
    assert_same_end(runs.folder / "run", whole)


# -- as a user starts it: the launcher, loader processes, watchdogs ------------------------------------------


STREAMED = ("--nproc", "2", "data.resident=false", "data.decode_threads=1", "watchdog.enabled=true")


def launch(config: Path, run: Path, *more: str) -> subprocess.Popen[bytes]:
    """`python -m pretrain train --nproc 2`, in a process group of its own."""
    command = [sys.executable, "-m", "pretrain", "train", str(config), "--output-dir", str(run), *STREAMED]
    with (run.parent / "launched.out").open("ab") as log:
        return subprocess.Popen(
            [*command, *more],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not records(run) or records(run)[-1]["step"] < step:
        assert time.monotonic() < deadline, "the run does not come there"
        assert process.poll() is None, (run.parent / "launched.out").read_text()[-3000:]
        time.sleep(0.02)


def processes_of(group: int) -> list[str]:
    """Command lines of the processes of a group that live."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if folder.name.isdecimal() and int(fields[2]) == group and fields[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_all_processes_of_a_run_saves_and_ends_it(name: str, runs: Runs) -> None:
    """Row 10: launcher, ranks, loaders and watchdogs all get it, as Slurm sends it."""
    whole, run, long = runs.folder / "whole", runs.folder / "run", "schedule.steps=3000"
    process = launch(runs.config, run, long)
    wait_for_step(process, run, 5)
    os.killpg(process.pid, signal.Signals[f"SIG{name}"])
    code = process.wait(120)
    told = (runs.folder / "launched.out").read_text()
    assert code == 75, told[-3000:]
    assert "Traceback" not in told
    assert processes_of(process.pid) == []
    stopped = re.search(rf"stopped: signal {name}: saved at step (\d+) of 3000", told)
    assert stopped
    assert steps_saved(run)[-1] == int(stopped[1])
    # the same, not disturbed, as far as both go
    steps = f"schedule={{kind: constant, steps: {int(stopped[1]) + 3}}}"
    for folder, resume in ((run, "auto"), (whole, "none")):
        changed = launch(runs.config, folder, steps, "--resume", resume)
        assert changed.wait(240) == 0, (runs.folder / "launched.out").read_text()[-3000:]
    assert digests(run) == digests(whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_ends_the_launcher_and_leaves_no_process(runs: Runs) -> None:
    """Row 14: SIGKILL to one rank, as the kernel does it when memory is short."""
    run = runs.folder / "run"
    process = launch(runs.config, run, "schedule.steps=1000")
    wait_for_step(process, run, 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL
    told = (runs.folder / "launched.out").read_text()
    assert "pretrain: rank 1 was killed by SIGKILL (out of memory? see dmesg)" in told
    assert "Traceback" not in told
    time.sleep(1.0)  # what belonged to the killed rank sees that it is gone
    assert processes_of(process.pid) == []
