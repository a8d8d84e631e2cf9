"""Queries and panels; their units and descriptions come from the metrics they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.metrics.names import Metric, Unit

Kind = Literal["timeseries", "stat", "heatmap"]

# of the table -> of Grafana; a date is shown from milliseconds
GRAFANA_UNITS: dict[Unit, str] = {
    "count": "short",
    "seconds": "s",
    "bytes": "bytes",
    "ratio": "percentunit",
    "per_second": "suffix: /s",
    "flops": "flops",
    "nats": "suffix: nats",
    "timestamp": "dateTimeFromNow",
    "number": "none",
}
PER_SECOND = "suffix: /s"  # of counts, as a rate

OF_RUN = 'run="$run"'
OF_RANK = 'run="$run",rank=~"$rank"'
WINDOW = "[$__rate_interval]"  # which Grafana makes at least four scrapes long
RANK_LEGEND = "rank {{rank}} ({{node}})"
WHOLE_RANGE = "[$__range]"

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True)
class Query:
    """An expression, and the name of each of its series: `{{label}}` stands for a label's value."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One picture.

    limits: (value, colour from there on); the first colour, below them all, is green unless `base` says so.
    """

    title: str
    queries: tuple[Query, ...]
    unit: str  # as Grafana names it
    help: str
    kind: Kind = "timeseries"
    width: int = 8  # of 24
    limits: tuple[tuple[float, str], ...] = ()
    base: str = GREEN
    low: float | None = None  # of the axis
    high: float | None = None
    is_stacked: bool = False
    decimals: int | None = None
    shows_name: bool = False  # of the series, in place of the number


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One page. slug: ends its address and names its file."""

    slug: str
    title: str
    help: str
    rows: tuple[Row, ...]
    has_nodes: bool = False  # shows machines, so they can be chosen


def select(metric: Metric, labels: str = "", suffix: str = "") -> str:
    """The series of a metric in the chosen run; in the chosen ranks, where each has its own."""
    chosen = OF_RANK if metric.scope == "rank" else OF_RUN
    return f"{metric.name}{suffix}{{{chosen}{',' if labels else ''}{labels}}}"


def recorded(name: str) -> str:
    """A recording rule in the chosen run."""
    return f"{name}{{{OF_RANK if name.startswith('rank:') else OF_RUN}}}"


def rate(metric: Metric, labels: str = "", suffix: str = "") -> str:
    return f"rate({select(metric, labels, suffix)}{WINDOW})"


def gained(metric: Metric, window: str = WINDOW, by: str = "") -> str:
    """What a counter has gained: since the point before, or over all that is shown."""
    total = f"increase({select(metric)}{window})"
    return f"sum by ({by}) ({total})" if by else f"sum({total})"


def mean_seconds(metric: Metric, by: str, labels: str = "") -> str:
    """The mean of a histogram's observations; where there were any."""
    total, count = rate(metric, labels, "_sum"), rate(metric, labels, "_count")
    return f"sum by ({by}) ({total}) / (sum by ({by}) ({count}) > 0)"


def quantile(metric: Metric, share: float, by: str = "") -> str:
    by = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({by}) ({rate(metric, suffix='_bucket')}))"


def legend_of(metric: Metric) -> str:
    """Every label that tells the series of a metric apart within a run."""
    own = [RANK_LEGEND] if metric.scope == "rank" else []
    return " ".join([*(f"{{{{{label}}}}}" for label in metric.labels), *own])


def show(metric: Metric, title: str, *, legend: str | None = None, **look: Any) -> Panel:
    """The panel of one gauge as it is. look: fields of Panel."""
    expr = select(metric)
    if metric.unit == "timestamp":
        expr += " * 1000"
    query = Query(expr, legend_of(metric) if legend is None else legend)
    return Panel(title, (query,), GRAFANA_UNITS[metric.unit], told(metric), **look)


def draw(
    title: str, unit: str, metrics: Sequence[Metric], *queries: Query, note: str = "", **look: Any
) -> Panel:
    """The panel of expressions over some metrics. note: what the description says before them."""
    help_text = "\n\n".join([*([note] if note else []), told(*metrics)])
    return Panel(title, queries, unit, help_text, **look)


def told(*metrics: Metric) -> str:
    return "\n\n".join(f"`{metric.name}`: {metric.help}" for metric in metrics)
