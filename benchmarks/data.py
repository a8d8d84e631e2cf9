"""Images per second of this project's loader, of bare loops and of other loaders. Run by `make bench-data`.

Everything runs on the same JPEG shards and is kept to the same cores. Variants take turns in every round,
the one that begins changes from round to round, and between its turns a variant's processes are stopped.
Quote the medians of the ratios within a round; where the machine is shared, those by CPU time. The batch
before a turn, the start of a loader and the writing of files in a peer's format are not counted.

Peers may live in an environment of their own, which `--peers-python` names:

    python3 -m venv peers
    peers/bin/pip install --requirement benchmarks/peers.txt
    .venv/bin/python benchmarks/data.py --peers-python peers/bin/python

To share torch with `.venv`, first write the path of its site-packages into a file main.pth in that of peers.
FFCV (`pip install ffcv`) is built from source and needs OpenCV and libturbojpeg. A peer that is not there is
reported so, with the command that installs it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from result import cpu_model

from pretrain.data.manifest import Manifest
from pretrain.errors import DataError

HERE = Path(__file__).parent
SHARDS, CIFAR = (HERE.parent / "data_shards" / name for name in ("imagenet-sample", "cifar10"))
START_SECONDS = 90.0  # after which a variant that has made no batch is given up
START_RATIO = 0.6  # of the budget, after which no further variant is started
GRACE_SECONDS = 5.0  # for all variants to end by themselves


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    program: str  # data_ours.py or data_peers.py
    entry: str  # its name there
    num_cores: int = 2
    work: str = "finished"  # what it delivers; only equal work is compared
    package: str = ""  # of a peer, as pip knows it
    note: str = ""


def _peer(entry: str, package: str, note: str = "", work: str = "finished") -> Variant:
    return Variant(entry, "data_peers.py", entry, work=work, package=package, note=note)


PIL, TENSOR = "torchvision v1 transforms on PIL images", "torchvision v2 transforms on uint8 tensors"
VARIANTS = (
    Variant("bare decode, 1 core", "data_ours.py", "bare-decode", 1, "decoded"),
    Variant("bare decode, 2 cores", "data_ours.py", "bare-decode", 2, "decoded"),
    Variant("bare loop, 1 core", "data_ours.py", "bare-loop", 1, "uint8"),
    Variant("bare loop, 2 cores", "data_ours.py", "bare-loop", 2, "uint8"),
    Variant("ours uint8, 1 core", "data_ours.py", "loader", 1, "uint8"),
    Variant("ours uint8, 2 cores", "data_ours.py", "loader", 2, "uint8"),
    Variant("ours finished", "data_ours.py", "finished", note="prepare() on the CPU beside the loader"),
    Variant("cifar stream, 1 core", "data_ours.py", "cifar-stream", 1, "uint8, 32 px"),
    Variant("cifar resident, 1 core", "data_ours.py", "cifar-resident", 1, "uint8, 32 px", note="CPU"),
    _peer("torchvision-pil", "torchvision", PIL),
    _peer("torchvision-v2", "torchvision", TENSOR),
    _peer("webdataset", "webdataset", PIL),
    _peer("timm", "timm", "its folder reader and its own augmentation (PIL)"),
    _peer("lightly", "lightly", "its own SimCLRTransform (PIL)"),
    _peer("hf-datasets", "datasets", TENSOR + ", streamed from the tars"),
    _peer("mosaicml-streaming", "mosaicml-streaming", TENSOR),
    _peer("litdata", "litdata", TENSOR),
    _peer("grain", "grain", TENSOR),
    _peer("torchdata", "torchdata", TENSOR + ", in processes"),
    _peer("squirrel", "squirrel-core", TENSOR),
    _peer("spdl", "spdl", TENSOR + ", in its threads"),
    _peer("dali", "nvidia-dali-cuda120", "its CPU operators, each applied only where drawn"),
    _peer("dali-uint8", "nvidia-dali-cuda120", "two crops with a flip", work="uint8"),
    _peer("ffcv-uint8", "ffcv", "two crops with a flip; it has no colour jitter and no blur", work="uint8"),
)
BASES = {  # what each kind of work is compared with
    "decoded": {1: "bare decode, 1 core", 2: "bare decode, 2 cores"},
    "uint8": {1: "bare loop, 1 core", 2: "bare loop, 2 cores"},
    "finished": {2: "bare loop, 2 cores"},
}
REFERENCE = "torchvision-pil"


@dataclass
class Runner:
    """A variant's process, stopped but in its turns."""

    variant: Variant
    process: subprocess.Popen[str]
    started: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, float]] = field(default_factory=list)
    problem: str = ""

    def ask(self, line: str | None, limit_seconds: float) -> dict[str, Any]:
        """Let it run until it answers; {} if it does not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        alarm = signal.setitimer(signal.ITIMER_REAL, limit_seconds)
        try:
            if line is not None:
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
            return dict(json.loads(self.process.stdout.readline() or "{}"))
        except (TimeoutError, BrokenPipeError):
            return {}
        finally:
            signal.setitimer(signal.ITIMER_REAL, *alarm)
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGSTOP)

    def dismiss(self) -> None:
        """Let it end by itself, so that it removes what it shares between processes."""
        assert self.process.stdin is not None
        with contextlib.suppress(ProcessLookupError, BrokenPipeError):
            self.process.stdin.close()
            os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self, wait_seconds: float) -> None:
        """End it and all that it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _time_is_up(*_: object) -> None:
    raise TimeoutError


def start(variant: Variant, arguments: argparse.Namespace, folder: Path) -> Runner:
    """Start a variant and wait for its first batch."""
    work = folder / variant.entry / str(variant.num_cores)
    work.mkdir(parents=True)
    python = arguments.peers_python if variant.package else sys.executable
    command = [
        *(python, str(HERE / variant.program), variant.entry, "--num-cores", str(variant.num_cores)),
        *("--shards", str(arguments.shards), "--cifar", str(arguments.cifar)),
        *("--images", str(folder / "images"), "--tars", str(folder / "tars")),
        *("--work", str(work)),
    ]
    own = {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin would take the cores from the decoders
        "HF_HOME": str(folder / "hf"),
        "TMPDIR": str(work),
    }
    with (work / "stderr.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | own,
            start_new_session=True,
        )
    runner = Runner(variant, process)
    runner.started = runner.ask(None, START_SECONDS)
    if "missing" in runner.started:
        runner.problem = f"not installed (pip install {variant.package})"
    elif "start_seconds" not in runner.started:
        runner.problem = runner.started.get("failed", "no batch: " + _last_line(work / "stderr.txt"))
    if runner.problem:
        runner.kill(wait_seconds=1)
    return runner


def _last_line(path: Path) -> str:
    return (path.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1][:200]


def take_turns(runners: list[Runner], rounds: int, seconds: float, end: float) -> int:
    """Rounds of turns, the first of each round another; no round begins that would not end in time."""
    longest = 0.0
    for round_number in range(rounds):
        begin = time.monotonic()
        if round_number and begin + longest > end:
            return round_number
        first = round_number * len(runners) // rounds
        for runner in runners[first:] + runners[:first]:
            if runner.problem:
                continue
            turn = runner.ask(str(seconds), START_SECONDS)
            if "images" in turn:
                runner.turns.append(turn)
            else:
                runner.problem = turn.get("failed", "stopped delivering")
        longest = max(longest, time.monotonic() - begin)
    return rounds


def _spread(values: Iterable[float], digits: int) -> dict[str, float]:
    ordered = sorted(values)
    middle = statistics.median(ordered)
    return {
        "median": round(middle, digits),
        "low": round(ordered[0], digits),
        "high": round(ordered[-1], digits),
    }


def _rates(runner: Runner, clock: str) -> list[float]:
    return [turn["images"] / max(turn[clock], 1e-3) for turn in runner.turns]


def summarise(runner: Runner, runners: dict[str, Runner]) -> dict[str, Any]:
    """A row of the result: rates, and ratios to the bare loop on as many cores and to torchvision."""
    variant = runner.variant
    row: dict[str, Any] = {"name": variant.name, "work": variant.work, "num_cores": variant.num_cores}
    if variant.package:
        row["package"] = variant.package
    if variant.note:
        row["note"] = variant.note
    if runner.problem:
        return row | {"problem": runner.problem}
    row |= {"start_seconds": runner.started["start_seconds"], "batch": runner.started["batch"]}
    row["images_per_second"] = _spread(_rates(runner, "wall_seconds"), 1)
    row["cpu_ms_per_image"] = _spread((1000 / rate for rate in _rates(runner, "cpu_seconds")), 3)
    bases = {"bare": BASES.get(variant.work, {}).get(variant.num_cores), "torchvision": None}
    if variant.num_cores == 2 and variant.work != "decoded":
        bases["torchvision"] = REFERENCE
    for label, name in bases.items():
        base = runners.get(name or "")
        if base is None or len(base.turns) != len(runner.turns):
            continue
        for clock in ("wall", "cpu"):
            own, other = (_rates(each, f"{clock}_seconds") for each in (runner, base))
            row[f"times_{label}_by_{clock}"] = _spread(
                (a / b for a, b in zip(own, other, strict=True)), 3 if label == "bare" else 2
            )
    row["turns"] = runner.turns
    return row


def table(rows: list[dict[str, Any]]) -> str:
    titles = (
        ("img/s", 9),
        ("CPU ms/img", 12),
        ("x bare", 9),
        ("(CPU)", 8),
        ("x tv", 8),
        ("(CPU)", 8),
        ("start", 9),
    )
    lines = ["variant".ljust(24) + "".join(title.rjust(width) for title, width in titles)]
    for row in rows:
        if "problem" in row:
            lines.append(f"{row['name']:24}  {row['problem']}")
            continue
        cells = [
            (row["images_per_second"], "9.0f"),
            (row["cpu_ms_per_image"], "12.2f"),
            (row.get("times_bare_by_wall"), "9.2f"),
            (row.get("times_bare_by_cpu"), "8.2f"),
            (row.get("times_torchvision_by_wall"), "8.1f"),
            (row.get("times_torchvision_by_cpu"), "8.1f"),
        ]
        numbers = "".join(
            format(cell["median"], shape) if cell else " " * int(shape.split(".")[0]) for cell, shape in cells
        )
        lines.append(f"{row['name']:24}{numbers}{row['start_seconds']:9.1f}")
    return "\n".join(lines)


def lay_out(shards: Path, folder: Path) -> int:
    """The JPEG images of the shards as `images/CLASS/NUMBER.jpg`, and links in `tars`; returns how many."""
    count = 0
    (folder / "tars").mkdir()
    for shard in Manifest.load(shards).split("train").shards:
        (folder / "tars" / shard.path.name).symlink_to(shard.path.resolve())
        with tarfile.open(shard.path) as tar:
            files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
            for name, file in files.items():
                key, _, extension = name.partition(".")
                if extension not in ("jpg", "jpeg") or file is None:
                    continue
                label = files.get(f"{key}.cls")
                path = folder / "images" / f"{int(label.read()) if label else 0:04d}" / f"{count:08d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())
                count += 1
    return count


def versions(python: str, packages: Iterable[str]) -> dict[str, str]:
    """Of the packages that the interpreter has."""
    program = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    found = json.loads(subprocess.run([python, "-c", program], capture_output=True, check=True).stdout)
    return {name: found[name] for name in sorted(set(packages)) if name in found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, default=SHARDS, help="folder with an index of JPEG shards")
    parser.add_argument("--cifar", type=Path, default=CIFAR, help="folder with an index of 32 px shards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="least length of a turn")
    parser.add_argument("--budget-seconds", type=float, default=480.0, help="of the whole run")
    parser.add_argument(
        "--only", action="append", default=[], help="variants whose name contains this; again for more"
    )
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    end = time.monotonic() + arguments.budget_seconds
    chosen = [
        variant
        for variant in VARIANTS
        if not arguments.only or any(part in variant.name for part in arguments.only)
    ]
    try:
        Manifest.load(arguments.shards)
    except DataError as error:
        print(f"{error}; --shards names a folder of ImageNet-like JPEG shards", file=sys.stderr)
        return 2
    if not (arguments.cifar / "index.json").is_file():
        print(f"{arguments.cifar}: no index, so nothing is measured on 32 px images; --cifar names a folder")
        chosen = [variant for variant in chosen if not variant.name.startswith("cifar")]
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the `finally` below
    runners: list[Runner] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        try:
            num_images = lay_out(arguments.shards, folder)
            for variant in chosen:
                if time.monotonic() > end - (1 - START_RATIO) * arguments.budget_seconds:
                    print(f"{variant.name} and the rest: no time; raise --budget-seconds", file=sys.stderr)
                    break
                runners.append(start(variant, arguments, folder))
                print(f"{variant.name}: {runners[-1].problem or 'ready'}", file=sys.stderr)
            rounds = take_turns(runners, arguments.rounds, arguments.seconds, end)
        finally:
            for runner in runners:
                runner.dismiss()
            last = time.monotonic() + GRACE_SECONDS
            for runner in runners:
                runner.kill(max(0.0, last - time.monotonic()))
    by_name = {runner.variant.name: runner for runner in runners}
    rows = [summarise(runner, by_name) for runner in runners]
    peers = [variant.package for variant in chosen if variant.package]
    result = {
        "command": "make bench-data" + (" PEERS=peers/bin/python" if arguments.peers_python else ""),
        "what": "two SimCLR views of 224 px of each JPEG; medians over rounds, ratios within a round",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "images": num_images,
        "rounds": rounds,
        "rows": rows,
        "machine": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]},
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "simplejpeg", "numpy")}
        | versions(arguments.peers_python, [*peers, "pillow"]),
    }
    print(table(rows))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
