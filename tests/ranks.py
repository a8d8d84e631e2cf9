"""Run a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import fork_server
import torch
import torch.multiprocessing as mp

from pretrain import cluster


def _entry(
    local_rank: int, world_size: int, port: int, function: Callable[..., None], arguments: Any
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    place = cluster.Cluster(local_rank, world_size, local_rank, world_size, "test")
    with cluster.connected(place):
        function(place, *arguments)


def run_on_ranks(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """`function(place, *arguments)` on every rank; an exception on any rank fails the caller."""
    fork_server.context()
    arguments_of_all = (world_size, cluster.free_port(), function, arguments)
    mp.start_processes(_entry, arguments_of_all, nprocs=world_size, start_method="forkserver")
