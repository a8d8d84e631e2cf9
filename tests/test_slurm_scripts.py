"""slurm/*.sh with stand-ins for srun, scontrol and squeue: what reaches the ranks, and when a job goes back.

tests/cluster/ runs the same scripts on Slurm itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
import yaml

from pretrain.cli import parse
from pretrain.config import load_config

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sh"))
JOBS = [script for script in SCRIPTS if script.name != "env.sh"]
PRETRAIN_JOBS = [script for script in JOBS if script.name.startswith("pretrain_")]

# They write down what they were asked, one argument a line. `srun` ends with the code that a test wants.
STAND_INS = {
    "srun": 'printf "%s\\n" "$@" > srun.asked; env > srun.variables; exit "${SRUN_CODE:-0}"',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$*" >> scontrol.asked; fi',
    "squeue": 'echo "${JOB_STATE:-RUNNING}"',
}
JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NAME": "pretrain_vitb",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "12",
}


@dataclass(frozen=True)
class Done:
    code: int
    told: str
    asked: list[str]  # of srun
    variables: dict[str, str]  # that srun had
    requeued: str  # what scontrol was asked

    @property
    def of_srun(self) -> list[str]:
        return self.asked[: self.asked.index("-m")]

    @property
    def of_pretrain(self) -> list[str]:
        return self.asked[self.asked.index("-m") + 2 :]


class Submission:
    """A folder in which scripts are started as Slurm starts them: from a copy elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "submitted here"
        shutil.copytree(REPOSITORY / "slurm", self.folder / "slurm")
        (self.folder / "configs").symlink_to(REPOSITORY / "configs")
        python = self.folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to("/bin/true")
        self.programs = folder / "programs"
        self.programs.mkdir()
        for name, text in STAND_INS.items():
            program = self.programs / name
            program.write_text(f"#!/bin/bash\n{text}\n")
            program.chmod(0o755)
        self.spool = folder / "spool"
        self.spool.mkdir()

    def run(self, name: str, *arguments: str, output: Path | None = None, **variables: str | None) -> Done:
        """output: a file to which it is appended, as to that of a job."""
        with ExitStack() as closing:
            to = closing.enter_context(output.open("a+")) if output else subprocess.PIPE
            return self._run(name, arguments, to, output, variables)

    def _run(
        self,
        name: str,
        arguments: tuple[str, ...],
        to: int | IO[str],
        output: Path | None,
        variables: dict[str, str | None],
    ) -> Done:
        copy = self.spool / "slurm_script"
        shutil.copy(self.folder / "slurm" / name, copy)
        given = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(self.folder),
            **JOB,
            **variables,
        }
        done = subprocess.run(
            ["bash", str(copy), *arguments],
            env={key: value for key, value in given.items() if value is not None},
            cwd=self.spool,
            stdout=to,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
        asked, variables_file, requeued = (
            path.read_text() if (path := self.folder / name).exists() else ""
            for name in ("srun.asked", "srun.variables", "scontrol.asked")
        )
        pairs = (line.partition("=") for line in variables_file.splitlines())
        return Done(
            done.returncode,
            output.read_text() if output else done.stdout,
            asked.splitlines(),
            {key: value for key, _, value in pairs},
            requeued.strip(),
        )


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    return Submission(tmp_path)


def flags_of(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, SCRIPTS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_the_flags_stand_where_sbatch_reads_them(script: Path) -> None:
    """sbatch stops reading at the first line that is neither empty nor a comment."""
    lines = script.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]
    assert {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "output"} <= flags_of(
        script
    ).keys()


@pytest.mark.parametrize("script", PRETRAIN_JOBS, ids=lambda path: path.name)
def test_a_run_is_asked_to_stop_in_time_and_put_back_in_the_queue(script: Path) -> None:
    flags = flags_of(script)
    assert re.fullmatch(r"USR1@\d+", flags["signal"])  # to the tasks: B: would tell the batch script alone
    assert "requeue" in flags
    assert flags["open-mode"] == "append"  # a requeued job would empty its output otherwise
    assert flags["ntasks-per-node"] == flags["gpus-per-node"]


@pytest.mark.parametrize("script", PRETRAIN_JOBS, ids=lambda path: path.name)
def test_the_config_of_a_script_suits_its_nodes(script: Path, submission: Submission) -> None:
    done = submission.run(script.name, "optim.base_lr=1e-3", OVERRIDES="views.one.scale=[0.2,0.9] seed=7")
    assert done.code == 0, done.told
    arguments = parse(done.of_pretrain)
    assert (arguments.command, arguments.resume) == ("train", "auto")
    config = load_config(REPOSITORY / arguments.config, arguments.overrides)
    assert (config.optim.base_lr, config.seed, tuple(config.views["one"].scale)) == (1e-3, 7, (0.2, 0.9))
    flags = flags_of(script)
    world_size = int(flags["nodes"]) * int(flags["ntasks-per-node"])
    assert config.batch.global_size % (world_size * config.batch.accumulation_steps) == 0
    assert config.data.lanes % world_size == 0


def test_the_ranks_are_told_where_to_meet_and_nothing_of_another_launcher(submission: Submission) -> None:
    done = submission.run("pretrain_vitb.sh", RANK="0", WORLD_SIZE="1", MASTER_ADDR="elsewhere")
    assert done.variables["MASTER_ADDR"] == "node7"
    assert done.variables["MASTER_PORT"] == "23456"
    assert not {"RANK", "WORLD_SIZE"} & done.variables.keys()
    assert done.variables["OMP_NUM_THREADS"] == "1"
    assert "--cpus-per-task=12" in done.of_srun
    assert {"--kill-on-bad-exit=0", "--wait=60"} <= set(done.of_srun)
    assert done.of_srun[-1] == ".venv/bin/python"
    assert "2 nodes x 8 tasks, 8 GPUs a node, 12 CPUs a task; rank 0 at node7:23456" in done.told


def test_neither_another_job_nor_another_start_of_this_one_has_the_same_port(submission: Submission) -> None:
    """A node that was cut off comes back with the old rank 0 still there."""
    starts = [
        {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart)}
        for job in (123456, 123457, 123458)
        for restart in range(3)
    ]
    ports = [submission.run("pretrain_vitb.sh", **start).variables["MASTER_PORT"] for start in starts]
    assert len(set(ports)) == len(starts)
    assert all(20000 <= int(port) < 30000 for port in ports)
    assert (
        submission.run("pretrain_vitb.sh", MASTER_PORT="31000", **starts[1]).variables["MASTER_PORT"]
        == "31000"
    )


def test_the_run_folder_stays_the_same_when_the_job_starts_again(submission: Submission) -> None:
    first = parse(submission.run("pretrain_vitb.sh").of_pretrain)
    again = parse(submission.run("pretrain_vitb.sh", SLURM_RESTART_COUNT="2").of_pretrain)
    assert first.output_dir == again.output_dir == Path("runs/pretrain_vitb-123456")


def test_a_setting_with_a_star_is_not_taken_for_file_names(submission: Submission) -> None:
    for name in ("data.split=x", "model.name=a"):  # what bash would put in place of the stars
        (submission.folder / name).touch()
    done = submission.run("pretrain_vitb.sh", "data.split=*", OVERRIDES="data.split=* model.name=[ab]*")
    assert parse(done.of_pretrain).overrides == ["data.split=*", "model.name=[ab]*", "data.split=*"]


def test_a_container_takes_the_place_of_the_environment(submission: Submission) -> None:
    done = submission.run("pretrain_vitb.sh", CONTAINER="/images/pretrain.sqsh", VENV="absent")
    here = submission.folder
    assert {
        "--container-image=/images/pretrain.sqsh",
        f"--container-workdir={here}",
        f"--container-mounts={here}:{here}",
    } <= set(done.of_srun)
    assert done.of_srun[-1] == "python3"
    done = submission.run("pretrain_vitb.sh", CONTAINER="x", CONTAINER_MOUNTS="/data:/data")
    assert "--container-mounts=/data:/data" in done.of_srun


@pytest.mark.parametrize(
    ("code", "variables", "asked"),
    [
        (0, {}, ""),
        (2, {}, ""),  # wrong input stays wrong
        (75, {}, ""),  # rank 0 has asked already, if it is right to
        (1, {}, "requeue 123456"),
        (137, {}, "requeue 123456"),
        (1, {"PRETRAIN_REQUEUE_ON_FAILURE": "0"}, ""),
        (1, {"SLURM_RESTART_COUNT": "99"}, "requeue 123456"),
        (1, {"SLURM_RESTART_COUNT": "100"}, ""),  # a loop that nothing else ends
        (1, {"SLURM_RESTART_COUNT": "3", "PRETRAIN_MAX_RESTARTS": "3"}, ""),
        (143, {"JOB_STATE": "CANCELLED"}, ""),  # scancel is not undone
        (143, {"JOB_STATE": "PENDING"}, ""),  # Slurm has requeued it already
        (1, {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4"}, "requeue 9_4"),
    ],
)
def test_a_job_goes_back_into_the_queue_only_when_another_start_may_help(
    submission: Submission, code: int, variables: dict[str, str], asked: str
) -> None:
    done = submission.run("pretrain_vitb.sh", SRUN_CODE=str(code), **variables)
    assert done.code == code
    assert done.requeued == asked


def test_a_rank_that_could_not_ask_to_be_requeued_is_helped(submission: Submission, tmp_path: Path) -> None:
    """As in a container, which has no scontrol."""
    (submission.programs / "srun").write_text(
        "#!/bin/bash\necho 'stopped: saved at step 3; slurm 1 could not be requeued: no scontrol'\nexit 75\n"
    )
    done = submission.run("pretrain_vitb.sh", output=tmp_path / "job.out")
    assert (done.code, done.requeued) == (75, "requeue 123456")


def test_a_job_that_rank_0_has_put_back_is_not_asked_for_again(
    submission: Submission, tmp_path: Path
) -> None:
    output = tmp_path / "job.out"
    output.write_text("stopped: slurm 1 could not be requeued: no scontrol\n")  # by a start before
    done = submission.run("pretrain_vitb.sh", output=output, SRUN_CODE="75")
    assert (done.code, done.requeued) == (75, "")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "SLURM_SUBMIT_DIR"),
        ({"SLURM_SUBMIT_DIR": None}, "SLURM_SUBMIT_DIR"),
        ({"CONFIG": "absent.yaml"}, "CONFIG"),
        ({"VENV": "absent"}, "VENV"),
        ({"SLURM_CPUS_PER_TASK": None}, "SLURM_CPUS_PER_TASK"),
        ({"SLURM_TASKS_PER_NODE": "8(x2),4"}, "SLURM_TASKS_PER_NODE"),
        ({"SLURM_TASKS_PER_NODE": None}, "SLURM_TASKS_PER_NODE"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"EXIT_SECONDS": "0"}, "EXIT_SECONDS"),
        ({"PRETRAIN_REQUEUE_ON_FAILURE": "yes"}, "PRETRAIN_REQUEUE_ON_FAILURE"),
        ({"PRETRAIN_MAX_RESTARTS": "-1"}, "PRETRAIN_MAX_RESTARTS"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_named_before_any_rank_starts(
    submission: Submission, variables: dict[str, str | None], named: str
) -> None:
    """Fault catalogue row 41: one line that names the variable, exit code 2, no srun, no requeue."""
    done = submission.run("pretrain_vitb.sh", **variables)
    assert done.code == 2
    (line,) = done.told.splitlines()
    assert f"slurm: {named}:" in line
    assert (done.asked, done.requeued) == ([], "")


def test_weights_are_exported_and_measured_by_one_task(submission: Submission) -> None:
    done = submission.run("export.sh", "--weights", "student", RUN="runs/x")
    exported = parse(done.of_pretrain)
    assert (exported.run, exported.out, exported.weights) == (
        Path("runs/x"),
        Path("runs/x/exported"),
        "student",
    )
    done = submission.run("evaluate.sh", KIND="linear", WEIGHTS="runs/x/exported", TRAIN="a", TEST="b:val")
    measured = parse(done.of_pretrain)
    assert (measured.kind, measured.train, measured.test, measured.out) == ("linear", "a", "b:val", None)
    done = submission.run("evaluate.sh", KIND="head", WEIGHTS="runs/x", TEST="b", OUT="with blank")
    assert (parse(done.of_pretrain).kind, parse(done.of_pretrain).out) == ("head", Path("with blank"))


@pytest.mark.parametrize(
    ("script", "variables", "named"),
    [
        ("export.sh", {}, "RUN"),
        ("evaluate.sh", {"TRAIN": "a", "TEST": "b"}, "WEIGHTS"),
        ("evaluate.sh", {"WEIGHTS": "x", "TEST": "b"}, "TRAIN"),
        ("evaluate.sh", {"WEIGHTS": "x", "TRAIN": "a"}, "TEST"),
        ("sweep.sh", {}, "STUDY"),
        ("sweep.sh", {"STUDY": "absent.yaml"}, "STUDY"),
    ],
)
def test_a_variable_without_a_default_is_named(
    submission: Submission, script: str, variables: dict[str, str], named: str
) -> None:
    done = submission.run(script, **variables)
    assert (done.code, done.asked) == (2, [])
    assert f"slurm: {named}: " in done.told


def test_each_job_of_an_array_takes_its_own_run_of_the_study(submission: Submission) -> None:
    study = "configs/studies/relvit_table4.yaml"
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4"}
    one = parse(submission.run("sweep.sh", "seed=7", STUDY=study, **array).of_pretrain)
    assert (one.study, one.index, one.nproc, one.overrides) == (Path(study), 4, 8, ["seed=7"])
    assert one.output_dir == Path("runs/relvit_table4")  # of all jobs of the array
    everything = parse(submission.run("sweep.sh", "--measure-only", STUDY=study, NPROC="2").of_pretrain)
    assert (everything.index, everything.measure_only, everything.nproc) == (None, True, 2)


@pytest.mark.parametrize(("said", "expected"), [("2", 2), ("1", 137)])
def test_wrong_input_that_one_rank_knows_of_is_not_hidden_by_those_that_were_killed(
    submission: Submission, said: str, expected: int
) -> None:
    """What earlier starts of the job have said, in the same file, does not count."""
    output = submission.folder / "job.out"
    output.write_text("srun: error: node7: task 0: Exited with exit code 2\n")
    (submission.programs / "srun").write_text(
        f"#!/bin/bash\necho 'srun: error: node7: task 0: Exited with exit code {said}' >&2\n"
        "echo 'srun: error: node8: tasks 8-15: Killed' >&2\nexit 137\n"
    )
    done = submission.run("pretrain_vitb.sh", output=output)
    assert done.code == expected
    assert done.requeued == ("" if expected == 2 else "requeue 123456")
    assert ("slurm: wrong input: not requeued" in done.told) == (expected == 2)


def test_a_study_that_is_not_finished_goes_back_and_one_that_failed_does_not(submission: Submission) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4"}
    study = "configs/studies/relvit_table4.yaml"
    failed = submission.run("sweep.sh", STUDY=study, SRUN_CODE="1", **array)
    assert (failed.code, failed.requeued) == (1, "")
    stopped = submission.run("sweep.sh", STUDY=study, SRUN_CODE="75", **array)
    assert (stopped.code, stopped.requeued) == (75, "requeue 9_4")


def test_every_variable_that_env_sh_takes_is_told_at_its_top() -> None:
    head, _, body = (REPOSITORY / "slurm" / "env.sh").read_text().partition("\nrefuse()")
    taken = set(re.findall(r"\$\{([A-Z_]+):[-=]", body)) - set(re.findall(r"SLURM_\w+", body))
    assert taken | {"CONFIG"} == set(re.findall(r"^#   ([A-Z_]+) ", head, re.MULTILINE))


def test_a_config_named_in_the_guide_exists() -> None:
    guide = (REPOSITORY / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"\bconfigs/[\w/]+\.yaml", guide))
    assert named
    for name in named:
        assert yaml.safe_load((REPOSITORY / name).read_text())


def test_what_the_guide_tells_to_submit_exists() -> None:
    guide = (REPOSITORY / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"\bslurm/\w+\.sh", guide))
    assert {"slurm/pretrain_vitb.sh", "slurm/sweep.sh", "slurm/evaluate.sh", "slurm/export.sh"} <= named
    assert named <= {f"slurm/{script.name}" for script in SCRIPTS}
