"""The pictures of the docs say what Prometheus said."""

from __future__ import annotations

import math
import re

import pytest
from panel_drawing import Drawn, drawn_panel, shown

from pretrain.metrics.dashboards.panels import RED, Kind, Panel, Query

RAMP = [(1000.0 + 2 * at, float(at)) for at in range(30)]


def panel(kind: Kind = "timeseries", **look: object) -> Panel:
    return Panel("A panel", (Query("x", "{{a}}"),), "s", "help", kind, **look)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "percentunit", "12.3 %"),
        (0.25, "s", "250 ms"),
        (90.0, "s", "1.5 min"),
        (3 * 2.0**30, "bytes", "3 GiB"),
        (2.0**20, "Bps", "1 MiB/s"),
        (1.01e11, "flops", "101 GFLOP/s"),
        (12345.0, "short", "12.3 k"),
        (117.2, "suffix: /s", "117 /s"),
        (4.1e-4, "none", "4.1e-04"),
        (0.0, "none", "0"),
        (math.nan, "s", "NaN"),
    ],
)
def test_numbers_have_their_unit(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_nothing_found_is_told() -> None:
    assert "No data" in drawn_panel(panel(), [], 400, 200)


def test_each_line_is_drawn_and_named_with_its_last_value() -> None:
    drawing = drawn_panel(panel(), [Drawn("one", RAMP), Drawn("two", RAMP[:10])], 400, 240)
    assert len(re.findall(r"<path", drawing)) == 2
    assert re.search(r"one<b>29 s</b>", drawing)
    assert re.search(r"two<b>9 s</b>", drawing)


def test_a_line_is_broken_where_scrapes_are_missing() -> None:
    drawing = drawn_panel(panel(), [Drawn("one", RAMP[:10] + RAMP[20:])], 400, 240)
    (path,) = re.findall(r'd="(M[^"]*)"', drawing)
    assert path.count("M") == 2


def test_bands_that_add_up_to_the_whole_reach_the_top() -> None:
    series = [Drawn(name, [(at, share) for at, _ in RAMP]) for name, share in (("a", 0.25), ("b", 0.75))]
    drawing = drawn_panel(panel(is_stacked=True, low=0.0, high=1.0), series, 400, 240)
    heights = [
        [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", d)]
        for d in re.findall(r' d="([^"]*)Z"', drawing)
    ]
    assert min(heights[1]) == 8.0  # the upper edge of the drawing
    assert min(heights[0]) == max(heights[1])  # b begins where a ends


def test_a_number_over_its_limit_is_red() -> None:
    limited = panel("stat", limits=((5.0, RED),))
    assert "#cf222e" in drawn_panel(limited, [Drawn("x", [(1.0, 5.0)])], 200, 100)
    assert "#cf222e" not in drawn_panel(limited, [Drawn("x", [(1.0, 4.9)])], 200, 100)


def test_a_heatmap_shows_each_bucket_s_own_count() -> None:
    """Counts of buckets are cumulative: where the next limit adds nothing, nothing is drawn."""
    times = [1000.0, 1002.0]
    series = [
        Drawn(limit, [(at, count) for at in times])
        for limit, count in (("0.1", 0.0), ("0.5", 3.0), ("1", 3.0), ("+Inf", 4.0))
    ]
    drawing = drawn_panel(panel("heatmap"), series, 400, 240)
    assert len(re.findall("<rect", drawing)) == 4  # three steps below 0.5 s and one above 1 s, at two times
