"""The table of metrics as it stands in the docs."""

from __future__ import annotations

from pretrain.metrics.names import METRICS, Metric

BEGIN, END = "<!-- metrics: made by python -m pretrain.metrics.dashboards -->", "<!-- end of metrics -->"


def with_table(page: str) -> str:
    """A page in Markdown with the table between its markers, whatever stood there."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no '{BEGIN}' ... '{END}'")
    return f"{head}{begin}\n{table()}{end}{tail}"


def table() -> str:
    rows = [
        "| metric | kind | unit | labels | of each | what it is |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*rows, *(_row(metric) for metric in METRICS)]) + "\n"


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    cells = (
        f"`{metric.name}`",
        metric.kind,
        metric.unit.replace("_", " "),
        labels,
        metric.scope,
        metric.help,
    )
    return f"| {' | '.join(cells)} |"
