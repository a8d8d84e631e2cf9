"""The result of a detection as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
WHAT = {"bbox": "box", "segm": "mask"}


def table(result: dict[str, Any]) -> str:
    """Trained, before training, and without looking; then category by category if there are several."""
    lines = _aligned([("%", "", *COLUMNS), *_rows(result)])
    if len(result["val"]["categories"]) > 1:
        kinds = list(result["scores"])
        rows = [
            (name, *(_number(result["scores"][kind]["per_category"][name]) for kind in kinds))
            for name in result["scores"]["bbox"]["per_category"]
        ]
        lines += ["", *_aligned([("category", *(f"{WHAT[kind]} AP" for kind in kinds)), *rows])]
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for kind, scores in result["scores"].items():
        yield _row(kind, f"after {result['step']} steps", scores)
        if "at_limit" in scores:
            at = scores["at_limit"]
            values = {**at, "AR100": at[f"AR{at['limit']}"]}
            yield _row(kind, f"with up to {at['limit']} an image", values)
        if result.get("initial"):
            yield _row(kind, "before training", result["initial"][kind])
        for name, of_kind in result["baselines"].items():
            yield _row(kind, f"one box: {name.replace('_', ' ')}", of_kind[kind])


def _row(kind: str, name: str, scores: dict[str, Any]) -> tuple[str, ...]:
    return (WHAT[kind], name, *(_number(scores[column]) for column in COLUMNS))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if number > 1 or (number and len(row) < 4) else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
