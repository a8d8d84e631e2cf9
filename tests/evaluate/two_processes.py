"""Run a function in two processes that accelerate knows of, as its launcher would start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import fork_server
import torch
import torch.distributed
import torch.multiprocessing as mp
from accelerate import Accelerator

from pretrain import cluster


def _entry(rank: int, port: int, function: Callable[..., None], arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    function(accelerator, *arguments)
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """`function(accelerator, *arguments)` in both; an exception in either fails the caller."""
    fork_server.context()
    mp.start_processes(
        _entry, (cluster.free_port(), function, arguments), nprocs=2, start_method="forkserver"
    )
