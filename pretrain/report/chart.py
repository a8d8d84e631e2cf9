"""Line charts as small inline SVG: drawn for the width of a phone, where their text is still 11 px high.

A chart is 360 units wide and is never shown narrower than 330 px, so 12.5 units are 11.4 px or more. Colours
and dashes are classes of the page's style, so one drawing serves light and dark paper and a printer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.report.curves import Series
from pretrain.report.markup import Markup, join, tag

WIDTH, HEIGHT = 360, 204
TOP, RIGHT, BOTTOM = 20, 12, 36
CHAR_WIDTH = 6.9  # of a digit, at the font's 12.5 units
MAX_POINTS = 300  # of a line; more than there are pixels say nothing
SMOOTH_FROM = 40  # records, from which on a mean over the neighbours is drawn over the pale line
ABSENT = "\N{EN DASH}"  # for a number that is not there
MAX_LABELLED = 4  # marks; more would write over each other


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: float
    label: str
    is_alarm: bool = False


@dataclass(frozen=True)
class Chart:
    """What is drawn: `lines` with their own colours, `reference` dashed, such as chance."""

    title: str
    lines: tuple[Series, ...]
    reference: Series | None = None
    marks: tuple[Mark, ...] = ()
    unit: str = ""  # behind the numbers of the legend
    num_steps: float | None = None  # of the whole run, if the axis is to show what is left


@dataclass(frozen=True)
class Axis:
    """From numbers to units of the drawing."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def line_chart(chart: Chart) -> Markup:
    """A figure with its title, the drawing and a legend that names every line and where it ended."""
    lines = [line for line in chart.lines if line.known]
    shown = [*lines, *([chart.reference] if chart.reference else [])]
    low, high = value_range(lines, chart.reference)
    ticks = nice_ticks(low, high, 4)
    left = 10 + CHAR_WIDTH * max(len(tick_label(tick, ticks)) for tick in ticks)
    steps = [step for line in shown for step in line.steps]
    last = max(*steps, chart.num_steps or 0.0)
    first = min(*steps, 0.0) if chart.num_steps else min(steps)
    if last <= first:
        last = first + 1
    across = Axis(first, last, left, WIDTH - RIGHT)
    up = Axis(low, high, HEIGHT - BOTTOM, TOP)
    outside = _outside(lines, low, high)
    drawing = tag(
        "svg",
        _grid(across, up, ticks),
        _marks(chart.marks, across),
        _window(
            left - 4,
            *[_line(line, place, across, up) for place, line in enumerate(lines)],
            _reference(chart.reference, across, up) if chart.reference else None,
        ),
        _arrows(outside, across),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=_spoken(chart, lines),
        class_="chart",
    )
    return tag(
        "figure",
        tag("h4", chart.title),
        drawing,
        _legend(chart, lines),
        tag("p", outside[2], class_="aside") if outside[2] else None,
        class_="card",
    )


def value_range(lines: Sequence[Series], reference: Series | None = None) -> tuple[float, float]:
    """The part of the axis that is worth showing: without the first moments and single spikes, where these
    would press everything else flat."""
    values: list[float] = []
    core: list[float] = []
    for line in lines:
        known = line.known
        values += known
        later = sorted(known[max(1, len(known) // 10) :] or known)
        core += later[len(later) // 100 : len(later) - len(later) // 100] or later
    held = reference.known if reference else []
    low, high = min([*core, *held]), max([*core, *held])
    span = high - low
    if max(values) <= high + 1.5 * span or span == 0:
        high = max(high, *values)
    if min(values) >= low - 1.5 * span or span == 0:
        low = min(low, *values)
    span = high - low or max(abs(high), 1e-6) * 0.1
    return low - 0.06 * span, high + 0.06 * span


def nice_ticks(low: float, high: float, about: int, least: float = 0.0) -> list[float]:
    """Round numbers within a range: 1, 2 or 5 times a power of ten, and at least `least`, apart."""
    power = 10.0 ** math.floor(math.log10(max((high - low) / about, least)))
    steps = [factor * power for factor in (1, 2, 5, 10) if factor * power >= least]
    step = next(step for step in steps if (high - low) / step <= about + 1)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """With as many decimals as tell the ticks apart; very large and very small ones as powers of ten."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    largest = max(abs(tick) for tick in ticks)
    if largest >= 1e5:
        for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if largest >= unit:
                return _trimmed(value / unit, step / unit) + (sign if value else "")
    if 0 < largest < 1e-3:
        if value == 0:
            return "0"
        exponent = math.floor(math.log10(largest))
        return f"{_trimmed(value / 10.0**exponent, step / 10.0**exponent)}e{exponent}"
    return _trimmed(value, step)


def number(value: float | None) -> str:
    """A number for a sentence or a table: four significant digits at most."""
    if value is None:
        return ABSENT
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    shown = f"{value:.{min(decimals, 4)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def thinned(line: Series, most: int = MAX_POINTS) -> Series:
    """At most `most` points and the gaps: of each stretch the smallest and the largest value, so no spike is
    lost."""
    if len(line.steps) <= most:
        return line
    kept: list[int] = []
    num = most // 2
    for part in range(num):
        begin, end = part * len(line.steps) // num, (part + 1) * len(line.steps) // num
        here = [i for i in range(begin, end) if line.values[i] is not None]
        if not here:
            kept.append(begin)
            continue
        extremes = {
            min(here, key=lambda i: line.values[i] or 0.0),
            max(here, key=lambda i: line.values[i] or 0.0),
        }
        kept += sorted(extremes)
    return replace(line, steps=tuple(line.steps[i] for i in kept), values=tuple(line.values[i] for i in kept))


def smoothed(line: Series) -> Series:
    """The mean over the neighbours within a fiftieth of the records to either side."""
    reach = max(1, len(line.values) // 50)
    sums, counts = [0.0], [0]
    for value in line.values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    means: list[float | None] = []
    for place, value in enumerate(line.values):
        near = min(reach, place, len(line.values) - 1 - place)  # the same to both sides, lest the ends lag
        begin, end = place - near, place + near + 1
        count = counts[end] - counts[begin]
        means.append((sums[end] - sums[begin]) / count if count and value is not None else None)
    return replace(line, values=tuple(means))


def _window(left: float, *drawn: Markup | None) -> Markup:
    """Cuts off what leaves the axes. A nested drawing needs no name that another chart might have too."""
    top, height = TOP - 8, HEIGHT - TOP - BOTTOM + 12
    width = WIDTH - RIGHT + 6 - left
    box = {"x": left, "y": top, "width": width, "height": height}
    return tag("svg", *drawn, viewBox=f"{left:.2f} {top} {width:.2f} {height}", **box)


def _line(line: Series, place: int, across: Axis, up: Axis) -> Markup:
    if len(line.known) < SMOOTH_FROM:
        return tag("path", d=path_of(thinned(line), across, up), class_=f"line s{place}")
    return join(
        [
            tag("path", d=path_of(thinned(line), across, up), class_=f"line pale s{place}"),
            tag("path", d=path_of(thinned(smoothed(line)), across, up), class_=f"line s{place}"),
        ]
    )


def path_of(line: Series, across: Axis, up: Axis) -> str:
    """SVG path data, broken where values are missing; a lone value becomes a dot."""
    parts: list[str] = []
    is_open = False
    for place, (step, value) in enumerate(zip(line.steps, line.values, strict=True)):
        if value is None:
            is_open = False
            continue
        x, y = f"{across(step):.1f}", f"{up(value):.1f}"
        parts.append(f"L{x} {y}" if is_open else f"M{x} {y}")
        follows = place + 1 < len(line.values) and line.values[place + 1] is not None
        if not is_open and not follows:
            parts.append("h0")
        is_open = True
    return "".join(parts)


def _reference(line: Series, across: Axis, up: Axis) -> Markup:
    return tag("path", d=path_of(thinned(line), across, up), class_="line reference")


def _grid(across: Axis, up: Axis, ticks: Sequence[float]) -> Markup:
    parts: list[Markup] = []
    for tick in ticks:
        y = up(tick)
        parts.append(tag("line", x1=across.begin, x2=across.end, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", tick_label(tick, ticks), x=across.begin - 6, y=y + 4.2, class_="end"))
    steps = nice_ticks(across.low, across.high, 4, least=1.0)
    for step in steps:
        x = across(step)
        wide = CHAR_WIDTH * len(tick_label(step, steps)) / 2
        x_text = min(max(x, across.begin - 4 + wide), WIDTH - wide - 1)
        parts.append(tag("line", x1=x, x2=x, y1=up.begin, y2=up.begin + 4, class_="grid"))
        parts.append(tag("text", tick_label(step, steps), x=x_text, y=HEIGHT - BOTTOM + 17, class_="middle"))
    parts.append(tag("text", "step", x=(across.begin + across.end) / 2, y=HEIGHT - 4, class_="middle"))
    parts.append(tag("line", x1=across.begin, x2=across.end, y1=up.begin, y2=up.begin, class_="axis"))
    return tag("g", *parts)


def _marks(marks: Sequence[Mark], across: Axis) -> Markup | None:
    inside = [mark for mark in marks if across.low <= mark.step <= across.high]
    if not inside:
        return None
    quiet = [mark for mark in inside if not mark.is_alarm]
    parts: list[Markup] = []
    for mark in quiet:
        x = across(mark.step)
        parts.append(tag("line", x1=x, x2=x, y1=TOP - 4, y2=HEIGHT - BOTTOM, class_="mark"))
        if len(quiet) <= MAX_LABELLED:
            near_end = x > WIDTH - RIGHT - CHAR_WIDTH * len(mark.label)
            shift, side = (-4, "end") if near_end else (4, "")
            parts.append(tag("text", mark.label, x=x + shift, y=TOP - 6, class_=side or None))
    for mark in inside:
        if mark.is_alarm:
            x, y = across(mark.step), HEIGHT - BOTTOM
            told = tag("title", f"step {number(mark.step)}: {mark.label}")
            parts.append(tag("path", told, d=f"M{x - 5:.1f} {y}h10l-5 -9z", class_="alarm"))
    return tag("g", *parts)


def _outside(
    lines: Sequence[Series], low: float, high: float
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Steps at which a line leaves the drawing above and below, and what to say of it."""
    above = [(s, v) for line in lines for s, v in zip(line.steps, line.values, strict=True) if v and v > high]
    below = [
        (s, v)
        for line in lines
        for s, v in zip(line.steps, line.values, strict=True)
        if v is not None and v < low
    ]
    told = []
    for name, found, worst in (("above", above, max), ("below", below, min)):
        if found:
            step, value = worst(found, key=lambda pair: pair[1])
            told.append(f"{number(value)} at step {number(step)} lies {name} the drawing")
    return tuple(s for s, _ in above), tuple(s for s, _ in below), "; ".join(told)


def _arrows(outside: tuple[tuple[float, ...], tuple[float, ...], str], across: Axis) -> Markup | None:
    parts = []
    for steps, base, tip in ((outside[0], TOP - 2, -6), (outside[1], HEIGHT - BOTTOM - 8, 6)):
        for step in steps[:1]:
            x = across(step)
            parts.append(tag("path", d=f"M{x - 4:.1f} {base}h8l-4 {tip}z", class_="arrow"))
    return tag("g", *parts) if parts else None


def _legend(chart: Chart, lines: Sequence[Series]) -> Markup:
    """Every line with its own stroke, its name and its last value."""
    entries = [
        tag("li", _stroke(f"line s{place}"), _named(line, chart.unit)) for place, line in enumerate(lines)
    ]
    if chart.reference:
        entries.append(tag("li", _stroke("line reference"), _named(chart.reference, chart.unit)))
    return tag("ul", *entries, class_="legend")


def _named(line: Series, unit: str) -> Markup:
    known = line.known
    return join([line.name, " ", tag("b", number(known[-1]) + unit) if known else None])


def _stroke(classes: str) -> Markup:
    path = tag("path", d="M1 6H21", class_=classes)
    return tag("svg", path, viewBox="0 0 22 12", class_="stroke", aria_hidden="true")


def _spoken(chart: Chart, lines: Sequence[Series]) -> str:
    parts = []
    for line in lines:
        known = line.known
        parts.append(f"{line.name} goes from {number(known[0])} to {number(known[-1])}{chart.unit}")
    if chart.reference and chart.reference.known:
        parts.append(f"{chart.reference.name} is {number(chart.reference.known[-1])}{chart.unit}")
    steps = [step for line in lines for step in line.steps]
    return f"{chart.title}, steps {number(min(steps))} to {number(max(steps))}: {'; '.join(parts)}"


def _trimmed(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    shown = f"{value:.{decimals}f}"
    return "0" if float(shown) == 0 else shown
