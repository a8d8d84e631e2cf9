"""Charts: every number is where it belongs, no spike is lost, and the text is that of the data."""

from __future__ import annotations

import re

import pytest
from pages import Element, parse

from pretrain.report.chart import (
    Axis,
    Chart,
    Mark,
    line_chart,
    nice_ticks,
    number,
    path_of,
    smoothed,
    thinned,
    tick_label,
    value_range,
)
from pretrain.report.curves import Series


def line(values: list[float | None], name: str = "loss") -> Series:
    return Series(name, tuple(float(step) for step in range(1, len(values) + 1)), tuple(values))


def drawn(chart: Chart) -> Element:
    return parse(line_chart(chart))


def test_a_number_is_drawn_where_the_ticks_say() -> None:
    """Read back from the drawing: the y of the line against the y of two labelled ticks."""
    values = [4.0, 3.0, 2.5, 1.0, 2.0]
    page = drawn(Chart("Loss", (line(values),)))
    labels = {
        float(text.text): float(text.attributes["y"]) - 4.2
        for text in page.all("text")
        if text.attributes.get("class") == "end"
    }
    (low, y_low), (high, y_high) = min(labels.items()), max(labels.items())
    (path,) = [path for path in page.all("path") if path.attributes.get("class") == "line s0"][:1]
    points = [
        tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attributes["d"])
    ]
    read = [low + (y - y_low) / (y_high - y_low) * (high - low) for _, y in points]
    assert read == pytest.approx(values, abs=0.02)
    steps = {
        float(text.text): float(text.attributes["x"])
        for text in page.all("text")
        if text.attributes.get("class") == "middle" and text.text != "step"
    }
    assert points[2][0] == pytest.approx(steps[3.0], abs=0.1)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_the_legend_ends_with_the_last_numbers_and_the_label_speaks_them() -> None:
    chance = line([0.25, 0.25], "chance")
    page = drawn(Chart("rotation: accuracy", (line([0.2, 0.775], "accuracy"),), chance))
    assert [entry.text for entry in page.all("li")] == ["accuracy 0.775", "chance 0.25"]
    (svg,) = [svg for svg in page.all("svg") if svg.attributes.get("role") == "img"]
    assert svg.attributes["aria-label"] == (
        "rotation: accuracy, steps 1 to 2: accuracy goes from 0.2 to 0.775; chance is 0.25"
    )


def test_a_first_transient_does_not_press_the_rest_flat_and_is_told() -> None:
    values = [20.0, 9.0, *[1 - i / 200 for i in range(60)]]
    low, high = value_range([line(values)])
    assert high < 1.2
    assert low > 0.6
    page = drawn(Chart("Loss", (line(values),)))
    told = [note.text for note in page.all("p")]
    assert told == ["20 at step 1 lies above the drawing"]
    # a curve that falls evenly has no transient: all of it is shown
    even = [10 - i / 10 for i in range(80)]
    assert value_range([line(even)])[1] >= 10
    assert drawn(Chart("Loss", (line(even),))).all("p") == []


def test_the_range_holds_the_reference_and_a_constant() -> None:
    low, high = value_range([line([0.5, 0.6, 0.7])], line([0.1, 0.1, 0.1], "chance"))
    assert low < 0.1 < 0.7 < high
    low, high = value_range([line([3.0, 3.0])])
    assert low < 3.0 < high


def test_gaps_stay_gaps_and_a_lone_value_is_a_dot() -> None:
    across, up = Axis(1, 6, 0, 100), Axis(0, 1, 100, 0)
    assert path_of(line([0.0, 1.0, None, 0.5, None, 1.0]), across, up) == (
        "M0.0 100.0L20.0 0.0M60.0 50.0h0M100.0 0.0h0"
    )


def test_thinning_keeps_every_spike_the_ends_and_the_gaps() -> None:
    values: list[float | None] = [1.0] * 10_000
    values[1234], values[7777] = 50.0, -50.0
    for place in range(4000, 4200):
        values[place] = None
    thin = thinned(line(values))
    assert len(thin.steps) <= 300
    assert {50.0, -50.0} <= set(thin.values)
    assert None in thin.values
    assert thin.steps[0] == 1.0
    assert list(thin.steps) == sorted(thin.steps)
    assert thinned(line([1.0, 2.0])) == line([1.0, 2.0])


def test_smoothing_neither_shifts_nor_scales() -> None:
    """A straight line is its own mean over neighbours, to both ends; noise gets less."""
    straight = line([float(i) for i in range(200)])
    assert smoothed(straight).values == pytest.approx(straight.values)
    noisy = line([float((-1) ** i) for i in range(200)])
    assert max(abs(value or 0) for value in smoothed(noisy).values[10:-10]) < 0.2
    with_gap = line([1.0] * 50 + [None] + [3.0] * 50)
    assert smoothed(with_gap).values[50] is None


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.1, 0.34, ["0.10", "0.15", "0.20", "0.25", "0.30"]),
        (3.0, 21.0, ["5", "10", "15", "20"]),
        (0.0, 2.1e-4, ["0", "0.5e-4", "1.0e-4", "1.5e-4", "2.0e-4"]),
        (0.0, 410_000.0, ["0", "100k", "200k", "300k", "400k"]),
        (-0.02, 0.021, ["-0.02", "-0.01", "0", "0.01", "0.02"]),
    ],
)
def test_ticks_are_round_and_told_apart(low: float, high: float, wanted: list[str]) -> None:
    ticks = nice_ticks(low, high, 4)
    assert [tick_label(tick, ticks) for tick in ticks] == wanted


def test_steps_have_no_halves() -> None:
    assert nice_ticks(1, 2, 4, least=1.0) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.77384, "0.7738"),
        (0.0039215, "0.0039"),
        (20.4312, "20.43"),
        (2.68e-6, "2.68e-06"),
        (0.0, "0"),
        (720.0, "720"),
        (123456.0, "1.23e+05"),
        (-1.5, "-1.5"),
    ],
)
def test_numbers_are_short(value: float, told: str) -> None:
    assert number(value) == told


def test_attempts_and_anomalies_are_marked_where_they_happened() -> None:
    marks = (Mark(3.0, "attempt 2"), Mark(4.0, "loss spike", is_alarm=True), Mark(99.0, "attempt 3"))
    page = drawn(Chart("Loss", (line([5.0, 4.0, 3.0, 2.0, 1.0]),), marks=marks))
    (upright,) = [one for one in page.all("line") if one.attributes.get("class") == "mark"]
    middle = {
        text.text: float(text.attributes["x"])
        for text in page.all("text")
        if text.attributes.get("class") == "middle"
    }
    assert float(upright.attributes["x1"]) == pytest.approx(middle["3"], abs=0.1)
    assert "attempt 2" in [text.text for text in page.all("text")]
    (alarm,) = [one for one in page.all("path") if one.attributes.get("class") == "alarm"]
    assert alarm.text == "step 4: loss spike"


def test_one_record_many_lines_and_hostile_names_are_drawn() -> None:
    assert drawn(Chart("Loss", (line([2.0]),))).all("path")
    lines = tuple(line([float(i), float(i + 1)], f"<b>{i}</b>") for i in range(8))
    page = drawn(Chart("<i>Weights</i>", lines))
    assert page.all("b")[0].text == "1"
    assert page.all("i") == []
    assert [entry.text.split(" ")[0] for entry in page.all("li")] == [f"<b>{i}</b>" for i in range(8)]


def test_text_is_at_least_11_px_on_a_phone() -> None:
    """390 px less the paddings of page and card leave 342 px for 360 units of 12.5."""
    from pretrain.report.style import STYLE

    (size,) = re.findall(r"\.chart text\{font:([\d.]+)px", STYLE)
    assert float(size) * (390 - 2 * 14 - 2 * 9 - 2) / 360 >= 11
