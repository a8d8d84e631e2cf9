"""Writes what is made from the table of metrics: the dashboards, and the table in the docs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.metrics.dashboards import DASHBOARDS
from pretrain.metrics.dashboards.grafana import to_json
from pretrain.metrics.dashboards.reference import with_table

ROOT = Path(__file__).parents[3]
FOLDER = Path("deploy/grafana/dashboards")
PAGE = Path("docs/monitoring.md")


def made(root: Path) -> dict[Path, str]:
    """Every file below `root` that is made here, and what it should hold."""
    files = {FOLDER / f"{dashboard.slug}.json": to_json(dashboard) for dashboard in DASHBOARDS}
    files[PAGE] = with_table((root / PAGE).read_text())
    return files


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.metrics.dashboards", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; end with 1 if a file is not up to date"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository (default: where this is)")
    arguments = parser.parse_args()
    old = [
        path
        for path, text in made(arguments.root).items()
        if not (file := arguments.root / path).is_file() or file.read_text() != text
    ]
    for path in old:
        if not arguments.check:
            (arguments.root / path).write_text(made(arguments.root)[path])
        sys.stdout.write(f"{path}: {'is not up to date' if arguments.check else 'written'}\n")
    return 1 if old and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
