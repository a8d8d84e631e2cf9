"""A Slurm cluster on this machine, as the tests use it: submit, watch, break nodes.

SLURM_TEST_CLUSTER names a folder with `up.sh NODES`, `down.sh` and `node.sh cut|join|exec NODE`, which make
and remove a cluster of Slurm's own daemons whose nodes are network namespaces.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "ip", "unshare", "nsenter")
OF_ANOTHER_JOB = ("SLURM_", "SBATCH_", "SRUN_")  # variables that would reach into the jobs of a test
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STOPPED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE")


def why_absent() -> str | None:
    """Why no cluster can be brought up here, or None."""
    named = os.environ.get("SLURM_TEST_CLUSTER")
    if not named:
        return "SLURM_TEST_CLUSTER is not set: it names a folder with up.sh, down.sh and node.sh"
    if not (Path(named) / "up.sh").is_file():
        return f"SLURM_TEST_CLUSTER: {named} has no up.sh"
    if os.geteuid() != 0:
        return "a cluster on one machine needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)} (slurm-wlm munge iproute2 util-linux)" if absent else None


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says."""

    state: str
    exit_code: str  # CODE:SIGNAL
    num_restarts: int
    nodes: tuple[str, ...]  # names, or () before it has any
    reason: str


class SlurmCluster:
    """Three nodes of 8 pretended GPUs and 96 pretended CPUs; ranks compute on the CPU."""

    def __init__(self, scripts: Path, folder: Path, num_nodes: int = 3) -> None:
        number = os.getpid()  # so that two test sessions on one machine do not meet
        self.scripts = scripts
        self.num_nodes = num_nodes
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(OF_ANOTHER_JOB) and name not in OF_A_LAUNCHER
        }
        self.variables = {
            **kept,
            "CLUSTER": f"t{number % 10**6}",
            "CLUSTER_DIR": str(folder),
            "CLUSTER_NET": f"10.{100 + number % 100}.{number // 100 % 250}",
            "CTLD_PORT": str(_free_port()),
            "GPUS_PER_NODE": "8",
            "CPUS_PER_NODE": "96",
            "MEM_PER_NODE_MB": "1000000",
            "PARTITIONS": "gpu",
            "SLURMD_TIMEOUT": "10",
            "KILL_WAIT": "10",
            "SLURM_CONF": str(folder / "slurm.conf"),
            # what the jobs need, as sbatch hands on the environment
            "VENV": sys.prefix,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def up(self) -> None:
        self._call([str(self.scripts / "up.sh"), str(self.num_nodes)])

    def down(self) -> None:
        self._call([str(self.scripts / "down.sh")])

    def node(self, action: str, name: str, *more: str) -> str:
        """Break or mend a node, or run a command on it."""
        return self._call([str(self.scripts / "node.sh"), action, name, *more])

    def start_on_node(self, name: str, command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.scripts / "node.sh"), "exec", name, *command],
            env={**self.variables, **variables},
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # entering a node forks, and all of it must be ended
        )

    def submit(
        self,
        script: Path,
        output: Path,
        flags: Sequence[str],
        *arguments: str,
        folder: Path = REPOSITORY,
        **variables: str,
    ) -> int:
        """The id of the job, submitted from `folder`; its output is appended to `output`."""
        told = subprocess.run(
            ["sbatch", "--parsable", f"--output={output}", *flags, str(script), *arguments],
            cwd=folder,
            env={**self.variables, **variables},
            text=True,
            capture_output=True,
            check=False,
        )
        if told.returncode:
            raise ValueError(told.stderr)
        return int(told.stdout)

    def control(self, *command: str) -> str:
        """A command of Slurm, such as `scancel ID`."""
        return self._call(command)

    def job(self, number: int) -> Job:
        # `squeue` forgets a job that has ended, and there is no accounting to ask
        told = dict(re.findall(r"(\w+)=(\S+)", self._call(["scontrol", "-o", "show", "job", str(number)])))
        listed = told.get("NodeList", "(null)")
        names = () if listed == "(null)" else self._call(["scontrol", "show", "hostnames", listed]).split()
        return Job(told["JobState"], told["ExitCode"], int(told["Restarts"]), tuple(names), told["Reason"])

    def ranks(self, number: int) -> dict[int, int]:
        """The process of each rank of a job's present start, as this machine numbers it."""
        restart = self.job(number).num_restarts
        found: dict[int, tuple[int, int]] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, UnicodeDecodeError):  # it may end meanwhile
                if (process / "cmdline").read_text().split("\0")[1:4] != ["-m", "pretrain", "train"]:
                    continue
                words = (process / "environ").read_text().split("\0")
                variables = dict(word.split("=", 1) for word in words if "=" in word)
                # the variable is not there in the first start
                this = variables.get("SLURM_JOB_ID"), int(variables.get("SLURM_RESTART_COUNT", "0"))
                if this == (str(number), restart) and variables.get("CLUSTER") == self.variables["CLUSTER"]:
                    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                    found[int(process.name)] = int(variables["SLURM_PROCID"]), parent
        # what a rank has forked looks like it
        return {rank: pid for pid, (rank, parent) in found.items() if parent not in found}

    def wait(self, number: int, seconds: float, until: Callable[[Job], bool] | None = None) -> Job:
        """The job once `until` holds, by default once it has ended for good."""
        until = until or (lambda job: job.state in STOPPED)
        deadline = time.monotonic() + seconds
        while not until(job := self.job(number)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds:.0f} s: {job}")
            time.sleep(0.5)
        return job

    def wait_until_idle(self, seconds: float = 120.0) -> None:
        """All nodes up, and no job on them."""
        deadline = time.monotonic() + seconds
        while (
            self._call(["sinfo", "--noheader", "--Node", "--format=%T"]).split() != ["idle"] * self.num_nodes
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(self._call(["sinfo", "--Node", "--long"]))
            time.sleep(0.5)

    def _call(self, command: Sequence[str]) -> str:
        done = subprocess.run(
            command, env=self.variables, text=True, capture_output=True, timeout=180, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout


def end(process: subprocess.Popen[str]) -> None:
    """Kill what `start_on_node` has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
