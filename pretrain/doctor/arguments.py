"""The command line of `pretrain doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from pretrain.errors import EXIT_DONE, EXIT_USER_ERROR

EXIT_CODES = (
    "exit codes: 0 no error was found (there may be warnings), 2 errors were found, or RUN is no run folder "
    "(one line says so)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, live or dead")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--verify", action="store_true", help="compare the bytes of every checkpoint with its checksums"
    )


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from pretrain.doctor.diagnosis import diagnose
    from pretrain.doctor.printing import as_json, as_text
    from pretrain.doctor.run_files import read_run

    diagnosis = diagnose(read_run(arguments.run, hash_all=arguments.verify))
    say(as_json(diagnosis) if arguments.json else as_text(diagnosis))
    return EXIT_USER_ERROR if diagnosis.num_of("error") else EXIT_DONE
