"""The patch plan as it is drawn: every outline, arrow and share against the plan itself."""

from __future__ import annotations

import re

import numpy as np
import pytest
from pages import Element, parse

from pretrain.report.patch_drawing import (
    KINDS,
    PatchSet,
    Plan,
    Rectangle,
    crop_drawing,
    plan_drawing,
    plan_legend,
    share_bar,
)

GRID = (4, 6)
PLAN = Plan(
    GRID,
    (
        PatchSet("colorization", (0, 7)),
        PatchSet("inpainting", (3,)),
        PatchSet("relative_position", (10, 11, 20, 14), ((10, 11), (20, 14))),
        PatchSet("jigsaw", (1, 17, 23), ((17, 1), (23, 17), (1, 23))),
    ),
)
PIXELS = np.zeros((32, 48, 3), np.uint8)
TASKS = ("colorization", "inpainting", "relative_position", "jigsaw")
KIND_OF_COLOR = {KINDS[name].color: name for name in TASKS}


def outlines(page: Element) -> dict[str, list[tuple[int, int]]]:
    """(row, column) of the patch that each coloured outline encloses, by kind."""
    found: dict[str, list[tuple[int, int]]] = {}
    for rect in page.all("rect"):
        if rect.attributes.get("class") != "ink patch":
            continue
        x, y, width, height = (float(rect.attributes[key]) for key in ("x", "y", "width", "height"))
        row, column = int(y // 10), int(x // 10)
        assert column * 10 < x, "an outline lies inside its own patch"
        assert x + width < (column + 1) * 10
        assert row * 10 < y
        assert y + height < (row + 1) * 10
        found.setdefault(KIND_OF_COLOR[rect.attributes["stroke"]], []).append((row, column))
    return found


def test_every_patch_of_a_set_and_no_other_is_outlined_in_the_colour_of_its_task() -> None:
    page = parse(plan_drawing(PIXELS, PLAN, "plan"))
    found = outlines(page)
    wanted = {one.kind: [(patch // 6, patch % 6) for patch in one.patches] for one in PLAN.sets}
    assert found == wanted
    everything = [place for places in found.values() for place in places]
    assert len(everything) == len(set(everything)) == PLAN.num_patches - PLAN.num_untouched == 10
    (drawing,) = page.all("svg")
    assert drawing.attributes["viewbox"] == "0 0 60 40"


def test_arrows_begin_and_end_in_the_middle_of_their_patches() -> None:
    page = parse(plan_drawing(PIXELS, PLAN, "plan"))
    found = []
    for path in page.all("path"):
        if path.attributes.get("class") != "ink arrow-of-plan":
            continue
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attributes["d"].split("l")[0])]
        (x1, y1), (x2, y2) = numbers[:2], numbers[4:6]
        found.append((int(y1 // 10) * 6 + int(x1 // 10), int(y2 // 10) * 6 + int(x2 // 10)))
        assert [v % 10 for v in (x1, y1, x2, y2)] == [5.0] * 4
    assert found == [pair for one in PLAN.sets for pair in one.arrows]


def test_an_arrow_points_to_its_second_patch() -> None:
    """The two strokes of the head start at the end and lead back."""
    plan = Plan((1, 6), (PatchSet("relative_position", (1, 4), ((1, 4),)),))
    page = parse(plan_drawing(np.zeros((8, 48, 3), np.uint8), plan, "plan"))
    (path,) = [p for p in page.all("path") if p.attributes.get("class") == "ink arrow-of-plan"]
    heads = re.findall(r"M([\d.]+) ([\d.]+)l(-?[\d.]+) (-?[\d.]+)", path.attributes["d"])
    assert len(heads) == 2
    for x, y, dx, _ in heads:
        assert (float(x), float(y)) == (45.0, 5.0)
        assert float(dx) < 0


def test_signs_differ_by_task_so_that_colours_are_not_needed() -> None:
    page = parse(plan_drawing(PIXELS, PLAN, "plan", signs=True))
    shapes: dict[str, set[str]] = {}
    for path in page.all("path"):
        if path.attributes.get("class") == "ink sign":
            shape = re.sub(r"M-?[\d.]+ -?[\d.]+", "M", path.attributes["d"])
            shapes.setdefault(KIND_OF_COLOR[path.attributes["stroke"]], set()).add(shape)
    assert shapes.keys() == set(TASKS)
    assert all(len(of_kind) == 1 for of_kind in shapes.values())
    assert len({next(iter(of_kind)) for of_kind in shapes.values()}) == 4


def test_the_bar_shares_out_the_whole_view() -> None:
    page = parse(share_bar(PLAN))
    widths = [float(rect.attributes["width"]) for rect in page.all("rect")]
    assert sum(widths) == pytest.approx(100, abs=0.05)
    assert widths == pytest.approx([100 * n / 24 for n in (2, 1, 4, 3, 14)], abs=0.01)
    (bar,) = page.all("svg")
    assert (
        (bar.attributes["aria-label"])
        == "of 24 patches: 2 colorization, 1 inpainting, 4 relative position, 3 jigsaw, 14 untouched"
    )


def test_the_legend_counts_and_says_clean_only_of_what_is() -> None:
    told = [entry.text for entry in parse(plan_legend([PLAN])).all("li")]
    assert told[0].startswith("colorization: 2 patches: shown in grey")
    assert told[-1] == "untouched: 14 patches, exactly as in the clean view, pixel by pixel"
    other = Plan(GRID, (PatchSet("colorization", (0,)),), rest_is_clean=False)
    told = [entry.text for entry in parse(plan_legend([PLAN, other])).all("li")]
    assert told[0].startswith("colorization: 1 to 2 patches")
    assert told[-1] == "the rest: 14 to 23 patches, of no task"
    assert plan_legend([Plan(GRID)]) is None


def test_blocks_to_predict_are_told_once_and_hidden_patches_are_not_outlined() -> None:
    blocks = (PatchSet("target 1", (0, 1)), PatchSet("target 2", (8, 9)))
    plan = Plan(GRID, (*blocks, PatchSet("hidden", (2, 3, 4))))
    told = [entry.text for entry in parse(plan_legend([plan])).all("li")]
    assert [entry.split(":")[0] for entry in told] == ["block to predict", "hidden", "untouched"]
    assert told[0].startswith("block to predict: 4 patches")
    drawing = parse(plan_drawing(PIXELS, plan, "plan"))
    assert sum(rect.attributes.get("class") == "ink patch" for rect in drawing.all("rect")) == 4


def test_damaged_rectangles_lie_where_their_pixels_are() -> None:
    """A view of 48 x 32 px in 6 x 4 patches: 8 px are 10 units."""
    plan = Plan(GRID, (), (Rectangle("drop", top=4, left=16, height=8, width=12),))
    page = parse(plan_drawing(PIXELS, plan, "plan"))
    (box,) = [rect for rect in page.all("rect") if rect.attributes.get("class") == "ink"]
    place = [float(box.attributes[key]) for key in ("x", "y", "width", "height")]
    assert place == pytest.approx([20, 5, 15, 10])


def test_crop_boxes_are_drawn_in_px_of_the_original_each_with_its_own_dash() -> None:
    boxes = [(10, 20, 100, 50), (0, 0, 200, 300), (5, 5, 20, 20)]
    page = parse(crop_drawing(np.zeros((20, 30, 3), np.uint8), boxes, "original", (200, 300)))
    (drawing,) = page.all("svg")
    assert drawing.attributes["viewbox"] == "0 0 300 200"
    drawn = [rect for rect in page.all("rect") if rect.attributes["class"] == "ink"]
    margin = 0.012 * 200
    for rect, (top, left, height, width) in zip(drawn, boxes, strict=True):
        assert float(rect.attributes["x"]) == pytest.approx(left + margin)
        assert float(rect.attributes["y"]) == pytest.approx(top + margin)
        assert float(rect.attributes["width"]) == pytest.approx(width - 2 * margin)
        assert float(rect.attributes["height"]) == pytest.approx(height - 2 * margin)
    assert len({rect.attributes.get("stroke-dasharray") for rect in drawn}) == 3


def test_a_crowd_of_arrows_is_left_out() -> None:
    pairs = tuple((place, place + 1) for place in range(0, 40, 2))
    plan = Plan((8, 8), (PatchSet("relative_position", tuple(range(40)), pairs),))
    page = parse(plan_drawing(np.zeros((16, 16, 3), np.uint8), plan, "plan"))
    assert [p for p in page.all("path") if "arrow" in p.attributes.get("class", "")] == []
    assert len(outlines(page)["relative_position"]) == 40
