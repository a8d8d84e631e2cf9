"""Step times side by side on this machine: tasks, engines, pixels, ranks, peers. Run by `make bench`.

Every table is a program of its own, on one thread of one core; as many run at a time as there are cores (two
at most), but the one of two ranks, which comes last and alone. Variants of a table take turns, and what
counts is the median of the ratios within rounds. The result is one JSON file.

    python benchmarks/step.py --out benchmarks/results/step-cpu.json
    python benchmarks/step.py --only simclr --only dino      some tables
    python benchmarks/step.py --readme README.md             write the kept result into the README
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from result import machine, versions, write
from steps import report
from steps.ours import ROOT, Setting

# name -> module and function of it; the longest first, so that two at a time end together
TABLES = {
    "core": "core:core",
    "moco_v3": "peers:moco_v3",
    "moco_v2": "peers:moco_v2",
    "dino": "peers:dino",
    "simclr": "peers:simclr",
    "compiled": "compiled:compiled",
    "passes": "core:passes",
    "mae": "peers:mae",
    "supervised": "peers:supervised",
    "pixels": "pixels:pixels",
    "small": "core:small",
}
ALONE = {"ranks": "ranks:ranks"}
PEERS = ("simclr", "moco_v2", "moco_v3", "dino", "mae", "supervised")
SHOWN = ("core", "small", "passes", "ranks", "compiled", "pixels", *PEERS)
SHARDS = ("imagenet-sample", "sample")  # below data_shards; the second is what `make shards` draws
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "lightly", "kornia")
RESULT = ROOT / "benchmarks" / "results" / "step-cpu.json"


def shards_there_are() -> Path:
    folders = [ROOT / "data_shards" / name for name in SHARDS]
    return next((folder for folder in folders if (folder / "index.json").is_file()), folders[-1])


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """One table, in this process."""
    module, function = (TABLES | ALONE)[name].split(":")
    torch.set_num_threads(1)
    begin = time.monotonic()
    table: dict[str, Any] = getattr(importlib.import_module(f"steps.{module}"), function)(setting)
    return table | {"took_seconds": round(time.monotonic() - begin, 1)}


def measure_apart(name: str, cores: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """One table, in a process of its own that is kept to these cores."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        part = Path(folder) / "part.json"
        command = [
            sys.executable,
            __file__,
            "--part",
            name,
            "--out",
            str(part),
            "--shards",
            str(arguments.shards),
        ]
        command += [f"--core={core}" for core in cores]
        command += ["--toy"] if arguments.toy else []
        command += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            said = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return {"problem": f"failed: {said[:200]}"}
        table: dict[str, Any] = json.loads(part.read_text())
        return table


def measure_all(names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Tables side by side, one on each of two cores; then those that need the machine for themselves."""
    cores = sorted(os.sched_getaffinity(0))
    free: SimpleQueue[int] = SimpleQueue()
    for core in cores[:2]:
        free.put(core)

    def one(name: str) -> dict[str, Any]:
        core = free.get()
        try:
            return said(name, measure_apart(name, [core], arguments))
        finally:
            free.put(core)

    def said(name: str, table: dict[str, Any]) -> dict[str, Any]:
        print(
            f"{name}: {table.get('problem') or str(table['took_seconds']) + ' s'}",
            file=sys.stderr,
            flush=True,
        )
        return table

    together = [name for name in TABLES if name in names]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(together, pool.map(one, together), strict=True))
    found |= {name: said(name, measure_apart(name, cores[:2], arguments)) for name in ALONE if name in names}
    return {name: found[name] for name in SHOWN if name in found}


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SHOWN, help="this table; again for more")
    parser.add_argument("--part", choices=SHOWN, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, action="append", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help="in place of each table's own number")
    parser.add_argument(
        "--shards", type=Path, default=shards_there_are(), help="folder with an index of images"
    )
    parser.add_argument("--toy", action="store_true", help="networks of no use, to try the program")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--readme", type=Path, help="measure nothing: write the kept result's table in here")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.readme:
        readme = arguments.readme.read_text()
        shown = report.markdown(json.loads(RESULT.read_text()))
        arguments.readme.write_text(readme.replace(report.in_readme(readme), shown))
        return 0
    if not (arguments.shards / "index.json").is_file():
        print(
            f"{arguments.shards}: no index.json; run `make shards`, or name a folder by --shards",
            file=sys.stderr,
        )
        return 2
    if arguments.part:
        if arguments.core:
            os.sched_setaffinity(0, arguments.core)
        write(
            measure(arguments.part, Setting(arguments.shards, arguments.rounds, arguments.toy)), arguments.out
        )
        return 0
    before, begin = machine(), time.monotonic()
    tables = measure_all(arguments.only or list(SHOWN), arguments)
    result = {
        "command": "make bench",
        "arguments": given if given is not None else sys.argv[1:],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "what": "ratios of step times within rounds in which the variants take turns",
        "images": arguments.shards.name,
        "tables": tables,
        "took_seconds": round(time.monotonic() - begin),
        "threads": 1,
        "machine": before,
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }
    print(report.text(result))
    if arguments.out:
        write(result, arguments.out)
    return 1 if any("problem" in table for table in tables.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
