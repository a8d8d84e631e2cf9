"""The patch plan of a view drawn on it: who works on which patches, where pairs point, what was moved where.

Drawings are in units of a tenth of a patch, and strokes keep their width in px at any size. Every set has a
colour, and a sign of its own for whoever cannot tell the colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.report.markup import Markup, join, tag
from pretrain.report.pictures import Pixels, data_uri

UNIT = 10.0  # of a patch
INSET = 0.7  # of an outline, so that those of neighbours stand apart
FINE_COLUMNS, FINE_RECTANGLES = 9, 6  # above which a small drawing has thinner strokes
MAX_ARROWS = 14  # more of them hide the picture
VIEW_DASHES = ("", "7 4", "2 3", "10 3 2 3")  # of crop boxes, by view


@dataclass(frozen=True)
class PatchSet:
    """The patches of one view that one task works on, or that are hidden from the encoder."""

    kind: str  # a key of KINDS
    patches: tuple[int, ...]  # row by row
    arrows: tuple[tuple[int, int], ...] = ()  # from patch to patch: of a pair, or of content that was moved


@dataclass(frozen=True)
class Rectangle:
    """A part of a view that a local corruption changed, in px."""

    kind: str  # a key of KINDS
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Plan:
    """Everything that is done to parts of one view."""

    grid: tuple[int, int]  # patches as (rows, columns)
    sets: tuple[PatchSet, ...] = ()
    rectangles: tuple[Rectangle, ...] = ()
    rest_is_clean: bool = True  # every patch of no set shows exactly what the clean view shows

    @property
    def is_changed(self) -> bool:
        return bool(self.sets or self.rectangles)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_untouched(self) -> int:
        return self.num_patches - len({patch for one in self.sets for patch in one.patches})


@dataclass(frozen=True)
class Kind:
    """How a set is told and drawn."""

    name: str
    color: str
    sign: str  # drawn in the middle of a patch: plus, cross, ring, square or none
    words: str  # what was done, and what is asked
    is_outlined: bool = True  # False: the picture shows it already


KINDS = {
    "colorization": Kind("colorization", "#e69f00", "plus", "shown in grey; the task gives their colours"),
    "inpainting": Kind("inpainting", "#56b4e9", "cross", "not shown; the task gives their pixels"),
    "relative_position": Kind(
        "relative position",
        "#00b27f",
        "ring",
        "pairs without their positions; the task tells in which direction (the arrow) the second lies",
    ),
    "jigsaw": Kind(
        "jigsaw",
        "#ef6fb4",
        "square",
        "contents moved (the arrow) among these patches; the task tells where each came from",
    ),
    "hidden": Kind("hidden", "#808080", "none", "not given to the encoder", is_outlined=False),
    **{
        f"target {place}": Kind(
            "block to predict", color, "none", "the predictor gives the teacher's features"
        )
        for place, color in enumerate(("#e69f00", "#56b4e9", "#00b27f", "#ef6fb4"), start=1)
    },
    "color": Kind("colours changed", "#d55e00", "none", "a rectangle with other colours"),
    "gray": Kind("greyed", "#e69f00", "none", "a rectangle in grey"),
    "blur": Kind("blurred", "#56b4e9", "none", "a rectangle out of focus"),
    "drop": Kind("dropped", "#00b27f", "none", "rectangles of noise or of the mean colour"),
    "replace": Kind("replaced", "#ef6fb4", "none", "rectangles from another image"),
}
UNTOUCHED_COLOR = "#c9ced6"


def plan_drawing(pixels: Pixels, plan: Plan, alt: str, signs: bool = False) -> Markup:
    """A view with its plan on it. signs: mark every patch, which needs room."""
    rows, columns = plan.grid
    width, height = columns * UNIT, rows * UNIT
    parts: list[Markup] = [_image(pixels, width, height)]
    for one in plan.sets:
        if KINDS[one.kind].is_outlined:
            parts += [_outline(patch, columns, KINDS[one.kind].color) for patch in one.patches]
        if signs:
            parts += [sign for patch in one.patches if (sign := _sign(patch, columns, KINDS[one.kind]))]
    scale = height / pixels.shape[0]
    for box in plan.rectangles:
        parts.append(
            _box(
                box.left * scale,
                box.top * scale,
                box.width * scale,
                box.height * scale,
                KINDS[box.kind].color,
            )
        )
    for one in plan.sets:
        if len(one.arrows) <= MAX_ARROWS:
            parts += [_arrow(pair, columns, KINDS[one.kind].color) for pair in one.arrows]
    is_fine = not signs and (columns > FINE_COLUMNS or len(plan.rectangles) > FINE_RECTANGLES)
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=alt,
        class_="drawing fine" if is_fine else "drawing many" if columns > FINE_COLUMNS else "drawing",
    )


def crop_drawing(
    pixels: Pixels, boxes: Sequence[tuple[int, int, int, int]], alt: str, size: tuple[int, int]
) -> Markup:
    """The original with one box for every view: (top, left, height, width) in px of its own `size` (H, W)."""
    height, width = size
    parts = [_image(pixels, width, height)]
    for number, (top, left, box_height, box_width) in enumerate(boxes):
        dash = VIEW_DASHES[number % len(VIEW_DASHES)]
        parts.append(_box(left, top, box_width, box_height, "#ffd400", dash, margin=0.012 * min(size)))
    return tag(
        "svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=alt, class_="drawing"
    )


def share_bar(plan: Plan) -> Markup:
    """How the patches of a view are shared out, as one bar."""
    parts: list[Markup] = []
    x = 0.0
    whole = plan.num_patches
    shares = [(len(one.patches), KINDS[one.kind].color) for one in plan.sets]
    for count, color in [*shares, (plan.num_untouched, UNTOUCHED_COLOR)]:
        wide = 100.0 * count / whole
        parts.append(tag("rect", x=x, y=0, width=wide, height=6, fill=color, stroke="#fff", stroke_width=0.4))
        x += wide
    told = ", ".join(f"{len(one.patches)} {KINDS[one.kind].name}" for one in plan.sets)
    label = f"of {whole} patches: {told}, {plan.num_untouched} untouched"
    return tag(
        "svg",
        *parts,
        viewBox="0 0 100 6",
        role="img",
        aria_label=label,
        class_="bar",
        preserveAspectRatio="none",
    )


def plan_legend(plans: Sequence[Plan]) -> Markup | None:
    """Every kind of set that occurs, with its colour, its sign and its words; None where nothing is done."""
    named = [[one.kind for one in plan.sets] + [box.kind for box in plan.rectangles] for plan in plans]
    keys = list(dict.fromkeys(key for keys_of_plan in named for key in keys_of_plan))
    if not keys:
        return None
    rows: list[Markup] = []
    for name in dict.fromkeys(
        KINDS[key].name for key in keys
    ):  # of several colours, if there are several blocks
        kinds = [KINDS[key] for key in keys if KINDS[key].name == name]
        rows.append(
            tag("li", join(map(_swatch, kinds)), tag("b", name), f": {_count(plans, name)}{kinds[0].words}")
        )
    planned = [plan for plan in plans if plan.sets]
    if planned:
        are_clean = all(plan.rest_is_clean for plan in planned)
        words = "exactly as in the clean view, pixel by pixel" if are_clean else "of no task"
        left = _range([plan.num_untouched for plan in planned])
        rest = tag("b", "untouched" if are_clean else "the rest")
        rows.append(tag("li", _square(UNTOUCHED_COLOR), rest, f": {left} patches, {words}"))
    return tag("ul", *rows, class_="kinds")


def _count(plans: Sequence[Plan], name: str) -> str:
    """How many patches of a view the sets of a name have; nothing for rectangles."""
    counts = [sum(len(one.patches) for one in plan.sets if KINDS[one.kind].name == name) for plan in plans]
    held = [count for count in counts if count]
    return f"{_range(held)} patches: " if held else ""


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def center_of(patch: int, columns: int) -> tuple[float, float]:
    """(x, y) in the units of the drawing."""
    return (patch % columns + 0.5) * UNIT, (patch // columns + 0.5) * UNIT


def _image(pixels: Pixels, width: float, height: float) -> Markup:
    is_small = max(pixels.shape[:2]) <= 64
    return tag(
        "image",
        href=data_uri(pixels),
        width=float(width),
        height=float(height),
        preserveAspectRatio="none",
        class_="pixels" if is_small else None,
    )


def _outline(patch: int, columns: int, color: str) -> Markup:
    x, y = patch % columns * UNIT + INSET, patch // columns * UNIT + INSET
    return _box(x, y, UNIT - 2 * INSET, UNIT - 2 * INSET, color, class_="ink patch", data_patch=patch)


def _box(
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    dash: str = "",
    margin: float = 0.0,
    **more: object,
) -> Markup:
    """An outline in a colour with a dark one around it, to be seen on any picture."""
    box = {"x": x + margin, "y": y + margin, "width": width - 2 * margin, "height": height - 2 * margin}
    return join(
        [
            tag("rect", **box, class_="halo"),
            tag("rect", **box, stroke=color, stroke_dasharray=dash or None, **{"class_": "ink", **more}),
        ]
    )


def _arrow(pair: tuple[int, int], columns: int, color: str) -> Markup:
    """From the middle of one patch to that of another, bent a little where it is long."""
    (x1, y1), (x2, y2) = center_of(pair[0], columns), center_of(pair[1], columns)
    length = math.hypot(x2 - x1, y2 - y1)
    if length == 0:
        return Markup("")
    across_x, across_y = -(y2 - y1) / length, (x2 - x1) / length
    bend = 0.0 if length < 1.5 * UNIT else 0.12 * length
    middle_x, middle_y = (x1 + x2) / 2 + bend * across_x, (y1 + y2) / 2 + bend * across_y
    toward = math.atan2(y2 - middle_y, x2 - middle_x)
    path = f"M{x1:.1f} {y1:.1f}Q{middle_x:.1f} {middle_y:.1f} {x2:.1f} {y2:.1f}"
    for side in (-1, 1):
        angle = toward + math.pi + side * 0.5
        path += f"M{x2:.1f} {y2:.1f}l{3.4 * math.cos(angle):.1f} {3.4 * math.sin(angle):.1f}"
    return join(
        [tag("path", d=path, class_="halo"), tag("path", d=path, stroke=color, class_="ink arrow-of-plan")]
    )


def _sign(patch: int, columns: int, kind: Kind) -> Markup | None:
    x, y = center_of(patch, columns)
    shape = _sign_shape(kind.sign, x, y, 1.6)
    if shape is None:
        return None
    return join(
        [tag("path", d=shape, class_="halo"), tag("path", d=shape, stroke=kind.color, class_="ink sign")]
    )


def _sign_shape(sign: str, x: float, y: float, reach: float) -> str | None:
    r = reach
    match sign:
        case "plus":
            return f"M{x - r:.1f} {y:.1f}h{2 * r}M{x:.1f} {y - r:.1f}v{2 * r}"
        case "cross":
            return f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"
        case "ring":
            return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0"
        case "square":
            return f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z"
    return None


def _square(color: str) -> Markup:
    box = tag("rect", width=14, height=14, fill=color)
    return tag("svg", box, viewBox="0 0 14 14", class_="swatch", aria_hidden="true")


def _swatch(kind: Kind) -> Markup:
    """A patch in small, with the sign of its kind."""
    shape = _sign_shape(kind.sign, 7, 7, 2.4)
    sign = tag("path", d=shape, stroke=kind.color, fill="none", stroke_width=1.6) if shape else None
    if not kind.is_outlined:
        return _square(kind.color)
    box = tag("rect", x=1.2, y=1.2, width=11.6, height=11.6, fill="none", stroke=kind.color, stroke_width=2.4)
    return tag("svg", box, sign, viewBox="0 0 14 14", class_="swatch", aria_hidden="true")
