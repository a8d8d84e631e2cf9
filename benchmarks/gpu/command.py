"""The command line: which slices, where to, and for how long; every slice runs in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gpu.record import SliceFile, open_file
from gpu.running import SpentProcessError, begun_path, finish, run_slice
from gpu.setting import ROOT, Setting
from gpu.slices import SLICES
from pretrain import cluster
from pretrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
ON_CPU = ROOT / "runs" / "bench-gpu-toy"
SHARDS, CIFAR = (ROOT / "data_shards" / name for name in ("imagenet-sample", "cifar10"))
LONG_SECONDS = 240.0  # a variant that has taken longer when it is stopped is not tried again
LEAST_SECONDS = 20.0  # with less left no process is started
SPENT = 3  # exit status of a process that can measure no more


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--slice",
        action="append",
        choices=list(SLICES),
        metavar="NAME",
        help="only this one; repeatable",
    )
    parser.add_argument("--list", action="store_true", help="name the slices and what is done of them")
    parser.add_argument("--redo", action="store_true", help="measure the named slices (all) anew")
    parser.add_argument("--retry", action="store_true", help="measure anew what ended with a problem")
    parser.add_argument("--max-minutes", type=float, default=8.5, help="then stop; the same command goes on")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/gpu)")
    parser.add_argument("--toy", action="store_true", help="small sizes, as always without a GPU")
    parser.add_argument("--shards", type=Path, help="of photographs (default: data_shards/imagenet-sample)")
    parser.add_argument("--cifar", type=Path, help="of images of 32 px (default: data_shards/cifar10)")
    # measured in this process, which has nothing else to do
    parser.add_argument("--child", action="append", choices=list(SLICES), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def setting_of(arguments: argparse.Namespace) -> Setting:
    """UserError for results that would lie where those of a GPU belong."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    is_toy = arguments.toy or device.type == "cpu"
    out = (arguments.out or (ON_CPU if is_toy else RESULTS)).resolve()
    if is_toy and (out == RESULTS or RESULTS in out.parents):
        raise UserError(
            f"--out {out}: is for results of a GPU at full size, and this is "
            + ("a CPU" if device.type == "cpu" else "toy size")
            + "; choose another folder"
        )
    return Setting(
        device, is_toy, out, _indexed(arguments.shards, SHARDS, "--shards"),
        _indexed(arguments.cifar, CIFAR, "--cifar"),
    )  # fmt: skip


def _indexed(given: Path | None, usual: Path, option: str) -> Path | None:
    """None where nothing is given and the usual folder is absent or lacks its shards."""
    folder = given or usual
    try:
        root = folder / json.loads((folder / "index.json").read_text())["shards_root"]
        is_there = any(root.glob("**/*.tar*"))
    except (OSError, ValueError, KeyError, TypeError):
        is_there = False
    if is_there:
        return folder.resolve()
    if given is not None:
        raise UserError(
            f"{option} {given}: holds no shards with an index; `pretrain shards index {given}` writes one"
        )
    return None


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    try:
        setting = setting_of(arguments)
        if arguments.child:
            return _measure(arguments.child, setting, arguments.max_minutes)
        names = arguments.slice or list(SLICES)
        files = {name: _opened(name, setting, arguments) for name in names}
    except UserError as error:
        sys.stderr.write(f"benchmarks/gpu: {error}\n")
        return EXIT_USER_ERROR
    if arguments.list:
        for name, file in files.items():
            print(f"{name:<18} {state(file):<10} {SLICES[name].what}", flush=True)
        return EXIT_DONE
    _tell_place(setting)
    ends = time.monotonic() + 60 * arguments.max_minutes
    for name in names:
        _in_processes(name, setting, ends)
    left = [name for name in names if not open_file(name, SLICES[name].what, setting).is_complete]
    if left:
        print(f"time is up; left: {', '.join(left)}. The same command goes on.", flush=True)
    else:
        print(f"done; results are in {setting.out}", flush=True)
    return EXIT_DONE


def state(file: SliceFile) -> str:
    if file.is_complete:
        return "done"
    return f"{len(file.variants)} begun" if file.variants else "to do"


def _opened(name: str, setting: Setting, arguments: argparse.Namespace) -> SliceFile:
    path = setting.out / f"{name}.json"
    if arguments.redo:
        path.unlink(missing_ok=True)
    file = open_file(name, SLICES[name].what, setting)
    problems = [variant for variant in file.variants if variant not in file.good]
    if arguments.retry and problems:
        for variant in problems:
            del file.variants[variant]
        file.content["is_complete"] = False
        file.write()
    return file


def _tell_place(setting: Setting) -> None:
    if setting.is_gpu:
        print(f"on {torch.cuda.get_device_name(setting.device)}; results go to {setting.out}", flush=True)
    if setting.is_toy:
        print(
            f"toy sizes on {setting.device.type}: no result says anything about speed; to {setting.out}",
            flush=True,
        )
    for option, folder in (("--shards", setting.shards), ("--cifar", setting.cifar)):
        if folder is None:
            print(f"no {option}: random images stand in", flush=True)


def _in_processes(name: str, setting: Setting, ends: float) -> None:
    """Until the slice is complete or the time is up; a process that dies loses one variant."""
    while (left := ends - time.monotonic()) > LEAST_SECONDS:
        file = open_file(name, SLICES[name].what, setting)
        if file.is_complete:
            return
        before = len(file.variants)
        command = [sys.executable, str(Path(__file__).parent), "--child", name, "--out", str(setting.out)]
        command += ["--max-minutes", str(left / 60)]
        command += ["--toy"] if setting.is_toy else []
        for option, folder in (("--shards", setting.shards), ("--cifar", setting.cifar)):
            command += [option, str(folder)] if folder else []
        began = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status: int | None = process.wait(left)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        file = open_file(name, SLICES[name].what, setting)
        _note_ending(name, setting, file, status, time.monotonic() - began)
        if status == EXIT_DONE and len(file.variants) == before and not file.is_complete:
            return  # not enough time for the next


def _note_ending(name: str, setting: Setting, file: SliceFile, status: int | None, seconds: float) -> None:
    """Blame the variant under way for a process that died, or that did not come to an end."""
    path = begun_path(file)
    if not path.exists():
        if status not in (EXIT_DONE, SPENT, None):
            raise SystemExit(f"benchmarks/gpu: the process of {name} ended with {status} before any variant")
        return
    begun = json.loads(path.read_text())
    path.unlink()
    took = time.time() - begun["unix_time"]
    if status is None and took < LONG_SECONDS:
        return  # it began late: the next call measures it
    problem = f"no end within {took:.0f} s" if status is None else f"the process ended with status {status}"
    file.variants[begun["variant"]] = {"problem": problem, "took_seconds": round(took, 1)}
    finish(SLICES[name], setting, file)
    print(f"{name} / {begun['variant']}: {problem}", flush=True)


def _measure(names: Sequence[str], setting: Setting, minutes: float) -> int:
    """In a process of its own: DeepSpeed cannot meet a second time in one."""
    ends = time.monotonic() + 60 * minutes
    try:
        with cluster.connected(cluster.Cluster()):
            for name in names:
                run_slice(
                    SLICES[name],
                    setting,
                    open_file(name, SLICES[name].what, setting),
                    seconds_left=lambda: ends - time.monotonic(),
                    say=lambda told: print(told, flush=True),
                )
    except SpentProcessError:
        return SPENT
    return EXIT_DONE
