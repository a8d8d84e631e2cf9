"""Through `sbatch slurm/pretrain_vitb.sh`: they train, stop, go on and fail as they should."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import assert_same_tensors, digests, last_step
from safetensors.torch import load_file
from slurm_cluster import REPOSITORY, Job, SlurmCluster, end

from pretrain import checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]

SCRIPT = REPOSITORY / "slurm" / "pretrain_vitb.sh"
START_SECONDS = 600.0  # for ranks to import torch and DeepSpeed and take a first step on a busy machine
# two ranks, so that two cores are enough; the third node is there to go on with when one is lost
LAYOUT = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2")
NUM_STEPS = 200
INTERVAL = 20
LONG = (f"schedule.steps={NUM_STEPS}", f"checkpoint.every_steps={INTERVAL}")


class Run:
    """A job and its run folder."""

    def __init__(self, cluster: SlurmCluster, config: Path, folder: Path) -> None:
        self.cluster, self.config, self.folder = cluster, config, folder
        self.output = folder.with_suffix(".out")
        self.number = 0

    def submit(
        self,
        *overrides: str,
        flags: tuple[str, ...] = (),
        folder: Path = REPOSITORY,
        **variables: str,
    ) -> Run:
        variables = {"CONFIG": str(self.config), "OUTPUT_DIR": str(self.folder), **variables}
        flags = (*LAYOUT, *flags)
        self.number = self.cluster.submit(SCRIPT, self.output, flags, *overrides, folder=folder, **variables)
        return self

    @property
    def told(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def until(self, holds: Callable[[Job], bool], seconds: float = START_SECONDS) -> Job:
        try:
            return self.cluster.wait(self.number, seconds, holds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.told[-5000:]}") from None

    def until_step(self, step: int) -> None:
        self.until(lambda job: last_step(self.folder) >= step or job.state in ("FAILED", "COMPLETED"))
        assert last_step(self.folder) >= step, self.told[-5000:]

    def end(self, seconds: float = START_SECONDS) -> Job:
        """Its end for good: a job that waits to be started again has not ended."""
        try:
            return self.cluster.wait(self.number, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.told[-5000:]}") from None

    def completes(self, seconds: float = START_SECONDS) -> Job:
        job = self.end(seconds)
        assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), self.told[-5000:]
        return job

    def signal(self, name: str) -> None:
        self.cluster.control("scancel", f"--signal={name}", str(self.number))


@pytest.fixture
def run(cluster: SlurmCluster, config: Path, tmp_path: Path) -> Run:
    return Run(cluster, config, tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(a_cluster: SlurmCluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run, by nothing interrupted."""
    run = Run(a_cluster, config, tmp_path_factory.mktemp("undisturbed") / "run").submit(*LONG)
    run.completes()
    return run.folder


@pytest.fixture(scope="module")
def by_four_ranks(a_cluster: SlurmCluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """12 steps of 2 nodes x 2 ranks, DeepSpeed, images streamed."""
    run = Run(a_cluster, config, tmp_path_factory.mktemp("four") / "run")
    flags = ("--ntasks-per-node=2", "--gpus-per-node=2")
    run.submit(flags=flags, OVERRIDES="data.resident=false")
    run.completes()
    return run


def newest(folder: Path) -> Path:
    found, _ = checkpoint.newest_valid(folder)
    assert found is not None
    return found


def assert_same_result(one: Path, other: Path) -> None:
    """The same samples at every step, and the same bits at the end."""
    assert digests(one) == digests(other)
    assert_same_tensors(newest(one), newest(other))


def test_two_nodes_train_to_the_end_with_a_task_for_each_gpu(by_four_ranks: Run) -> None:
    told = by_four_ranks.told
    assert re.search(r"restarted 0 times, on node\[\d-\d\]", told)
    assert "2 nodes x 2 tasks, 2 GPUs a node, 2 CPUs a task; rank 0 at node" in told
    assert "2 nodes x 2 ranks on cpu (srun); deepspeed ZeRO-1" in told
    assert sorted(digests(by_four_ranks.folder)) == list(range(1, 13))
    assert checkpoint.step_of(newest(by_four_ranks.folder)) == 12


@pytest.mark.parametrize(
    ("num_nodes", "tasks"), [(1, 2), pytest.param(3, 1, marks=pytest.mark.slow), (1, 1)], ids=["2", "3", "1"]
)
def test_a_run_of_four_ranks_goes_on_with_the_same_samples_on_fewer(
    by_four_ranks: Run, run: Run, num_nodes: int, tasks: int
) -> None:
    """Fault catalogue row 6, through sbatch."""
    half = next(c for c in checkpoint.list_checkpoints(by_four_ranks.folder) if checkpoint.step_of(c) == 6)
    shutil.copytree(half, run.folder / checkpoint.FOLDER / half.name)
    flags = (f"--nodes={num_nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}")
    run.submit("data.resident=false", flags=flags)
    run.completes()
    expected = {step: value for step, value in digests(by_four_ranks.folder).items() if step > 6}
    assert digests(run.folder) == expected
    ours, theirs = (
        load_file(newest(folder) / checkpoint.STUDENT) for folder in (run.folder, by_four_ranks.folder)
    )
    for name, value in theirs.items():  # other sums, in another order
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def test_a_signal_ahead_of_the_time_limit_saves_and_requeues_and_nothing_differs(
    undisturbed: Path, run: Run
) -> None:
    """Fault catalogue row 10, through sbatch: USR1 as `--signal` sends it, to the tasks alone."""
    run.submit(*LONG, "checkpoint.every_steps=1000")
    run.until_step(10)
    run.signal("USR1")
    job = run.completes(2 * START_SECONDS)
    assert job.num_restarts == 1
    assert "slurm: failed" not in run.told
    resumed = re.search(r"resumed from .* at step (\d+)", run.told)
    assert resumed is not None  # from what the signal made it write, as nothing else was written yet
    assert 10 <= int(resumed[1]) < NUM_STEPS
    assert_same_result(run.folder, undisturbed)


@pytest.mark.slow
def test_the_time_limit_itself_requeues_and_nothing_differs(run: Run, tmp_path: Path) -> None:
    """Fault catalogue row 10: Slurm sends the signal, and the job goes on as if it had never been stopped.

    It looks every half a minute whether a signal is due, so this run is longer than the others.
    """
    cluster, longer = run.cluster, (f"schedule.steps={6 * NUM_STEPS}", "checkpoint.every_steps=1000")
    undisturbed = Run(cluster, run.config, tmp_path / "undisturbed").submit(*longer)
    undisturbed.completes()
    run.submit(*longer, flags=("--signal=USR1@60",))
    run.until_step(5)
    shown = cluster.control("squeue", "--noheader", f"--jobs={run.number}", "--format=%M").strip()
    minutes, seconds = (int(part) for part in shown.split(":"))
    limit = 60 * minutes + seconds + 62  # so that the signal is due at once
    limits = f"TimeLimit=0:{limit // 60}:{limit % 60}"
    cluster.control("scontrol", "update", f"JobId={run.number}", limits)
    run.until(lambda job: job.num_restarts == 1 or job.state == "COMPLETED", 240)
    cluster.control("scontrol", "update", f"JobId={run.number}", "TimeLimit=1:00:00")
    assert run.completes(2 * START_SECONDS).num_restarts == 1
    assert_same_result(run.folder, undisturbed.folder)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1], ids=["with the batch script and rank 0", "with rank 1"])
def test_a_node_that_loses_its_network_costs_no_more_than_the_steps_since_the_last_checkpoint(
    undisturbed: Path, run: Run, place: int
) -> None:
    """Its ranks live on there, cut off, while the job runs again elsewhere."""
    run.submit(*LONG)
    run.until_step(INTERVAL + 5)
    lost = run.until(lambda job: job.state == "RUNNING").nodes[place]
    run.cluster.node("cut", lost)
    job = run.until(lambda job: job.num_restarts == 1 and job.state == "RUNNING")
    assert lost not in job.nodes
    job = run.completes(2 * START_SECONDS)
    assert job.num_restarts == 1
    resumed = re.search(r"resumed from .* at step (\d+)", run.told)
    assert resumed is not None
    assert int(resumed[1]) >= INTERVAL
    run.cluster.node("join", lost)
    time.sleep(5)  # whatever the old ranks still write, they write now
    assert_same_result(run.folder, undisturbed)


def test_without_time_to_save_the_last_checkpoint_is_gone_on_from(undisturbed: Path, run: Run) -> None:
    """Fault catalogue row 12: SIGTERM, and SIGKILL before a checkpoint can be written."""
    run.submit(*LONG)
    run.until_step(INTERVAL + 5)
    ranks = run.cluster.ranks(run.number)
    assert sorted(ranks) == [0, 1]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in ranks.values():
            os.kill(process, number)
    job = run.completes(2 * START_SECONDS)
    assert job.num_restarts == 1
    assert "slurm: failed with exit code 137" in run.told
    resumed = re.search(r"resumed from .* at step (\d+)", run.told)
    assert resumed is not None
    assert int(resumed[1]) % INTERVAL == 0
    assert_same_result(run.folder, undisturbed)


def test_a_run_that_fails_at_the_same_step_each_time_is_not_requeued_for_ever(run: Run) -> None:
    """Fault catalogue row 13: a learning rate that makes every step non-finite."""
    run.submit(
        *("optim.base_lr=1e30", "guard.max_nonfinite_steps=2", "guard.max_idle_attempts=2"),
        "checkpoint.every_steps=1000",
    )
    job = run.end(4 * START_SECONDS)
    assert (job.state, job.exit_code) == ("FAILED", "2:0"), run.told[-5000:]
    assert job.num_restarts == 2
    assert "guard.max_idle_attempts" in run.told
    assert run.told.count("slurm: failed with exit code 1\n") == 2
    assert "slurm: wrong input: not requeued" in run.told


def test_a_cancelled_job_saves_and_stays_cancelled(run: Run) -> None:
    run.submit(*LONG, "checkpoint.every_steps=1000")
    run.until_step(10)
    run.cluster.control("scancel", str(run.number))
    assert run.end().state == "CANCELLED"
    time.sleep(8)  # a requeued job would be back in the queue, and after 5 s be started
    job = run.cluster.job(run.number)
    assert (job.state, job.num_restarts) == ("CANCELLED", 0)
    assert checkpoint.step_of(newest(run.folder)) >= 10


# -- what the script does with exit codes, with ranks that only end ---------------------------------------


def stand_in(folder: Path, commands: str) -> str:
    """An environment whose `python` is a shell script."""
    python = folder / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{commands}\n")
    python.chmod(0o755)
    return str(folder / "environment")


def test_a_job_whose_rank_was_killed_starts_again_as_the_same_job(run: Run, tmp_path: Path) -> None:
    # a while between the two: srun may drop what a task said at the moment it was killed
    environment = stand_in(
        tmp_path,
        'echo "in $*"; [ -n "$SLURM_RESTART_COUNT" ] || { sleep 2; [ "$SLURM_PROCID" = 0 ] || kill -9 $$; }',
    )
    job = run.submit(VENV=environment).completes(60)
    assert job.num_restarts == 1
    assert "slurm: failed with exit code 137" in run.told
    # two ranks twice, into the same folder; the output of the first start is still there
    assert run.told.count(f"--output-dir {run.folder} --resume auto") == 4
    assert "restarted 0 times" in run.told
    assert "restarted 1 times" in run.told


@pytest.mark.parametrize(
    ("first", "others", "expected"),
    [("exit 2", "sleep 2; exit 1", 2), ("sleep 2; exit 75", "exit 75", 75)],
    ids=["wrong input seen by rank 0 alone", "a rank that leaves ahead of the one that saves"],
)
def test_the_code_of_the_rank_that_knows_is_the_code_of_the_job(
    run: Run, tmp_path: Path, first: str, others: str, expected: int
) -> None:
    """With `srun --kill-on-bad-exit=1` it would be 143, and rank 0 be stopped while it saves."""
    environment = stand_in(tmp_path, f'if [ "$SLURM_PROCID" = 0 ]; then {first}; fi\n{others}')
    job = run.submit(VENV=environment).end(60)
    assert (job.state, job.exit_code, job.num_restarts) == ("FAILED", f"{expected}:0", 0), run.told


def test_ranks_that_wait_for_one_that_is_gone_are_ended(run: Run, tmp_path: Path) -> None:
    """Fault catalogue row 14, where a collective would wait for ever."""
    environment = stand_in(tmp_path, '[ "$SLURM_PROCID" = 1 ] && exit 1\nexec sleep 600')
    run.submit(VENV=environment, EXIT_SECONDS="3", PRETRAIN_REQUEUE_ON_FAILURE="0")
    job = run.end(60)
    assert job.state == "FAILED"
    assert "First task exited 3s ago" in run.told


def test_cancelling_ranks_that_do_not_heed_it_does_not_put_the_job_back(run: Run, tmp_path: Path) -> None:
    environment = stand_in(tmp_path, "trap '' TERM; while :; do sleep 1; done")
    run.submit(VENV=environment).until(lambda job: "into" in run.told, 60)
    time.sleep(2)
    run.cluster.control("scancel", str(run.number))
    assert run.end(60).state == "CANCELLED"
    time.sleep(20)  # KillWait, and what a requeued job would wait
    job = run.cluster.job(run.number)
    assert (job.state, job.num_restarts) == ("CANCELLED", 0)


# -- wrong settings: one line, a bounded time, no second start -------------------------------------------


def refused(
    run: Run, *overrides: str, seconds: float = 60.0, flags: tuple[str, ...] = (), **settings: str
) -> str:
    """What a job says that ends with exit code 2, by itself and for good."""
    run.submit(*overrides, flags=flags, **settings)
    job = run.end(seconds)
    assert (job.state, job.exit_code, job.num_restarts) == ("FAILED", "2:0", 0), run.told[-5000:]
    return run.told


def test_a_config_that_is_absent_is_named_before_any_rank_starts(run: Run) -> None:
    """Fault catalogue row 41."""
    told = refused(run, CONFIG="absent.yaml")
    assert "CONFIG: 'absent.yaml' cannot be read" in told
    assert len(told.splitlines()) == 1


def test_other_gpus_than_tasks_are_refused_before_any_rank_starts(run: Run) -> None:
    """Fault catalogue row 41: variables of Slurm that do not fit together."""
    told = refused(run, flags=("--gpus-per-node=4",))
    assert "SLURM_GPUS_ON_NODE: 4 GPUs for 1 tasks on a node" in told
    assert len(told.splitlines()) == 1


def test_a_setting_that_is_wrong_is_told_by_one_rank_and_not_tried_again(run: Run) -> None:
    told = refused(run, "batch.global_size=25", seconds=START_SECONDS)
    assert "batch.global_size" in told
    assert "slurm: wrong input: not requeued" in told


def test_a_taken_port_is_named_and_not_tried_again(run: Run) -> None:
    """Fault catalogue row 41: MASTER_PORT in use on the first node."""
    port = 19000 + os.getpid() % 1000
    squatters = [
        run.cluster.start_on_node(name, ["python3", "-m", "http.server", str(port)])
        for name in ("node1", "node2")
    ]
    try:
        told = refused(run, seconds=START_SECONDS, MASTER_PORT=str(port))
    finally:
        for squatter in squatters:
            end(squatter)
    assert f"MASTER_PORT: {port}" in told or f"MASTER_PORT {port}" in told


def test_a_rank_that_never_comes_is_named_within_the_time_given(run: Run, tmp_path: Path) -> None:
    """Fault catalogue row 41: a node absent. Its task hangs before it says anything, as on a broken disk."""
    real = Path(run.cluster.variables["VENV"]) / "bin" / "python"
    environment = stand_in(tmp_path, f'[ "$SLURM_PROCID" = 0 ] || exec sleep 600\nexec {real} "$@"')
    started = time.monotonic()
    run.submit(
        "cluster.rendezvous_seconds=10",
        VENV=environment,
        EXIT_SECONDS="5",
        PRETRAIN_REQUEUE_ON_FAILURE="0",
    )
    job = run.end()
    assert job.state == "FAILED"
    assert job.num_restarts == 0
    assert re.search(r"rank 1|ranks? absent: 1|\b1 of 2\b", run.told), run.told[-3000:]
    assert re.search(r"node\d:\d+", run.told)
    assert time.monotonic() - started < START_SECONDS


def test_a_job_submitted_elsewhere_is_told_where_to_submit(run: Run, tmp_path: Path) -> None:
    """Slurm runs a copy of the script; what scripts share is found from the submission folder."""
    run.submit(folder=tmp_path)
    job = run.end(60)
    assert (job.state, job.exit_code) == ("FAILED", "2:0")
    assert "call sbatch in the repository's folder" in run.told


# -- the other ways to start, as docs/cluster.md gives them ----------------------------------------------


def example(title: str) -> str:
    """The first block of code below a heading of the guide."""
    guide = (REPOSITORY / "docs" / "cluster.md").read_text()
    block = re.search(rf"^#+ {re.escape(title)}$.*?^```\w*\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert block is not None, f"docs/cluster.md has no code below '{title}'"
    return block[1]


def test_the_check_of_the_guide_proves_that_nodes_reach_each_other(
    cluster: SlurmCluster, config: Path, tmp_path: Path
) -> None:
    [line] = [line for line in example("The first job").splitlines() if line.startswith("srun")]
    command = (
        line.replace("configs/imagenet_vitb16_multitask.yaml", str(config))
        .replace(".venv/", f"{cluster.variables['VENV']}/")
        .split()
    )
    told = cluster.control(*command, "--output-dir", str(tmp_path / "run"))
    assert told.splitlines()[-1] == "0 errors, 0 warnings"


def test_the_torchrun_job_of_the_guide_trains_on_two_nodes(
    cluster: SlurmCluster, config: Path, tmp_path: Path
) -> None:
    script = tmp_path / "torchrun.sh"
    script.write_text(
        example("torchrun")
        .replace("configs/imagenet_vitb16_multitask.yaml", str(config))
        .replace("runs/vitb", str(tmp_path / "run"))
        .replace(".venv/", f"{cluster.variables['VENV']}/")
    )
    number = cluster.submit(script, tmp_path / "run.out", ["--gpus-per-node=2", "--cpus-per-task=4"])
    job = cluster.wait(number, START_SECONDS)
    told = (tmp_path / "run.out").read_text()
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), told[-5000:]
    assert "2 nodes x 2 ranks on cpu (torchrun)" in told
    assert len(digests(tmp_path / "run")) == 12


def test_the_two_commands_of_the_guide_train_without_a_scheduler(
    cluster: SlurmCluster, config: Path, tmp_path: Path
) -> None:
    lines = [
        line.replace("configs/imagenet_vitb16_multitask.yaml", str(config))
        .replace("runs/vitb", str(tmp_path / "run"))
        .replace(".venv/", f"{cluster.variables['VENV']}/")
        for line in example("Without a scheduler").splitlines()
        if "RANK=" in line
    ]
    assert len(lines) == 2
    started = [
        cluster.start_on_node(f"node{place + 1}", ["bash", "-c", line]) for place, line in enumerate(lines)
    ]
    try:
        told = [process.communicate(timeout=START_SECONDS)[0] for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            end(process)
        raise
    assert [process.returncode for process in started] == [0, 0], "".join(told)[-5000:]
    assert "2 nodes x 1 ranks on cpu (environment)" in told[0]
    assert sorted(digests(tmp_path / "run")) == list(range(1, 13))
    assert all(math.isfinite(value) for value in digests(tmp_path / "run").values())
