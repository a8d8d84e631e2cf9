"""The loader process of a rank: reads blocks ahead, decodes in threads, writes crops into shared memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import threading
import traceback
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from pretrain.data.batch import DataConfig
from pretrain.data.crop_writer import CropWriter, Ring
from pretrain.data.lane import Lane, open_lanes
from pretrain.data.manifest import Split
from pretrain.data.quarantine import Quarantine
from pretrain.data.sources import ShardOpener, mixture_of
from pretrain.errors import UserError
from pretrain.read_counts import ReadCounts
from pretrain.views.plan import ViewConfig

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NUM_READ_THREADS = 8


@dataclass(frozen=True)
class Work:
    """All that a loader process must know."""

    config: DataConfig
    splits: tuple[Split, ...]
    views: tuple[ViewConfig, ...]
    seed: int
    batch_size: int  # samples of one micro step over all ranks
    rank: int
    world_size: int
    start_micro_step: int
    quarantine_path: Path | None


@dataclass(frozen=True)
class Ready:
    """A slot holds the next batch."""

    slot: int
    counts: ReadCounts


@dataclass(frozen=True)
class Failure:
    """The loader has ended; `error` is set where the user can mend it."""

    error: UserError | None
    trace: str


def run(ring: Ring, trainer: Connection) -> None:
    """Entry point of the process. Receives its Work, then freed slots; sends Ready or Failure."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when to stop
    threading.Thread(target=_die_with_trainer, daemon=True).start()
    torch.set_num_threads(1)
    _allow_many_files()
    try:
        _serve(trainer.recv(), ring, trainer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer is gone
    except BaseException as error:
        trainer.send(Failure(error if isinstance(error, UserError) else None, traceback.format_exc()))
    finally:
        os._exit(0)  # without waiting for threads that may hang in a read


def begin_work(work: Work, ring: Ring, threads: Executor) -> tuple[CropWriter, list[Lane], ShardOpener]:
    """What fills the ring, and the lanes it takes samples from, already reading; last, what opens shards."""
    config = work.config
    mixture = mixture_of(config, work.splits, work.seed, work.batch_size)
    quarantine = Quarantine(
        work.quarantine_path, mixture.num_samples, config.max_bad_ratio, mixture.data_hash
    )
    writer = CropWriter(ring, work.views, work.seed, threads, quarantine, config.max_pixels)
    own = mixture.lanes_of(work.rank, work.world_size)
    readers = ThreadPoolExecutor(NUM_READ_THREADS, "reader")
    opener = ShardOpener(config)
    lanes = open_lanes(mixture, own, work.start_micro_step, readers, opener)
    return writer, lanes, opener


def _die_with_trainer() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _allow_many_files() -> None:
    """As many as the machine lets us: a compressed shard stays open, one for each lane."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _serve(work: Work, ring: Ring, trainer: Connection) -> None:
    """Fill free slots, batch after batch; while one is decoded, the next is already begun."""
    writer, lanes, opener = begin_work(work, ring, ThreadPoolExecutor(work.config.decode_threads))
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
        is_ready = not begun or all(lane.is_ready(micro_step) for lane in lanes)
        if free and len(begun) < 2 and not finished and is_ready:
            slot = free.popleft()
            picks = [pick for lane in lanes for pick in lane.picks(micro_step)]
            begun.append((slot, writer.begin(slot, picks)))
            micro_step += 1
        else:
            slot, tasks = begun.popleft()
            for task in tasks:
                task.result()
            trainer.send(Ready(slot, opener.counts(writer.quarantine.met_by_reason)))
