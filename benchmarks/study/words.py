"""How numbers, times and tables of the document are written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from study.compare import Difference

EMPTY = "–"  # noqa: RUF001
NOT_MEASURED = "not measured"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def at(settings: Any, path: str) -> Any:
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return EMPTY if value is None else str(value)


def plain_mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4g}" if values else EMPTY


def spread(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def told(found: Difference | None) -> str:
    if found is None:
        return NOT_MEASURED
    interval = "" if found.low is None else f"{found.low:+.2f} to {found.high:+.2f}, "
    return f"{found.mean:+.2f} ({interval}n = {found.n})"


def told_with_verdict(found: Difference | None) -> str:
    """With the interval, in bold where the rule has a winner; the number of seeds where it has too few."""
    if found is None:
        return EMPTY
    if found.verdict == "too few seeds":
        return f"{found.mean:+.2f} (n = {found.n})"
    clear = "" if found.verdict == "no difference shown" else f" **{found.verdict}**"
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}){clear}"


def duration(hours: float, of: str = "") -> str:
    return f"{hours:.1f} {of}hours" if hours >= 1 else f"{60 * hours:.1f} {of}minutes"


def listed(words: str, names: Sequence[str]) -> str:
    return f"{words}: {'; '.join(names)}." if names else ""
