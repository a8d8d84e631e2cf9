"""The command line of `pretrain export`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from pretrain.errors import EXIT_FAILED
from pretrain.export.formats import ALL, DEFAULT, FORMATS, chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="a run folder or one checkpoint (default: the newest finished run below runs)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write; of several formats each gets DIR/FORMAT (default: RUN/exported for timm, "
        "RUN/exported-formats/FORMAT for the others)",
    )
    parser.add_argument(
        "--weights", choices=("teacher", "student"), help="default: teacher if the run has one"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        default=[DEFAULT],
        metavar="F",
        help=f"{ALL}, or any of: {'; '.join(f'{name}: {about}' for name, about in FORMATS.items())}",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--img-px", type=_positive, metavar="N", help="for images of N x N px")
    size.add_argument(
        "--grid", type=_positive, nargs=2, metavar=("R", "C"), help="for a grid of R x C patch tokens"
    )
    parser.add_argument(
        "--global-pool",
        choices=("token", "avg"),
        help="how features are pooled, behind the trained norm (default: the class token if there is one)",
    )
    parser.add_argument(
        "--drop-registers", action="store_true", help="leave the task tokens away; says what that changes"
    )
    parser.add_argument(
        "--license", type=_word, default="other", metavar="ID", help="of the weights, for the model card"
    )
    parser.add_argument(
        "--tag", type=_word, metavar="T", help="timm's name for the weights (default: <tasks>_<data>)"
    )


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    names = chosen(arguments.format)

    from pretrain.export.exporting import Target, export_run
    from pretrain.export.find_run import newest_run
    from pretrain.export.options import ExportOptions
    from pretrain.export.parity import ParityError
    from pretrain.export.source import is_checkpoint
    from pretrain.export.told import lines_of, table_of

    source = arguments.run
    if source is None:
        source, why = newest_run()
        say(f"run          {source} ({why})")
    home = source.resolve().parent.parent if is_checkpoint(source) else source
    targets = [Target(name, _place(name, len(names), arguments.out, home)) for name in names]
    options = ExportOptions(
        weights=arguments.weights,
        img_px=arguments.img_px,
        grid=tuple(arguments.grid) if arguments.grid else None,
        global_pool=arguments.global_pool,
        drop_registers=arguments.drop_registers,
        license=arguments.license,
        tag=arguments.tag,
    )
    try:
        done = export_run(source, targets, options, skip_impossible=ALL in arguments.format)
    except ParityError as error:
        say(f"export failed, and nothing was written: {error}")
        raise SystemExit(EXIT_FAILED) from None
    for line in lines_of(done):
        say(line)
    if len(done) > 1:
        say("\n" + table_of(done))


def _place(name: str, num_formats: int, out: Path | None, home: Path) -> Path:
    """The folder of a format. Only what `pretrain evaluate` opens by default is directly in the run's own."""
    if out is not None:
        return out if num_formats == 1 else out / name
    return home / "exported" if name == DEFAULT else home / "exported-formats" / name


def _word(text: str) -> str:
    """It goes into YAML, JSON and names of files."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain word of letters, digits and . _ + -")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
