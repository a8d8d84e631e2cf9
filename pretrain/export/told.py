"""What an export prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.export.export_report import left_out_of
from pretrain.export.exporting import Exported, Impossible

WORDS = {
    "written": "written",
    "replaced": "written; it replaces an older export",
    "up to date": "is up to date",
    "new results": "is up to date; its model card has new results",
}


def lines_of(done: Sequence[Exported | Impossible]) -> Iterator[str]:
    """What was done, changed and proved; how to load it."""
    reports = [each.report for each in done if isinstance(each, Exported)]
    if reports:
        first = reports[0]
        yield f"weights      {first.architecture}, {first.source_weights} of step {first.source_step}"
        yield from (f"changed      {change['told']}" for change in first.changes)
    for each in done:
        if isinstance(each, Impossible):
            yield f"{each.target.format:<12} impossible: {each.why}"
            continue
        yield f"{each.target.format:<12} {_shown(each.target.out)}: {WORDS[each.state]}"
        yield f"             {each.report.consumer}: {each.report.mapping}; {each.report.agreement}"
        if each.report.left_out:
            yield f"             left out: {left_out_of(each.report.left_out)}"
        if each.report.note:
            yield f"             {each.report.note}"
        if each.kept is not None:
            yield f"             the older one had been changed, and was kept as {_shown(each.kept)}"
        if each.target.format == "timm":
            yield f"load         timm.create_model('local-dir:{_shown(each.target.out)}', pretrained=True)"


def table_of(done: Sequence[Exported | Impossible]) -> str:
    """One row for each format: largest difference of a feature, against what."""
    rows = [("format", "tensors", "largest difference", "limit", "against")]
    for each in done:
        if isinstance(each, Impossible):
            rows.append((each.target.format, "", "impossible", "", ""))
            continue
        report = each.report
        numbers = ("not compared", "")
        if report.max_abs_difference is not None and report.tolerance is not None:
            numbers = (f"{report.max_abs_difference:.2g}", f"{report.tolerance:.2g}")
        rows.append(
            (each.target.format, f"{len(report.matched)} of {report.num_tensors}", *numbers, report.consumer)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def _shown(path: Path) -> str:
    """As the user would type it from where he is."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
