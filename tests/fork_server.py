"""Processes that tests start by the dozen come from a server that has imported what they need once.

Importing torch and DeepSpeed takes seconds of CPU in every fresh process; a fork of a process that has done
it takes milliseconds. What a run itself starts is started as ever, and tested so elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch.multiprocessing  # noqa: F401  (lets tensors pass between processes)

PRELOADED = ["preloaded"]


def context() -> ForkServerContext:
    """Processes of this context share one server for the whole test session."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    try:
        forkserver.ensure_running()  # it finds the modules by this path alone, and says nothing if it cannot
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return server
