"""A segmentation's result as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def format_result(result: dict[str, Any], folder: Path) -> str:
    """Every class, then the means beside those of the baselines; all in percent."""
    total = result["num_pixels"]
    rows = [("class", "pixels %", "IoU %", "accuracy %")]
    rows += [
        (row["name"], _percent(row["num_pixels"] / total), _percent(row["iou"]), _percent(row["accuracy"]))
        for row in result["classes"]
    ]
    summary = [("", "mIoU %", "mAcc %", "pixel accuracy %"), _means("trained", result)]
    for name, found in result["baselines"].items():
        label = f"always '{found['class']}'" if name == "majority" else "before the first step"
        summary.append(_means(label, found))
    lines = [_aligned(rows), "", _aligned(summary), "", f"results   {folder / 'result.json'}"]
    if result["pictures"]:
        lines.append(f"pictures  {result['pictures']}")
    return "\n".join(lines)


def _means(label: str, found: dict[str, Any]) -> tuple[str, ...]:
    return (label, *(_percent(found[key]) for key in ("miou", "macc", "pixel_accuracy")))


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
