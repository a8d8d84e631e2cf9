"""Several ranks on this machine, started by this process."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from pretrain.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR

PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # of prctl(2)
STOP_SECONDS = 60.0  # between asking a rank to stop and killing it: it may be writing a checkpoint
LEAVE_SECONDS = 600.0  # for the other ranks to leave, after the first has left with all saved


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_local(command: Sequence[str], num_processes: int) -> int:
    """Run `command` as ranks 0..num_processes-1 on this machine; returns the exit code of the first to fail.

    When a rank fails the others are stopped, so nobody waits in a collective for a rank that is gone. Ranks
    that were preempted are waited for: some leave while another still saves.
    """
    port = str(free_port())
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    processes: list[subprocess.Popen[bytes]] = []
    # what the launcher is told, every rank is told; while they start it waits
    before = {number: signal.signal(number, _passing_on(processes)) for number in PASSED_ON}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    failed: dict[int, int] = {}
    try:
        for rank in range(num_processes):
            variables = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "PRETRAIN_LAUNCHER": "--nproc",
            }
            variables.setdefault("OMP_NUM_THREADS", str(threads))
            processes.append(subprocess.Popen(command, env=variables, preexec_fn=_begin_rank))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        failed = _wait(processes)
    except KeyboardInterrupt:
        _stop(processes)
        return EXIT_FAILED
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop(processes)
    if not failed:
        return EXIT_PREEMPTED if any(process.returncode == EXIT_PREEMPTED for process in processes) else 0
    # the rank that knows the cause wins over those that only lost their peer, and has told it
    if EXIT_USER_ERROR in (process.returncode for process in processes):
        return EXIT_USER_ERROR
    for rank, code in failed.items():
        print(f"pretrain: rank {rank} {_how_it_ended(code)}", file=sys.stderr)  # noqa: T201
    code = next(iter(failed.values()))
    return 128 - code if code < 0 else code


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Until all ranks have ended, or some have failed: those, with their exit codes.

    A rank that ended as preempted has not failed, but the others have to follow.
    """
    deadline = None
    while True:
        running = [process for process in processes if process.poll() is None]
        codes = {rank: process.returncode for rank, process in enumerate(processes)}
        failed = {rank: code for rank, code in codes.items() if code not in (None, 0, EXIT_PREEMPTED)}
        if failed or not running:
            return failed
        if deadline is None and EXIT_PREEMPTED in codes.values():
            deadline = time.monotonic() + LEAVE_SECONDS
        if deadline is not None and time.monotonic() >= deadline:
            return {}
        time.sleep(0.1)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    hint = " (out of memory? see dmesg)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _passing_on(processes: Sequence[subprocess.Popen[bytes]]) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return handler


def _begin_rank() -> None:
    """Let Linux kill this process when the launcher dies, even if that was by SIGKILL.

    SIGUSR1 and SIGUSR2 stay blocked, which a new program inherits: they wait until the rank listens to them
    (`preempt.Preemption.install`), and do not kill it while it starts.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGHUP))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
