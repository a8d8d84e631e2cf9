"""The command line of `pretrain plan`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file"
    )
    parser.add_argument("--nodes", type=_count, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=_count, required=True, metavar="G")
    parser.add_argument(
        "--gpu", metavar="NAME", help="such as h100 or a100 (default: h200, or what --measured is of)"
    )
    parser.add_argument(
        "--network",
        choices=("infiniband", "ethernet"),
        default="infiniband",
        help="between nodes: 400 Gb/s for each GPU (default), or 100 Gb/s for each node",
    )
    parser.add_argument(
        "--mfu",
        type=_ratio,
        metavar="R",
        help="utilisation of the dense peak (default: by the model's width)",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="PATH",
        help="results of `make bench-gpu`, a folder or a file, in the place of assumed numbers",
    )
    parser.add_argument(
        "--images", type=_count, metavar="N", help="of the training data (default: as its index says)"
    )
    parser.add_argument(
        "--images-per-core-second",
        type=_positive,
        default=400.0,
        metavar="R",
        help="that a CPU core decodes and crops; see `pretrain shards bench` (default: 400)",
    )
    parser.add_argument(
        "--disk-gb-per-second", type=_positive, default=1.0, metavar="R", help="for checkpoints (default: 1)"
    )
    parser.add_argument(
        "--node-mtbf-hours",
        type=_positive,
        default=1000.0,
        metavar="H",
        help="mean time to a failure of one node (default: 1000)",
    )
    parser.add_argument("--json", action="store_true", help="the same numbers as JSON")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def _ratio(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number
