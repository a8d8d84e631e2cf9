"""Writes docs/study.md and its figures from the stored records of the studies, and from nothing else.

`python benchmarks/study/report.py` reads benchmarks/results/study/<study>/: study.yaml, records of runs that
`pretrain sweep STUDY --results benchmarks/results/study` left there, and PNG pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.errors import UserError
from study.document import TEMPLATE, Document, render
from study.origin import RESULTS, ROOT
from study.records import read


def write(results: Path, page: Path, template: Path = TEMPLATE) -> None:
    """The page, and beside it the folder of its figures, without those of earlier times."""
    document = Document(read(results), page.with_suffix(""))
    page.write_text(render(document, template))
    for left in set(document.folder.glob("*.svg")) - set(document.drawn):
        left.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "study.md")
    arguments = parser.parse_args()
    if not arguments.results.is_dir():
        parser.error(f"--results {arguments.results}: no such folder")
    try:
        write(arguments.results, arguments.page)
    except UserError as error:
        parser.error(str(error))
