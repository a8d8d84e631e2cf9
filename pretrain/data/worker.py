"""The loader process of a rank: reads blocks ahead, decodes in threads, writes crops into shared memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from pretrain.data.crop_writer import CropWriter, Ring
from pretrain.data.lane import Lane, picks
from pretrain.data.manifest import Split
from pretrain.data.order import Order
from pretrain.data.quarantine import Quarantine
from pretrain.errors import UserError
from pretrain.views.plan import ViewConfig

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NUM_READ_THREADS = 8
SWITCH_SECONDS = 0.0005  # a decoder needs the interpreter briefly and must not queue behind a tar parser


@dataclass(frozen=True)
class Work:
    """All that a loader process must know."""

    split: Split
    order: Order
    views: tuple[ViewConfig, ...]
    rank: int
    world_size: int
    start_micro_step: int
    decode_threads: int
    quarantine_path: Path | None
    max_bad_ratio: float


@dataclass(frozen=True)
class Ready:
    """A slot holds the next batch."""

    slot: int
    num_bad: int


@dataclass(frozen=True)
class Failure:
    """The loader has ended; `error` is set where the user can mend it."""

    error: UserError | None
    trace: str


def run(work: Work, ring: Ring, trainer: Connection) -> None:
    """Entry point of the process. Sends Ready or Failure; receives freed slots, or None to end."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when to stop
    threading.Thread(target=_die_with_trainer, daemon=True).start()
    sys.setswitchinterval(SWITCH_SECONDS)
    torch.set_num_threads(1)
    try:
        _serve(work, ring, trainer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer is gone
    except BaseException as error:
        trainer.send(Failure(error if isinstance(error, UserError) else None, traceback.format_exc()))
    finally:
        os._exit(0)  # without waiting for threads that may hang in a read


def _die_with_trainer() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _serve(work: Work, ring: Ring, trainer: Connection) -> None:
    """Fill free slots, batch after batch; while one is decoded, the next is already begun."""
    quarantine = Quarantine(work.quarantine_path, work.split.num_samples, work.max_bad_ratio)
    readers = ThreadPoolExecutor(NUM_READ_THREADS)
    writer = CropWriter(ring, work.views, work.order.seed, work.decode_threads, quarantine)
    lanes = [
        Lane(work.order, work.split.shards, lane, work.start_micro_step, readers)
        for lane in work.order.lanes_of(work.rank, work.world_size)
    ]
    free = deque(range(ring.num_slots))
    begun: deque[tuple[int, list[Future[None]]]] = deque()
    micro_step = work.start_micro_step
    while True:
        while trainer.poll(None if not free and not begun else 0):
            slot = trainer.recv()
            if slot is None:
                return
            free.append(slot)
        finished = begun and all(task.done() for task in begun[0][1])
        if free and len(begun) < 2 and not finished:
            slot = free.popleft()
            begun.append((slot, writer.begin(slot, picks(work.order, lanes, micro_step))))
            micro_step += 1
        else:
            slot, tasks = begun.popleft()
            for task in tasks:
                task.result()
            trainer.send(Ready(slot, quarantine.num_met))
