"""The command line of `pretrain report`; `illustrate` reads the run and draws."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    parser.add_argument(
        "--images",
        metavar="SHARDS",
        help="DIR or DIR:split of the pictures shown (default: the run's own data)",
    )
    parser.add_argument(
        "--eval", metavar="SHARDS", help="DIR or DIR:split: t-SNE of it, and queries for nearest neighbours"
    )
    parser.add_argument(
        "--train", metavar="SHARDS", help="DIR or DIR:split where neighbours are looked for (default: --eval)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what there is")
