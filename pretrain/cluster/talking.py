"""How connected ranks talk to each other."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import __version__
from pretrain.cluster.layout import Cluster
from pretrain.cluster.meeting import with_hosts
from pretrain.errors import UserError
from pretrain.peers import ALONE, Peers

T = TypeVar("T")

# in errors of gloo, NCCL and torch's store
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection timed out",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
    "watchdog timeout",
    "Socket Timeout",
    "Application timeout caused pair closure",
)


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums every rank's gradient for the local rows (METHODS A3)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        world = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(world, local.contiguous())
        return torch.cat(world)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()  # what autograd hands in is not ours to change
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class _Sum(torch.autograd.Function):
    """All-reduce; every rank used the sum, so the backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def peers(cluster: Cluster) -> Peers:
    """The connected ranks, as losses and normalisation layers use them."""
    if cluster.world_size == 1:
        return ALONE
    return Peers(cluster.rank, cluster.world_size, _Gather.apply, _Sum.apply)


def from_first(value: T) -> T:
    """What rank 0 has, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """What every rank has, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def host_name() -> str:
    return socket.gethostname()


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or silent, told by the library's own words."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in LOST_PEER)


def first_said(said: T | None) -> T | None:
    """What the first rank that has something to say says, on every rank."""
    return next((each for each in from_all(said) if each is not None), None)


def versions() -> dict[str, str]:
    """Of the software whose differences change results or break communication."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pretrain": __version__,
    }
    for name in ("deepspeed", "timm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def agree(facts: Mapping[str, str]) -> None:
    """End the run on every rank unless all have the same facts: versions, hashes of config and data."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), dict(facts)))
    problem = difference([host for host, _ in found], [known for _, known in found])
    if problem:
        raise UserError(problem)


def difference(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str | None:
    """What ranks do not agree on, and which rank has what; None if they agree. One entry for each rank."""
    names = dict.fromkeys(name for known in facts for name in known)
    differing = [name for name in names if len({known.get(name) for known in facts}) > 1]
    if not differing:
        return None
    name = differing[0]
    told = []
    for value in dict.fromkeys(known.get(name) for known in facts):
        ranks = {rank: hosts[rank] for rank, known in enumerate(facts) if known.get(name) == value}
        told.append(f"{'nothing' if value is None else value} on rank {with_hosts(ranks)}")
    also = f" (so do {', '.join(differing[1:])})" if differing[1:] else ""
    return (
        f"{name}: differs between ranks: {'; '.join(told)}{also}; give every rank the same software, "
        "configuration and data"
    )
