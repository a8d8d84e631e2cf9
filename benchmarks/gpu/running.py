"""One slice in this process: its variants one after another, each written as soon as it is measured."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from gpu.clock import synchronize
from gpu.record import SliceFile, commit, gpu_state
from gpu.setting import Setting, Slice
from gpu.training import close_all
from pretrain.garbage import collected_on_time
from pretrain.memory import is_out_of_memory

LAST_LINES = 3  # of a traceback
MOST_LEFT_BYTES = 2**30  # after a variant; more would be missing to the next


class SpentProcessError(Exception):
    """The device answers nothing more in this process, or its memory is kept by something."""


def begun_path(file: SliceFile) -> Path:
    """Names the variant under way, so that a process that dies over it is known to have."""
    return file.path.with_name(f".{file.path.stem}.begun")


def run_slice(
    asked: Slice,
    setting: Setting,
    file: SliceFile,
    *,
    seconds_left: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """Measure what the file lacks, as long as there is time.

    SpentProcessError: this process is of no more use, and another one may go on.
    """
    with collected_on_time():  # as in a run; peers have the good of it too
        _run_slice(asked, setting, file, seconds_left, say)


def _run_slice(
    asked: Slice,
    setting: Setting,
    file: SliceFile,
    seconds_left: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    code = commit()
    variants = asked.variants(setting)
    is_first = True
    for name, variant in variants.items():
        if name in file.variants:
            continue
        if not is_first and seconds_left() < variant.expected_seconds:
            return
        is_first = False
        begun_path(file).parent.mkdir(parents=True, exist_ok=True)
        begun_path(file).write_text(json.dumps({"variant": name, "unix_time": time.time()}))
        began = time.time()
        is_spent = False
        try:
            measured = variant.measure()
        except Exception as error:
            measured = {"problem": told(error)}
            # the frames of the error hold what filled the memory
            traceback.clear_frames(error.__traceback__)
            is_spent = not _answers(setting)
        is_spent = clean(setting.device) or is_spent
        file.variants[name] = {
            **measured,
            "took_seconds": round(time.time() - began, 1),
            "unix_time": round(time.time(), 1),
            "commit": code,
            "command": " ".join(["python", *sys.argv]),
            **({"gpu_state": state} if (state := gpu_state(setting)) else {}),
        }
        finish(asked, setting, file)
        begun_path(file).unlink(missing_ok=True)
        say(line(file.path.stem, name, file.variants[name]))
        if is_spent:
            raise SpentProcessError(name)


def finish(asked: Slice, setting: Setting, file: SliceFile) -> None:
    """Write the file, with its summary."""
    if asked.summary is not None:
        try:
            file.content["summary"] = asked.summary(setting, file.good)
        except KeyError as lacking:  # a variant that it needs
            file.content["summary"] = {"problem": f"needs {lacking}"}
    file.content["is_complete"] = set(asked.variants(setting)) <= set(file.variants)
    file.write()


def told(error: Exception) -> str:
    """In one line."""
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    if is_out_of_memory(error):
        return f"out of memory: {first}"
    where = traceback.extract_tb(error.__traceback__)[-LAST_LINES:]
    trail = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(where))
    return f"{type(error).__name__}: {first} ({trail})"


def _answers(setting: Setting) -> bool:
    try:
        synchronize(setting.device)
    except RuntimeError:
        return False
    return True


def clean(device: torch.device) -> bool:
    """Give back what a variant has left: memory, and compiled code of its shapes. True if that fails."""
    close_all()
    torch.compiler.reset()
    if device.type != "cuda":
        return False
    gc.collect()
    try:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) > MOST_LEFT_BYTES
    except RuntimeError:
        return True


def line(slice_name: str, variant: str, result: dict[str, object]) -> str:
    shown = result.get("problem") or result.get("headline") or "measured"
    return f"{slice_name} / {variant}: {shown}  ({result['took_seconds']} s)"
