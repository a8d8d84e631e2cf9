"""The command line of `pretrain export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or one checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--weights", choices=("teacher", "student"), help="default: teacher if the run has one"
    )


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    from pretrain.export.timm_folder import export_timm

    say(str(export_timm(arguments.run, arguments.out, arguments.weights)))
