"""Panels of a dashboard as small SVG, with what their queries gave."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.metrics.dashboards.panels import Panel
from pretrain.report.chart import Axis, nice_ticks, path_of
from pretrain.report.curves import Series
from pretrain.report.markup import Markup, join, tag
from pretrain.report.palette import SERIES_LIGHT, heat_stops

COLORS = {"green": "#1a7f37", "yellow": "#b08800", "red": "#cf222e"}
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
LEGEND_PX = 17
MOST_NAMED = 13
LINES = (*SERIES_LIGHT, "#b3123f", "#5f7f00", "#00767a", "#a06a50", "#31408f")

STYLE = """
body { margin: 14px; width: 1400px; background: #f4f5f5; color: #24292e; 
  font: 13px/1.3 system-ui, sans-serif }
h1 { font-size: 20px; margin: 0 0 10px } h3 { font-size: 13px; margin: 0; font-weight: 600; height: 18px }
.board { position: relative } .board > div { position: absolute; box-sizing: border-box }
.row { font-weight: 600; font-size: 15px; padding-top: 3px }
.panel { background: #fff; border: 1px solid #dcdfe2; border-radius: 3px; padding: 6px 8px; overflow: hidden }
.none { color: #6a737d; text-align: center; padding-top: 24px }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 11.5px; line-height: 17px }
.legend i { display: inline-block; width: 14px; height: 3px; margin: 0 5px 3px 0; vertical-align: middle }
.legend b { font-weight: 600; margin-left: 4px }
svg text { font-size: 11px; fill: #57606a } svg { display: block }
.stats { display: flex; gap: 18px; justify-content: center; align-items: center; height: calc(100% - 18px);
  flex-wrap: wrap; text-align: center } .stats b { display: block; font-weight: 600 }
"""


@dataclass(frozen=True)
class Drawn:
    """One series: its name and its (unix time, value) pairs."""

    name: str
    points: list[tuple[float, float]]

    @property
    def last(self) -> float:
        return self.points[-1][1]


def drawn_panel(panel: Panel, series: Sequence[Drawn], width: float, height: float) -> Markup:
    if not series:
        return tag("div", "No data", class_="none")
    if panel.kind == "stat":
        return _stats(panel, series, width)
    if panel.kind == "heatmap":
        return _heatmap(series, width - 18, height - 34)
    return _lines(panel, series, width - 18, height - 34)


def shown(value: float, unit: str) -> str:
    """A number with its unit, as Grafana would write it."""
    if math.isnan(value):
        return "NaN"
    if unit == "percentunit":
        return f"{_short(100 * value)} %"
    if unit == "dateTimeFromNow":
        return f"{_scaled(time.time() - value / 1000, TIMES, 's')} ago"
    if unit == "s":
        return _scaled(value, TIMES, "s")
    if unit == "bytes":
        return _scaled(value, BINARY, "B")
    if unit == "Bps":
        return _scaled(value, BINARY, "B") + "/s"
    if unit == "flops":
        return _prefixed(value) + "FLOP/s"
    if unit == "none":
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else _short(value)
    return _prefixed(value).strip() + unit.removeprefix("suffix:").removeprefix("short")


def _short(value: float) -> str:
    """Three digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(decimals, 5)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scaled(value: float, sizes: Sequence[tuple[float, str]], smallest: str) -> str:
    for size, name in sizes:
        if abs(value) >= size:
            return f"{_short(value / size)} {name}"
    return f"{_short(value)} {smallest}"


def _prefixed(value: float) -> str:
    for size, name in PREFIXES:
        if abs(value) >= size:
            return f"{_short(value / size)} {name}"
    return f"{_short(value)} "


def _color(panel: Panel, value: float) -> str:
    color = panel.base
    for limit, above in panel.limits:
        if value >= limit:
            color = above
    return COLORS[color]


def _stats(panel: Panel, series: Sequence[Drawn], width: float) -> Markup:
    if panel.shows_name:
        return tag("div", tag("span", series[0].name), class_="stats")
    texts = [
        f"{one.last:.{panel.decimals}f}" if panel.decimals is not None else shown(one.last, panel.unit)
        for one in series
    ]
    size = min(30.0, 1.5 * width / len(series) / max(map(len, texts)))
    parts = []
    for one, text in zip(series, texts, strict=True):
        style = f"font-size:{size:.0f}px;color:{_color(panel, one.last)}"
        name = one.name if len(series) > 1 else ""
        parts.append(tag("span", tag("b", text, style=style), name))
    return tag("div", *parts, class_="stats")


def _lines(panel: Panel, series: Sequence[Drawn], width: float, height: float) -> Markup:
    letters = sum(len(one.name) + 14 for one in series[:MOST_NAMED])
    height -= math.ceil(letters * 6.4 / width) * LEGEND_PX
    stacked = _stacked(series) if panel.is_stacked else list(series)
    values = [value for one in stacked for _, value in one.points if math.isfinite(value)]
    low, high = _range(panel, values)
    size = _binary_size(high) if panel.unit in ("bytes", "Bps") else 1.0
    ticks = [size * tick for tick in nice_ticks(low / size, high / size, 4)]
    labels = [shown(tick, panel.unit) for tick in ticks]
    across, up = _axes(stacked, low, high, 8 + 6.3 * max(map(len, labels)), width, height)
    parts = _grid(across, up, ticks, labels)
    for limit, color in panel.limits:
        if low <= limit <= high:
            y = up(limit)
            parts.append(tag("line", x1=across.begin, x2=across.end, y1=y, y2=y, stroke=COLORS[color],
                             stroke_dasharray="4 4", stroke_opacity=0.6))  # fmt: skip
    lower = [(at, 0.0) for at, _ in stacked[0].points]
    for place, one in enumerate(stacked):
        color = LINES[place % len(LINES)]
        if panel.is_stacked:
            edge = [*one.points, *reversed(lower)]
            path = "M" + "L".join(f"{across(at):.1f} {up(value):.1f}" for at, value in edge) + "Z"
            parts.append(tag("path", d=path, fill=color, fill_opacity=0.7))
            lower = one.points
        else:
            parts.append(tag("path", d=_path(one, across, up), fill="none", stroke=color, stroke_width=1.5))
    drawing = tag("svg", *parts, width=f"{width:.0f}", height=f"{height:.0f}")
    return join([drawing, _legend(panel, series)])


def _path(one: Drawn, across: Axis, up: Axis) -> str:
    """Broken where scrapes are missing."""
    steps: list[float] = []
    values: list[float | None] = []
    for at, value in one.points:
        if steps and at - steps[-1] > 6:
            steps.append(at - 1)
            values.append(None)
        steps.append(at)
        values.append(value if math.isfinite(value) else None)
    return path_of(Series(one.name, tuple(steps), tuple(values)), across, up)


def _range(panel: Panel, values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if panel.low is not None:
        low = min(low, panel.low)
    if panel.high is not None:
        high = max(high, panel.high)
    if high == low:
        high, low = (high + 1.0, low) if low == 0 else (high + 0.1 * abs(high), low - 0.1 * abs(low))
    return low, high + (0.0 if panel.high is not None else 0.05 * (high - low))


def _binary_size(value: float) -> float:
    return next((size for size, _ in BINARY if value >= size), 1.0)


def _axes(
    series: Sequence[Drawn], low: float, high: float, left: float, width: float, height: float
) -> tuple[Axis, Axis]:
    times = [at for one in series for at, _ in one.points]
    last = max(times)
    return Axis(min(*times, last - 1), last, left, width - 6), Axis(low, high, height - 20, 8)


def _grid(across: Axis, up: Axis, ticks: Sequence[float], labels: Sequence[str]) -> list[Markup]:
    parts: list[Markup] = []
    for tick, label in zip(ticks, labels, strict=True):
        y = up(tick)
        parts.append(tag("line", x1=across.begin, x2=across.end, y1=y, y2=y, stroke="#e8eaec"))
        parts.append(tag("text", label, x=across.begin - 5, y=y + 4, text_anchor="end"))
    every = next(
        step
        for step in (15, 30, 60, 120, 300, 900, 3600)
        if (across.high - across.low) / step <= (across.end - across.begin) / 75
    )
    at = math.ceil(across.low / every) * every
    while at <= across.high:
        x, label = across(at), time.strftime("%H:%M:%S" if every < 60 else "%H:%M", time.localtime(at))
        parts.append(tag("line", x1=x, x2=x, y1=up.end, y2=up.begin, stroke="#f0f1f2"))
        if across.begin + 20 < x < across.end - 20:
            parts.append(tag("text", label, x=x, y=up.begin + 15, text_anchor="middle"))
        at += every
    return parts


def _legend(panel: Panel, series: Sequence[Drawn]) -> Markup:
    entries = []
    for place, one in enumerate(series[:MOST_NAMED]):
        line = tag("i", style=f"background:{LINES[place % len(LINES)]}")
        entries.append(tag("span", line, one.name, tag("b", shown(one.last, panel.unit))))
    if len(series) > MOST_NAMED:
        entries.append(tag("span", f"and {len(series) - MOST_NAMED} more"))
    return tag("div", *entries, class_="legend")


def _stacked(series: Sequence[Drawn]) -> list[Drawn]:
    """Each on top of those before it, at the times that any of them has."""
    times = sorted({at for one in series for at, _ in one.points})
    below = dict.fromkeys(times, 0.0)
    stacked = []
    for one in series:
        own = dict(one.points)
        below = {at: below[at] + own.get(at, 0.0) for at in times}
        stacked.append(Drawn(one.name, list(below.items())))
    return stacked


def _heatmap(series: Sequence[Drawn], width: float, height: float) -> Markup:
    """Buckets of a histogram, from cumulative counts: the more, the lighter."""
    limits = sorted((float(one.name), dict(one.points)) for one in series)
    times = sorted({at for _, points in limits for at in points})
    counts = [
        [max(0.0, points.get(at, 0.0) - (limits[row - 1][1].get(at, 0.0) if row else 0.0)) for at in times]
        for row, (_, points) in enumerate(limits)
    ]
    used = [row for row, cells in enumerate(counts) if any(cells)] or [0]
    rows = range(max(0, used[0] - 1), min(len(limits), used[-1] + 2))
    most = max(max(counts[row]) for row in rows) or 1.0
    across = Axis(times[0], times[-1] + 2, 60, width - 6)
    cell = (height - 28) / len(rows)
    colors = heat_stops()
    parts = []
    for place, row in enumerate(rows):
        y = height - 20 - (place + 1) * cell
        bound = limits[row][0]
        label = "more" if math.isinf(bound) else f"≤ {shown(bound, 's')}"
        parts.append(tag("text", label, x=54, y=y + cell / 2 + 4, text_anchor="end"))
        for at, count in zip(times, counts[row], strict=True):
            if count > 0:
                color = colors[min(len(colors) - 1, int((count / most) ** 0.5 * len(colors)))]
                wide = across(at + 2) - across(at) + 0.3
                parts.append(tag("rect", x=across(at), y=y, width=wide, height=cell - 1, fill=color))
    first, last = (time.strftime("%H:%M:%S", time.localtime(at)) for at in (times[0], times[-1]))
    parts.append(tag("text", first, x=60, y=height - 5))
    parts.append(tag("text", last, x=width - 6, y=height - 5, text_anchor="end"))
    return tag("svg", *parts, width=f"{width:.0f}", height=f"{height:.0f}")
