"""How the ranks find each other: in bounded time, with the absent ones named."""

from __future__ import annotations

import errno
import json
import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Annotated, Any, BinaryIO

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from pretrain.cluster.layout import Cluster, master
from pretrain.errors import TrainingError, UserError

logger = logging.getLogger("pretrain")

STILL_WAITING_SECONDS = 30.0  # for absent ranks, until rank 0 says so


class ClusterConfig(BaseModel):
    """How long ranks wait for each other."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout_seconds: Annotated[int, Field(gt=0)] = 600  # in a collective, before the run fails
    rendezvous_seconds: Annotated[int, Field(gt=0)] = 300  # at the start, for all ranks to be there


@contextmanager
def connected(cluster: Cluster, config: ClusterConfig | None = None) -> Iterator[None]:
    """Be in the process group: NCCL on GPUs, gloo on CPUs. DeepSpeed needs one even for a single rank.

    All ranks have checked in with rank 0 before it is made, so that an absent one ends the others in bounded
    time and is named. The launcher variables that DeepSpeed looks for are set meanwhile, and put back at the
    end.
    """
    config = config or ClusterConfig()
    device = cluster.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.timeout_seconds)
    host, port = master() if cluster.world_size > 1 else ("127.0.0.1", 0)
    store: Store | None
    if cluster.world_size == 1:
        store = HashStore()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = None  # torchrun has brought all nodes together, and its agent serves the store
    else:
        store = meet(cluster, host, port, config.rendezvous_seconds, timeout)
    before = dict(os.environ)
    os.environ.update(
        RANK=str(cluster.rank), WORLD_SIZE=str(cluster.world_size), LOCAL_RANK=str(cluster.local_rank)
    )
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=cluster.rank, world_size=cluster.world_size, timeout=timeout
        )
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        store = None  # closes rank 0's port, also while an exception keeps this frame
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def meet(cluster: Cluster, host: str, port: int, seconds: float, timeout: timedelta) -> TCPStore:
    """Wait until every rank is there, for so many seconds at most; returns the store that they share.

    Rank 0 listens on the port and takes down who comes. Only when all are there does it hand the port over to
    the store, whose own waiting neither ends in time nor tells who is missing.
    """
    with _ended_by_term():
        return _meet(cluster, host, port, seconds, timeout)


def find_peers(cluster: Cluster, seconds: float) -> None:
    """Prove that all ranks reach rank 0, and part again; else an error names who is absent or what is wrong.

    torchrun has proved it when it starts a rank.
    """
    if cluster.world_size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    host, port = master()
    timeout = timedelta(seconds=seconds)
    store = meet(cluster, host, port, seconds, timeout)
    store.set(f"seen {cluster.rank}", "")
    if cluster.is_first:  # it serves the others until all have come so far
        store.wait([f"seen {rank}" for rank in range(cluster.world_size)], timeout)


@contextmanager
def _ended_by_term() -> Iterator[None]:
    """SIGTERM ends a rank that still waits for others: there is no step to finish, and nothing to save.

    Else `scancel`, or a launcher one of whose ranks has failed, would wait in vain and then have to kill it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise TrainingError(f"SIGTERM on {socket.gethostname()} while it waited for the other ranks")

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread do this
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # None: a handler that was not set from Python, which cannot be put back from here
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _meet(cluster: Cluster, host: str, port: int, seconds: float, timeout: timedelta) -> TCPStore:
    if cluster.is_first:
        with ExitStack() as closing:
            listener = closing.enter_context(_listen(port))
            _check_host(host, min(seconds, STILL_WAITING_SECONDS))
            guests = _receive(cluster, listener, host, port, seconds, closing)
            # the store takes the descriptor over
            store = TCPStore(
                host,
                port,
                cluster.world_size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
            for guest in guests:
                _tell(guest.connection, {"go": True})
            return store
    _check_in(cluster, host, port, seconds)
    return TCPStore(host, port, cluster.world_size, False, timeout, wait_for_workers=False)


@dataclass(frozen=True)
class _Guest:
    """A rank that has checked in."""

    connection: socket.socket
    rank: int
    host: str
    process: int


def _run_token(variables: Mapping[str, str] = os.environ) -> str:
    """What only ranks of one start share: two runs that chose the same port must not mix."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")
    return "/".join(variables.get(name, "") for name in names)


def _listen(port: int) -> socket.socket:
    """On every interface, IPv6 and IPv4, as torch's store does."""
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
                )
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is taken" if error.errno == errno.EADDRINUSE else "may not be used"
        raise UserError(
            f"MASTER_PORT: {port} {why} on {socket.gethostname()}, the host of rank 0; choose another"
        ) from None


def _check_host(host: str, seconds: float) -> None:
    """Rank 0 has to know its own name; in Kubernetes that may take a moment."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise _unknown_host(host, error) from None
        time.sleep(0.5)


def _unknown_host(host: str, error: OSError) -> UserError:
    return UserError(
        f"MASTER_ADDR: '{host}' is not known on {socket.gethostname()} ({error.strerror}); "
        "give the name or address of rank 0's host that all nodes know"
    )


def _receive(
    cluster: Cluster, listener: socket.socket, host: str, port: int, seconds: float, closing: ExitStack
) -> Collection[_Guest]:
    """Rank 0's side: every other rank, once all are there. `closing` closes all connections."""
    started = time.monotonic()
    say_at = started + STILL_WAITING_SECONDS
    guests: dict[int, _Guest] = {}
    selector = closing.enter_context(selectors.DefaultSelector())
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ)
    try:
        while len(guests) < cluster.world_size - 1:
            now = time.monotonic()
            if now >= started + seconds:
                raise TrainingError(_who_is_absent(cluster, guests.values(), host, port, seconds))
            if now >= say_at:
                logger.warning(_who_is_absent(cluster, guests.values(), host, port, now - started))
                say_at += 4 * STILL_WAITING_SECONDS
            for key, _ in selector.select(max(0.0, min(started + seconds, say_at) - now)):
                if key.fileobj is listener:
                    with suppress(OSError):  # it has gone before it was let in
                        newcomer = closing.enter_context(listener.accept()[0])
                        newcomer.setblocking(False)
                        selector.register(newcomer, selectors.EVENT_READ, bytearray())
                    continue
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                try:
                    heard = connection.recv(4096)
                except OSError:
                    heard = b""
                key.data.extend(heard)
                if heard and b"\n" not in key.data and len(key.data) < 4096:
                    continue  # the rest is on its way
                guest = _guest(cluster, connection, bytes(key.data), port) if heard else None
                if guest is None:  # a stranger, or a rank that has gone again
                    selector.unregister(connection)
                    connection.close()
                    guests = {rank: g for rank, g in guests.items() if g.connection is not connection}
                    continue
                key.data.clear()
                other = guests.get(guest.rank)
                if guest.rank == 0 or (other and (other.host, other.process) != (guest.host, guest.process)):
                    first_host = other.host if other else socket.gethostname()
                    guests[-1] = guest  # is told as well
                    raise UserError(
                        f"RANK: {guest.rank} is claimed by two processes, on {first_host} and {guest.host}; "
                        "check the launcher"
                    )
                guests[guest.rank] = guest
                _tell(connection, {"welcome": True})
    except (UserError, TrainingError) as error:
        for guest in guests.values():
            _tell(guest.connection, {"stop": str(error), "wrong_input": isinstance(error, UserError)})
        raise
    return guests.values()


def _guest(cluster: Cluster, connection: socket.socket, line: bytes, port: int) -> _Guest | None:
    """Who says hello; None if it is no rank of this run, which then is told so."""
    try:
        hello = json.loads(line)
        guest = _Guest(connection, int(hello["rank"]), str(hello["host"]), int(hello["process"]))
        run, world_size = str(hello["run"]), int(hello["world_size"])
    except (ValueError, KeyError, TypeError):
        return None  # a port scanner, or another program that mistook the port
    problem = None
    if run != _run_token():
        problem = f"MASTER_PORT: {port} on {socket.gethostname()} belongs to another run; choose another"
    elif world_size != cluster.world_size:
        problem = (
            f"WORLD_SIZE: {cluster.world_size} on rank 0 ({socket.gethostname()}), {world_size} on rank "
            f"{guest.rank} ({guest.host}); start all ranks with the same"
        )
    if problem:
        _tell(connection, {"stop": problem, "wrong_input": True})
        logger.warning("%s turned away: %s", guest.host, problem)
        return None
    return guest


def _tell(connection: socket.socket, message: Mapping[str, Any]) -> None:
    with suppress(OSError):  # a rank that has gone will be missed soon enough
        connection.settimeout(5.0)
        connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(answers: BinaryIO) -> dict[str, Any]:
    answer = json.loads(answers.readline(4096))
    if not isinstance(answer, dict):
        raise ValueError("no answer of rank 0")
    return answer


def _who_is_absent(cluster: Cluster, guests: Iterable[_Guest], host: str, port: int, seconds: float) -> str:
    here = {0: socket.gethostname(), **{guest.rank: guest.host for guest in guests}}
    absent = ranges(rank for rank in range(cluster.world_size) if rank not in here)
    try:  # an address of another machine cannot be bound
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
        elsewhere = ""
    except OSError:
        elsewhere = f", which is no address of {socket.gethostname()}, where rank 0 is"
    return (
        f"absent after {seconds:.0f} s: rank {absent} of {cluster.world_size} (here: {with_hosts(here)}); "
        f"check that they were started and reach MASTER_ADDR:MASTER_PORT {host}:{port}{elsewhere} "
        "(the wait is cluster.rendezvous_seconds)"
    )


def _check_in(cluster: Cluster, host: str, port: int, seconds: float) -> None:
    """The side of the other ranks: say hello to rank 0, and come back when it says that all are there."""
    deadline = time.monotonic() + seconds
    hello = {
        "rank": cluster.rank,
        "world_size": cluster.world_size,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "run": _run_token(),
    }
    why, pause = "", 0.05
    while (left := deadline - time.monotonic()) > 0:
        try:
            with (
                socket.create_connection((host, port), timeout=min(left, 10.0)) as connection,
                connection.makefile("rb") as answers,
            ):
                why = "what listens there is not rank 0 of this run"
                _tell(connection, hello)
                connection.settimeout(min(left, 10.0))
                if "welcome" in (answer := _hear(answers)):
                    why, pause = "it was there and went away", 0.05
                    connection.settimeout(seconds + 10.0)  # rank 0 may have come later than this one
                    answer = _hear(answers)
        except socket.gaierror as error:
            why = str(_unknown_host(host, error))
        except OSError as error:
            why = why if isinstance(error, TimeoutError) and why else error.strerror or str(error)
        except ValueError:  # another program, or no answer
            pass
        else:
            if "go" in answer:
                return
            if "stop" in answer:
                raise (UserError if answer.get("wrong_input") else TrainingError)(answer["stop"])
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    if why.startswith("MASTER_ADDR"):
        raise UserError(why)
    raise TrainingError(
        f"rank {cluster.rank} on {socket.gethostname()} did not find rank 0 at MASTER_ADDR:MASTER_PORT "
        f"{host}:{port} in {seconds:.0f} s ({why}); check that rank 0 was started on that host and that the "
        "port is open (the wait is cluster.rendezvous_seconds)"
    )


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'"""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def with_hosts(hosts: Mapping[int, str]) -> str:
    """{0: 'a', 1: 'a', 2: 'b'} -> '0-1 on a, 2 on b'"""
    names = dict.fromkeys(hosts[rank] for rank in sorted(hosts))
    return ", ".join(f"{ranges(rank for rank in hosts if hosts[rank] == name)} on {name}" for name in names)
