"""The Slurm job this process runs in: its name, its end, and a request to run it again."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.cluster.layout import number_in

logger = logging.getLogger("pretrain")

SLURM_SECONDS = 60.0  # for an answer of Slurm's controller, which may be busy


@dataclass(frozen=True)
class SlurmJob:
    """The job this process runs in. A task of an array is '12_3': '12' alone may mean all of them."""

    id: str
    restart: int = 0  # how many times it was started before
    nodes: str = ""  # 'node[1-2]'

    @property
    def name(self) -> str:
        return f"slurm {self.id}"


def slurm_job(variables: Mapping[str, str] = os.environ) -> SlurmJob | None:
    if "SLURM_JOB_ID" not in variables:
        return None
    id = variables["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in variables and "SLURM_ARRAY_TASK_ID" in variables:
        id = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    restart = number_in(variables, "SLURM_RESTART_COUNT", default=0)  # not set in the first run
    return SlurmJob(id, restart, variables.get("SLURM_JOB_NODELIST", ""))


_REQUEUED: dict[
    str, str | None
] = {}  # job -> why it failed; a second request would restart the restarted job


def requeue(job: SlurmJob) -> str | None:
    """Ask Slurm to run the job again, once however often this is called; returns why it failed, or None.

    Slurm then ends the present run of the job at once: SIGTERM, and SIGKILL after KillWait.
    """
    if job.id not in _REQUEUED:
        _REQUEUED[job.id] = None
        try:
            _ask_slurm("scontrol", "requeue", job.id)
        except _SlurmError as error:
            _REQUEUED[job.id] = str(error)
    return _REQUEUED[job.id]


def job_seconds_left(job: SlurmJob) -> float | None:
    """Until Slurm ends the job by its time limit; None if it has none, or Slurm does not say."""
    try:
        return seconds_of(_ask_slurm("squeue", "-h", "-j", job.id, "-o", "%L"))
    except _SlurmError as error:
        logger.warning("%s: the end of the job is not known: %s", job.name, error)
        return None


def seconds_of(text: str) -> float | None:
    """'1-02:03:04', '2:03:04', '3:04' or '4' as Slurm writes what is left; None for 'UNLIMITED' and such."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text.strip())
    if found is None:
        return None
    seconds = 0
    for part in found[2].split(":"):
        seconds = 60 * seconds + int(part)
    return float(86400 * int(found[1] or 0) + seconds)


class _SlurmError(Exception):
    """Slurm was asked, in vain."""


def _ask_slurm(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SLURM_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise _SlurmError(f"{command[0]}: not found; in a container, mount Slurm's commands") from None
    except subprocess.TimeoutExpired:
        raise _SlurmError(f"{' '.join(command)}: no answer in {SLURM_SECONDS:.0f} s") from None
    except OSError as error:
        raise _SlurmError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise _SlurmError(f"{' '.join(command)}: {said}")
    return done.stdout
