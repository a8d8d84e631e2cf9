"""Faults that tests put into a run from outside, by patching; production code knows nothing of them.

Each function is called in the rank's process, with the rank, before the command starts. `now` tells where the
run is: `step` is the training step under way, from 0, and `data_step` the place in the data that it uses.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pretrain import attempts, build, checkpoint, checkpoint_writer, cluster, loop, train
from pretrain.data.inline import InlineBatches
from pretrain.data.resident import ResidentBatches
from pretrain.tasks.multitask import MultiTask


@dataclass
class _Now:
    step: int = -1
    data_step: int = -1
    loop: Any = None
    before_step: list[Callable[[int], None]] = field(default_factory=list)
    after_step: list[Callable[[int], None]] = field(default_factory=list)
    at_data: list[Callable[[int], None]] = field(default_factory=list)
    at_end: list[Callable[[], None]] = field(default_factory=list)  # the command has its exit code


now = _Now()


def follow(accumulation_steps: int) -> None:
    """Keep `now` up to date."""
    take_step, digest = loop.Loop.train_step, loop.samples_digest

    def followed(running: Any, step: int) -> None:
        now.step, now.loop = step, running
        for act in now.before_step:
            act(step)
        take_step(running, step)
        for act in now.after_step:
            act(step)

    def seen(batch: Any, micro_step: int, rank: int) -> Any:
        now.data_step = micro_step // accumulation_steps
        for act in now.at_data:
            act(now.data_step)
        return digest(batch, micro_step, rank)

    loop.Loop.train_step = followed  # type: ignore[method-assign]
    loop.samples_digest = seen


def _is_on(rank: int, only: int | None) -> bool:
    return only is None or rank == only


def spoil_loss(
    rank: int,
    *,
    on: int | None = None,
    steps: Collection[int] = (),
    data_steps: Collection[int] = (),
    factor: float = float("nan"),
) -> None:
    """Multiply the total loss, at steps of the training or of the data."""
    if not _is_on(rank, on):
        return
    forward = MultiTask.forward

    def spoilt(module: MultiTask, inputs: Any) -> Any:
        output = forward(module, inputs)
        if now.step in steps or now.data_step in data_steps:
            output["total"] = output["total"] * factor
        return output

    MultiTask.forward = spoilt  # type: ignore[method-assign]


def spoil_gradient(rank: int, *, on: int, step: int) -> None:
    """A NaN in the gradient of one parameter; the loss is well."""
    if rank != on:
        return
    make = build.module

    def made(*parts: Any) -> MultiTask:
        module = make(*parts)
        parameter = next(p for p in module.parameters() if p.requires_grad)
        parameter.register_hook(lambda grad: grad * float("nan") if now.step == step else grad)
        return module

    build.module = made


def constant_features(rank: int, *, from_step: int) -> None:
    """Every image has the same features, and the heads learn from those."""
    encode = MultiTask._encode

    def same(module: MultiTask, group: Any, inputs: Any) -> Any:
        views = encode(module, group, inputs)
        return replace(views, tokens=0 * views.tokens + 1) if now.step >= from_step else views

    MultiTask._encode = same  # type: ignore[method-assign]


def send_signals(
    rank: int,
    *,
    on: int | None = None,
    step: int | None = None,
    data_step: int | None = None,
    names: tuple[str, ...],
    seconds_between: float = 0.0,
) -> None:
    """This process gets signals as a step begins, or as it reads a place of the data."""
    if not _is_on(rank, on):
        return

    def act(at: int) -> None:
        if at not in (step, data_step):
            return
        for name in names:
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
            time.sleep(seconds_between)

    (now.before_step if data_step is None else now.at_data).append(act)


def signal_at_end(rank: int, *, signal_name: str) -> None:
    """While the process takes itself apart, as a launcher does it once another rank has ended."""
    now.at_end.append(lambda: os.kill(os.getpid(), signal.Signals[f"SIG{signal_name}"]))


def end_process(rank: int, *, on: int, step: int, code: int) -> None:
    """As a crash of a library would: at once, in the middle of a step."""
    if rank == on:
        now.at_data.append(lambda data_step: os._exit(code) if now.step == step else None)


def slow_data(rank: int, *, on: int, seconds: float, steps: Collection[int] | None = None) -> None:
    if rank != on:
        return
    for batches in (ResidentBatches, InlineBatches):

        def slow(self: Any, read: Callable[[Any], Any] = batches.__next__) -> Any:
            if steps is None or now.step in steps:
                time.sleep(seconds)
            return read(self)

        batches.__next__ = slow  # type: ignore[method-assign]


def pace(rank: int, *, seconds: float) -> None:
    now.before_step.append(lambda step: time.sleep(seconds))


def _step_being_written(path: Path) -> int:
    """Of the checkpoint that a file is written for, below .writing-step-00000006-4711."""
    name = path.parts[path.parts.index(checkpoint.FOLDER) + 1]
    return checkpoint.step_of(Path(name.removeprefix(".writing-").rpartition("-")[0]))


def full_disk(rank: int, *, checkpoints: Collection[int]) -> None:
    """The files of these checkpoints cannot be written. 47 of their bytes can."""
    save = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if _step_being_written(path) in checkpoints:
            path.write_bytes(bytes(47))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path)

    checkpoint.save_file = full


def die_writing(rank: int, *, step: int, file: str) -> None:
    """SIGKILL in the middle of a file of the checkpoint of this step: 47 of its bytes are written."""
    save = checkpoint.save_file

    def dies(tensors: Any, path: Path) -> None:
        if _step_being_written(path) == step and path.match(file):
            path.write_bytes(bytes(47))
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, path)

    checkpoint.save_file = dies


def quick_retries(rank: int) -> None:
    """Of the last checkpoint, which is tried again for seconds."""
    checkpoint_writer.FINAL_RETRY_SECONDS = (0.05, 0.05, 0.05)


def disk_away(
    rank: int,
    *,
    from_step: int | None = None,
    writing: int | None = None,
    to_step: int | None = None,
    whole: bool = False,
) -> None:
    """The folder of the checkpoints, or the whole run folder, is away until a step.

    It goes as a step begins, or when a checkpoint has its first file and not yet the others.
    """

    def folder() -> Path:
        run: Path = now.loop.run_dir
        return run if whole else run / checkpoint.FOLDER

    def act(step: int) -> None:
        if step == from_step:
            folder().rename(folder().with_name("elsewhere"))
        if step == to_step:
            assert not folder().exists(), f"{folder()} was made anew while it was away"
            folder().with_name("elsewhere").rename(folder())

    make_durable = checkpoint._make_durable

    def goes(path: Path) -> str:
        digest = make_durable(path)
        if _step_being_written(path) == writing and path.match(checkpoint.STUDENT):
            folder().rename(folder().with_name("elsewhere"))
        return digest

    if rank == 0:
        now.before_step.append(act)
        checkpoint._make_durable = goes


def logs_fail(rank: int, *, step: int) -> None:
    """From this step on neither metrics.jsonl, anomalies.jsonl nor train.log can be written."""

    class Full:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            self.stream.close()

    def act(at: int) -> None:
        if at != step:
            return
        for name in ("metrics.jsonl", "anomalies.jsonl"):
            path = now.loop.run_dir / name
            path.unlink(missing_ok=True)
            path.mkdir()
        for handler in train.logger.handlers:
            if getattr(handler, "baseFilename", "").endswith("train.log"):
                handler.stream = Full(handler.stream)  # type: ignore[attr-defined]

    if rank == 0:
        now.before_step.append(act)


def out_of_memory(rank: int, *, on: int, step: int) -> None:
    def act(data_step: int) -> None:
        if now.step == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if rank == on:
        now.at_data.append(act)


def other_software(rank: int, *, on: int) -> None:
    if rank == on:
        found = cluster.versions()
        cluster.versions = lambda: {**found, "timm": "0.0.1"}


def drift(rank: int, *, on: int, after_step: int, part: str) -> None:
    """One bit of one number changes silently, in a parameter of the student or of the teacher."""

    @torch.no_grad()
    def act(step: int) -> None:
        if step == after_step:
            module = now.loop.engine.module if part == "student" else now.loop.teacher.backbone
            value = next(module.parameters())
            value.view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    if rank == on:
        now.after_step.append(act)


def spoil_weights(rank: int, *, after_step: int) -> None:
    """A number of the student becomes NaN, once: not when the run comes to that step again."""
    due = [after_step]

    @torch.no_grad()
    def act(step: int) -> None:
        if step in due:
            due.clear()
            next(now.loop.engine.module.parameters()).view(-1)[:1].fill_(float("nan"))

    now.after_step.append(act)


def clock_jumps(rank: int, *, seconds: float) -> None:
    """The wall clock is put forward and back, so much further at every look, and so never by the same."""
    read, looks = time.time, itertools.count(1)

    def jumping() -> float:
        look = next(looks)
        return read() + seconds * (look if look % 2 else -look)

    time.time = jumping


def work_in(rank: int, *, folders: Sequence[str]) -> None:
    """Each rank in a folder of its own, as on nodes whose disks differ."""
    os.chdir(folders[rank])


def short_lease(rank: int, *, seconds: float) -> None:
    make = attempts.Attempt.__init__

    def made(self: Any, run_dir: Path, number: int, lease_seconds: float, record: Any) -> None:
        make(self, run_dir, number, seconds, record)

    attempts.Attempt.__init__ = made  # type: ignore[method-assign]


def numbers_come_late(rank: int) -> None:
    """The numbers of a step are read when the next one was taken, as on a GPU."""
    loop.reads_late = lambda device: True


def apply(rank: int, accumulation_steps: int, faults: Collection[tuple[str, dict[str, Any]]]) -> None:
    follow(accumulation_steps)
    for name, settings in faults:
        getattr(sys.modules[__name__], name)(rank, **settings)
