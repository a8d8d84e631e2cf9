"""The ten object kinds of the embedded sample, drawn part by part from polygons.

A figure is drawn in its own frame: it stands on y = 0, is about 1 high and centred on x = 0, and y points up.
A `Pen` maps it onto the canvas, so scale, mirror image, lean and proportions cost a figure nothing.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

UNIT_CIRCLE = [(math.cos(math.pi * step / 11), math.sin(math.pi * step / 11)) for step in range(22)]


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """An RGB colour from a hue in turns, and saturation and value in [0, 1] (both are clipped)."""
    saturation, value = min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0)
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))
    return red, green, blue


def mix(colour: Colour, other: Colour, ratio: float) -> Colour:
    """`ratio` of `other` in `colour`."""
    red, green, blue = (round(a + (b - a) * ratio) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def darker(colour: Colour, ratio: float = 0.3) -> Colour:
    return mix(colour, (12, 10, 24), ratio)


def lighter(colour: Colour, ratio: float = 0.35) -> Colour:
    return mix(colour, (255, 252, 244), ratio)


WHITE, INK, GLASS, RUBBER = (250, 248, 240), (30, 26, 34), (150, 196, 214), (44, 42, 48)


@dataclass(frozen=True)
class Palette:
    """The colours of one picture: paints share a few hues, plants share a season."""

    paint_hues: tuple[float, ...]
    saturation: float  # of the paints
    leaf_hue: float  # of grass and leaves
    leaf_saturation: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Palette:
        first = rng.random()
        hues = (first, first + rng.uniform(0.08, 0.2), first + rng.uniform(0.4, 0.6))
        season = rng.choice(["spring", "summer", "autumn", "winter"], p=[0.3, 0.35, 0.25, 0.1])
        low, high = {
            "spring": (0.2, 0.3),
            "summer": (0.26, 0.4),
            "autumn": (0.03, 0.15),
            "winter": (0.38, 0.5),
        }[season]
        return cls(hues, rng.uniform(0.45, 0.9), rng.uniform(low, high), rng.uniform(0.35, 0.75))

    def paint(self, rng: np.random.Generator) -> Colour:
        """A painted or woven surface: any hue of this picture."""
        hue = self.paint_hues[rng.integers(len(self.paint_hues))] + rng.uniform(-0.03, 0.03)
        return hsv(hue, self.saturation * rng.uniform(0.6, 1.1), rng.uniform(0.4, 0.95))

    def leaf(self, rng: np.random.Generator) -> Colour:
        hue = self.leaf_hue + rng.uniform(-0.03, 0.03)
        return hsv(hue, self.leaf_saturation * rng.uniform(0.8, 1.1), rng.uniform(0.32, 0.72))

    def wood(self, rng: np.random.Generator) -> Colour:
        return hsv(rng.uniform(0.04, 0.1), rng.uniform(0.25, 0.6), rng.uniform(0.3, 0.7))

    def stone(self, rng: np.random.Generator) -> Colour:
        return hsv(rng.uniform(0.05, 0.65), rng.uniform(0.02, 0.15), rng.uniform(0.4, 0.8))

    def fur(self, rng: np.random.Generator) -> Colour:
        """Ginger, cream, grey or nearly black."""
        hue, saturation, value = [
            (0.07, 0.65, 0.85),
            (0.11, 0.3, 0.9),
            (0.6, 0.08, 0.55),
            (0.05, 0.4, 0.45),
            (0.7, 0.12, 0.28),
        ][rng.integers(5)]
        return hsv(hue, saturation * rng.uniform(0.7, 1.2), value * rng.uniform(0.85, 1.1))


class Pen:
    """Fills shapes on a canvas, given in the frame of a figure."""

    def __init__(self, canvas: ImageDraw.ImageDraw, to_canvas: NDArray[np.float64]) -> None:
        """`to_canvas` is the (2, 3) affine map from the figure's frame to canvas pixels."""
        self.canvas = canvas
        (self._xx, self._xy, self._x0), (self._yx, self._yy, self._y0) = to_canvas.tolist()

    def polygon(self, points: Points, colour: Colour) -> None:
        self.canvas.polygon(
            [
                (self._xx * x + self._xy * y + self._x0, self._yx * x + self._yy * y + self._y0)
                for x, y in points
            ],
            fill=colour,
        )

    def box(self, left: float, bottom: float, right: float, top: float, colour: Colour) -> None:
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], colour)

    def ellipse(
        self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour, turn: float = 0.0
    ) -> None:
        """An ellipse whose first axis is turned by `turn` radians."""
        cos, sin = math.cos(turn), math.sin(turn)
        xx, xy, yx, yy = radius_x * cos, -radius_y * sin, radius_x * sin, radius_y * cos
        self.polygon([(x + xx * a + xy * b, y + yx * a + yy * b) for a, b in UNIT_CIRCLE], colour)

    def stroke(self, points: Points, width: float, colour: Colour, end_width: float | None = None) -> None:
        """A ribbon along `points`, tapering from `width` to `end_width`."""
        end_width = width if end_width is None else end_width
        last, left, right = len(points) - 1, [], []
        for place, (x, y) in enumerate(points):
            (x0, y0), (x1, y1) = points[max(place - 1, 0)], points[min(place + 1, last)]
            half = (width + (end_width - width) * place / last) / 2 / (math.hypot(x1 - x0, y1 - y0) + 1e-9)
            across_x, across_y = (y1 - y0) * half, (x0 - x1) * half
            left.append((x + across_x, y + across_y))
            right.append((x - across_x, y - across_y))
        self.polygon([*left, *reversed(right)], colour)


def arc(x: float, y: float, radius_x: float, radius_y: float, start: float, end: float) -> Points:
    """Points on an ellipse between two angles in radians, anticlockwise from the right."""
    steps = max(9, round(22 * abs(end - start) / (2 * math.pi)))
    angles = [start + (end - start) * step / steps for step in range(steps + 1)]
    return [(x + radius_x * math.cos(angle), y + radius_y * math.sin(angle)) for angle in angles]


def curve(start: tuple[float, float], bend: tuple[float, float], end: tuple[float, float]) -> Points:
    """A quadratic Bézier curve in nine points."""
    weights = [((1 - t) ** 2, 2 * t * (1 - t), t**2) for t in (step / 8 for step in range(9))]
    return [
        (a * start[0] + b * bend[0] + c * end[0], a * start[1] + b * bend[1] + c * end[1])
        for a, b, c in weights
    ]


def blob(rng: np.random.Generator, x: float, y: float, radius: float, wobble: float = 0.12) -> Points:
    """A roundish closed outline with a few soft lobes."""
    angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    lobes, phase = rng.integers(4, 8), rng.uniform(0, 6.3, size=2)
    radii = radius * (1 + wobble * np.sin(lobes * angles + phase[0]) * np.cos(angles + phase[1]))
    points = zip((x + radii * np.cos(angles)).tolist(), (y + radii * np.sin(angles)).tolist(), strict=True)
    return list(points)


def draw_bird(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A bird standing on two legs, beak to the right."""
    coat = palette.paint(rng) if rng.random() < 0.65 else palette.fur(rng)
    belly, beak = lighter(coat, rng.uniform(0.3, 0.7)), hsv(rng.uniform(0.04, 0.14), 0.8, 0.9)
    leg, plump, lean = rng.uniform(0.1, 0.3), rng.uniform(0.2, 0.29), rng.uniform(0.0, 0.6)
    head_radius, neck = rng.uniform(0.12, 0.17), rng.uniform(0.0, 0.18)
    body_y = leg + plump * 0.85
    for foot_x in (-0.04, 0.1):
        pen.stroke([(foot_x, body_y), (foot_x + 0.01, 0.01)], 0.035, darker(beak, 0.25))
        pen.stroke([(foot_x - 0.03, 0.015), (foot_x + 0.09, 0.015)], 0.035, darker(beak, 0.25))
    tail_x, tail_y = -0.36 - rng.uniform(0.1, 0.25), body_y - 0.36 * lean + rng.uniform(-0.05, 0.12)
    tail = [(-0.18, body_y + 0.1), (tail_x, tail_y + 0.08), (tail_x + 0.04, tail_y - 0.06)]
    pen.polygon([*tail, (-0.15, body_y - 0.1)], darker(coat))
    head_x, head_y = 0.24 - 0.12 * lean, body_y + plump * 0.8 + head_radius * 0.4 + neck
    pen.ellipse(0.0, body_y, 0.36, plump, coat, turn=lean)
    pen.polygon(
        [(0.0, body_y + plump * 0.6), (0.3, body_y), (head_x + 0.1, head_y), (head_x - 0.1, head_y)], coat
    )
    pen.ellipse(0.1, body_y - plump * 0.25, 0.22, plump * 0.65, belly, turn=lean)
    pen.ellipse(head_x, head_y, head_radius, head_radius * 0.95, coat)
    if rng.random() < 0.4:  # a hood
        pen.polygon(arc(head_x, head_y, head_radius, head_radius * 0.95, 0.3, 2.9), darker(coat, 0.5))
    long_beak = rng.uniform(0.1, 0.24)
    base = head_x + head_radius * 0.85
    pen.polygon(
        [(base, head_y + 0.05), (base + long_beak, head_y - 0.02), (base - 0.01, head_y - 0.06)], beak
    )
    pen.ellipse(head_x + 0.04, head_y + 0.03, 0.04, 0.04, WHITE)
    pen.ellipse(head_x + 0.05, head_y + 0.03, 0.024, 0.024, INK)
    wing = darker(coat, rng.uniform(0.2, 0.5))
    pen.ellipse(-0.08, body_y + 0.03, 0.23, plump * 0.55, wing, turn=lean + 0.15)
    for step in range(3):
        shift = 0.07 * step
        pen.stroke([(-0.2 + shift, body_y - 0.02), (-0.08 + shift, body_y + 0.06)], 0.02, lighter(wing, 0.3))


def draw_boat(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A toy boat: a hull with one or two sails, or with a cabin and a funnel."""
    hull, half, deep = palette.paint(rng), rng.uniform(0.48, 0.62), rng.uniform(0.2, 0.3)
    if rng.random() < 0.3:
        hull = palette.wood(rng)
    if rng.random() < 0.7:
        _draw_sails(pen, rng, palette, half, deep)
    else:
        _draw_steamer(pen, rng, palette, half, deep)
    keel = half * rng.uniform(0.5, 0.75)
    bow = [(half, deep * 1.1), *curve((half, deep), (half * 0.9, 0.02), (keel * 0.9, 0.0))]
    pen.polygon([(-half * 0.95, deep), *bow, (-keel, 0.0)], hull)
    waist = [(-half * 0.95, deep), (half, deep * 1.1), (half * 0.97, deep * 0.8), (-half * 0.9, deep * 0.72)]
    pen.polygon(waist, lighter(hull, rng.uniform(0.4, 0.9)))
    pen.polygon(
        [(-keel * 1.15, 0.06), (keel * 1.05, 0.05), (keel * 0.9, 0.0), (-keel, 0.0)], darker(hull, 0.45)
    )
    if rng.random() < 0.5:
        for x in np.linspace(-half * 0.5, half * 0.5, 3).tolist():
            pen.ellipse(x, deep * 0.45, 0.04, 0.04, darker(hull, 0.6))


def _draw_sails(pen: Pen, rng: np.random.Generator, palette: Palette, half: float, deep: float) -> None:
    mast_x, top = rng.uniform(-0.12, 0.12), rng.uniform(0.92, 1.05)
    sail = WHITE if rng.random() < 0.45 else lighter(palette.paint(rng), 0.25)
    foot, head = deep + rng.uniform(0.08, 0.14), top - 0.06
    aft = mast_x - half * rng.uniform(0.75, 1.0)
    pen.stroke([(mast_x, deep * 0.5), (mast_x, top)], 0.035, darker(palette.wood(rng)))
    leech = curve((mast_x - 0.02, head), (mast_x + aft * 0.35, (foot + head) * 0.55), (aft, foot))
    pen.polygon([*leech, (mast_x - 0.02, foot)], sail)
    if rng.random() < 0.5:
        band = palette.paint(rng)
        for low in np.linspace(0.12, 0.66, rng.integers(1, 4)).tolist():
            edges = [(low, foot + low * (head - foot)), (low + 0.1, foot + (low + 0.1) * (head - foot))]
            left = [(mast_x - 0.03 + (aft - mast_x) * (1 - t) * 0.85, y) for t, y in edges]
            pen.polygon([*left, (mast_x - 0.03, edges[1][1]), (mast_x - 0.03, edges[0][1])], band)
    if rng.random() < 0.75:
        bow = mast_x + half * rng.uniform(0.55, 0.8)
        jib = curve((mast_x + 0.03, head - 0.08), (mast_x + 0.12, foot + 0.15), (bow, foot + 0.02))
        pen.polygon([*jib, (mast_x + 0.03, foot + 0.02)], darker(sail, 0.12))
    flag = palette.paint(rng)
    pen.polygon([(mast_x, top + 0.08), (mast_x + 0.14, top + 0.03), (mast_x, top - 0.02)], flag)


def _draw_steamer(pen: Pen, rng: np.random.Generator, palette: Palette, half: float, deep: float) -> None:
    cabin, left, right = lighter(palette.paint(rng), 0.6), -half * rng.uniform(0.45, 0.7), half * 0.4
    high = deep + rng.uniform(0.2, 0.3)
    funnel, x = palette.paint(rng), rng.uniform(-0.2, 0.1)
    pen.box(x - 0.08, high - 0.05, x + 0.08, high + 0.3, funnel)
    pen.box(x - 0.09, high + 0.2, x + 0.09, high + 0.3, darker(funnel, 0.6))
    pen.box(left, deep * 0.7, right, high, cabin)
    pen.box(left - 0.04, high - 0.03, right + 0.05, high + 0.03, darker(cabin, 0.35))
    for window_x in np.linspace(left + 0.08, right - 0.08, 3).tolist():
        pen.ellipse(window_x, (deep + high) / 2 + 0.02, 0.05, 0.05, darker(GLASS, 0.45))
    pen.stroke([(half * 0.75, deep), (half * 0.75, high + 0.15)], 0.03, INK)


def draw_car(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A car, a van or a pickup, seen from the side, front to the right."""
    coat, half, wheel = palette.paint(rng), rng.uniform(0.72, 0.85), rng.uniform(0.14, 0.18)
    kind, floor, belt = rng.integers(3), wheel * 0.8, rng.uniform(0.4, 0.46)
    top = belt + rng.uniform(0.24, 0.34) + (0.12 if kind == 1 else 0.0)
    rear, front = [(-0.5, 0.32), (-0.95, 0.55), (-0.25, 0.35)][kind]
    slope_rear, slope_front = rng.uniform(0.02, 0.16), rng.uniform(0.1, 0.24)
    nose = curve((half * 0.8, belt), (half, belt), (half, floor + 0.1))
    pen.polygon([(-half, floor), (-half, belt - 0.03), (-half + 0.05, belt), *nose, (half, floor)], coat)
    roof_left, roof_right = rear * half + slope_rear * 0.6, front * half + 0.05
    cabin = [(rear * half, belt - 0.02), (roof_left, top - 0.03), (roof_left + 0.05, top)]
    pen.polygon([*cabin, (roof_right, top), (roof_right + slope_front, belt - 0.02)], coat)
    glass = mix(GLASS, INK, rng.uniform(0.0, 0.6))
    middle, low, high = (roof_left + roof_right) / 2 + 0.03, belt + 0.01, top - 0.06
    pen.polygon(
        [(roof_left + 0.03, low), (roof_left + 0.06, high), (middle - 0.03, high), (middle - 0.03, low)],
        glass,
    )
    end = roof_right + slope_front - 0.06
    pen.polygon([(middle + 0.03, low), (middle + 0.03, high), (roof_right - 0.02, high), (end, low)], glass)
    pen.box(-half, floor, half, floor + 0.07, darker(coat, 0.45))
    if rng.random() < 0.4:
        pen.box(-half + 0.02, belt - 0.12, half - 0.05, belt - 0.07, lighter(coat, 0.7))
    pen.stroke([(middle, floor + 0.06), (middle, belt)], 0.02, darker(coat, 0.4))
    pen.ellipse(half - 0.05, belt - 0.1, 0.05, 0.05, (255, 240, 180))
    pen.box(-half, belt - 0.14, -half + 0.06, belt - 0.05, (200, 50, 40))
    hub = lighter(coat, 0.6) if rng.random() < 0.5 else (200, 200, 205)
    for x in (-half * 0.58, half * 0.58):
        pen.ellipse(x, wheel, wheel * 1.18, wheel * 1.18, darker(coat, 0.65))
        pen.ellipse(x, wheel, wheel, wheel, RUBBER)
        pen.ellipse(x, wheel, wheel * 0.5, wheel * 0.5, hub)


def draw_cat(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A cat that sits facing us, or stands with its head to the right."""
    coat = palette.fur(rng)
    stripe, pale = darker(coat, 0.45), lighter(coat, 0.55)
    sits, tabby = rng.random() < 0.55, rng.random() < 0.5
    if sits:
        wide = rng.uniform(0.24, 0.32)
        side = rng.uniform(0.42, 0.6)
        pen.stroke(curve((0.15, 0.08), (side, 0.0), (side, rng.uniform(0.3, 0.6))), 0.11, coat, 0.07)
        pen.ellipse(0.0, 0.2, wide, 0.2, coat)
        pen.polygon([(-wide, 0.2), (-0.16, 0.6), (0.16, 0.6), (wide, 0.2)], coat)
        pen.ellipse(0.0, 0.36, 0.12, 0.2, pale)
        for x in (-0.1, 0.1):
            pen.stroke([(x, 0.35), (x, 0.05)], 0.1, lighter(coat, 0.1))
            pen.ellipse(x, 0.04, 0.08, 0.045, pale)
        if tabby:
            for y in (0.25, 0.36, 0.47):
                pen.stroke([(-wide + (y - 0.2) * 0.25, y), (-0.12, y - 0.03)], 0.035, stripe)
                pen.stroke([(wide - (y - 0.2) * 0.25, y), (0.12, y - 0.03)], 0.035, stripe)
        head_x, head_y, head = rng.uniform(-0.06, 0.06), 0.72, rng.uniform(0.2, 0.24)
    else:
        leg, back = rng.uniform(0.22, 0.3), rng.uniform(0.58, 0.64)
        tail_top = rng.uniform(0.75, 1.0)
        pen.stroke(curve((-0.42, back - 0.1), (-0.75, back - 0.1), (-0.6, tail_top)), 0.1, coat, 0.06)
        for x in (-0.38, -0.24, 0.2, 0.34):
            pen.stroke([(x, leg + 0.12), (x, 0.02)], 0.11, darker(coat, 0.2) if x in (-0.24, 0.2) else coat)
            pen.ellipse(x + 0.02, 0.035, 0.07, 0.04, pale)
        pen.ellipse(-0.02, (leg + back) / 2, 0.5, (back - leg) / 2 + 0.05, coat)
        if tabby:
            for x in (-0.3, -0.16, -0.02, 0.12):
                pen.stroke([(x, back + 0.02), (x + 0.03, back - 0.2)], 0.045, stripe)
        head_x, head_y, head = 0.46, back + rng.uniform(0.05, 0.15), rng.uniform(0.18, 0.22)
    _draw_cat_head(pen, rng, head_x, head_y, head, coat)


def _draw_cat_head(
    pen: Pen, rng: np.random.Generator, x: float, y: float, radius: float, coat: Colour
) -> None:
    ear = rng.uniform(0.75, 1.0) * radius
    for side in (-1, 1):
        tip = (x + side * radius * 0.85, y + radius * 0.55 + ear)
        pen.polygon([(x + side * radius, y + 0.02), tip, (x + side * radius * 0.15, y + radius * 0.8)], coat)
        inner = (x + side * radius * 0.78, y + radius * 0.4 + ear * 0.8)
        root = (x + side * radius * 0.4, y + radius * 0.75)
        pen.polygon([(x + side * radius * 0.85, y + radius * 0.4), inner, root], (226, 160, 150))
    pen.ellipse(x, y, radius * 1.08, radius * 0.92, coat)
    pen.ellipse(x, y - radius * 0.38, radius * 0.5, radius * 0.38, lighter(coat, 0.55))
    iris = hsv(rng.uniform(0.12, 0.4), 0.7, 0.85)
    for side in (-1, 1):
        pen.ellipse(x + side * radius * 0.42, y + radius * 0.12, radius * 0.22, radius * 0.22, iris)
        pen.ellipse(x + side * radius * 0.42, y + radius * 0.12, radius * 0.11, radius * 0.2, INK)
        whiskers = [
            (x + side * radius * 0.4, y - radius * 0.35),
            (x + side * radius * 1.35, y - radius * 0.3),
        ]
        pen.stroke(whiskers, 0.015, WHITE)
    nose_y = y - radius * 0.2
    pen.polygon([(x - 0.04, nose_y), (x + 0.04, nose_y), (x, nose_y - 0.05)], (210, 110, 110))


def draw_cup(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A cup with a handle on the right, seen a little from above, sometimes on a saucer."""
    glaze, band = palette.paint(rng), palette.paint(rng)
    if rng.random() < 0.35:
        glaze = lighter(palette.stone(rng), 0.5)
    half, foot, top = rng.uniform(0.34, 0.46), rng.uniform(0.5, 0.95), rng.uniform(0.72, 0.95)
    tilt, low = rng.uniform(0.07, 0.13), 0.06
    if rng.random() < 0.45:
        pen.ellipse(0.0, 0.08, half * 1.6, 0.1, darker(glaze, 0.15))
        pen.ellipse(0.0, 0.1, half * 1.35, 0.07, lighter(glaze, 0.25))
        low = 0.12
    ring = rng.uniform(0.13, 0.19)
    grip = arc(half * 0.9, (low + top) / 2 + 0.03, ring * 1.2, ring * 1.3, -1.9, 1.9)
    pen.stroke(grip, 0.085, darker(glaze, 0.12))
    bottom = arc(0.0, low + 0.03, half * foot, tilt * 0.7, math.pi, 2 * math.pi)
    bulge = half * rng.uniform(0.95, 1.1)
    right = curve((half * foot, low + 0.03), (bulge, low + 0.08), (half, top))
    left = curve((-half, top), (-bulge, low + 0.08), (-half * foot, low + 0.03))
    pen.polygon([*bottom, *right, *left], glaze)
    _draw_glaze_pattern(pen, rng, half * (0.5 + 0.5 * foot), low, top, band)
    pen.ellipse(0.0, top, half, tilt, lighter(glaze, 0.4))
    drink = [(92, 54, 30), (170, 96, 34), (240, 236, 226), darker(glaze, 0.6)][rng.integers(4)]
    pen.ellipse(0.0, top - 0.012, half * 0.87, tilt * 0.78, drink)


def _draw_glaze_pattern(
    pen: Pen, rng: np.random.Generator, half: float, low: float, top: float, colour: Colour
) -> None:
    """Bands, uprights, dots, or nothing, on the body of a cup."""
    kind, half = rng.integers(4), half * 0.86
    if kind == 0:
        for y in np.linspace(low + 0.2, top - 0.22, rng.integers(1, 4)).tolist():
            upper, lower = (
                arc(0.0, level, half, 0.05, math.pi, 2 * math.pi) for level in (y + 0.05, y - 0.03)
            )
            pen.polygon([*upper, *lower[::-1]], colour)
    elif kind == 1:
        for x in np.linspace(-0.8, 0.8, rng.integers(3, 6)).tolist():
            pen.stroke([(x * half * 0.9, low + 0.12), (x * half, top - 0.16)], 0.055, colour)
    elif kind == 2:
        for row, y in enumerate(np.linspace(low + 0.16, top - 0.24, 3).tolist()):
            for x in (-0.6, -0.1, 0.4):
                pen.ellipse((x + 0.2 * (row % 2)) * half, y, 0.045, 0.05, colour)


def draw_flower(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A daisy or a tulip on a stem with leaves, sometimes in a pot."""
    petal, stem, green = palette.paint(rng), rng.uniform(-0.12, 0.12), palette.leaf(rng)
    if rng.random() < 0.2:
        petal = WHITE
    head_y, base = rng.uniform(0.68, 0.78), 0.0
    if rng.random() < 0.4:
        base, clay = 0.22, mix(palette.wood(rng), (196, 104, 62), 0.5)
        pen.polygon([(-0.15, 0.0), (0.15, 0.0), (0.2, 0.2), (-0.2, 0.2)], clay)
        pen.box(-0.23, 0.19, 0.23, 0.27, lighter(clay, 0.15))
    pen.stroke(curve((0.0, base), (-stem, head_y / 2), (stem, head_y)), 0.055, darker(green, 0.15))
    for side in (-1, 1)[: rng.integers(1, 3)] if rng.random() < 0.7 else (1, -1):
        y, long = base + rng.uniform(0.1, 0.22), rng.uniform(0.2, 0.3)
        tip = (side * long, y + rng.uniform(0.08, 0.26))
        upper, lower = curve((0.0, y), (side * 0.06, y + 0.2), tip), curve(tip, (side * long, y), (0.0, y))
        pen.polygon([*upper, *lower], green)
    if rng.random() < 0.7:
        _draw_daisy(pen, rng, stem, head_y, petal)
    else:
        _draw_tulip(pen, rng, stem, head_y, petal)


def _draw_daisy(pen: Pen, rng: np.random.Generator, x: float, y: float, petal: Colour) -> None:
    count, long = int(rng.integers(5, 11)), rng.uniform(0.15, 0.2)
    wide, start, heart = 0.62 / count + 0.03, rng.uniform(0, 6.3), rng.uniform(0.08, 0.13)
    for place in range(count):
        angle = start + 2 * math.pi * place / count
        shade = darker(petal, 0.14) if place % 2 else petal
        px, py = x + np.cos(angle) * long, y + np.sin(angle) * long
        pen.ellipse(px, py, long * 0.8, wide, shade, turn=angle)
    centre = hsv(rng.uniform(0.06, 0.15), 0.85, rng.uniform(0.35, 0.95))
    pen.ellipse(x, y, heart, heart, darker(centre, 0.25))
    pen.ellipse(x, y + 0.015, heart * 0.75, heart * 0.7, centre)


def _draw_tulip(pen: Pen, rng: np.random.Generator, x: float, y: float, petal: Colour) -> None:
    half, top = rng.uniform(0.17, 0.24), y + rng.uniform(0.22, 0.3)
    pen.polygon([*curve((x - half, top), (x - half * 1.3, y - 0.12), (x, y - 0.14)), (x + 0.02, top)], petal)
    pen.polygon([*curve((x + half, top), (x + half * 1.3, y - 0.12), (x, y - 0.14)), (x - 0.02, top)], petal)
    middle = [*curve((x - half * 0.6, y), (x - 0.1, top - 0.1), (x, top + 0.04))]
    middle += curve((x, top + 0.04), (x + 0.1, top - 0.1), (x + half * 0.6, y))
    pen.polygon([*middle, (x, y - 0.13)], lighter(petal, 0.25))


def draw_house(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A house with a roof, a door and windows, its walls of plaster, brick or boards."""
    wall = [lighter(palette.paint(rng), 0.45), lighter(palette.stone(rng), 0.3), palette.wood(rng)][
        rng.integers(3)
    ]
    roof = [palette.paint(rng), hsv(0.02, 0.6, 0.6), hsv(0.6, 0.15, 0.4)][rng.integers(3)]
    half, eaves, ridge = rng.uniform(0.38, 0.55), rng.uniform(0.45, 0.62), rng.uniform(0.9, 1.05)
    if rng.random() < 0.7:
        x = rng.choice([-1, 1]) * half * rng.uniform(0.4, 0.65)
        pen.box(x - 0.06, eaves, x + 0.06, ridge + 0.02, darker(wall, 0.35))
        pen.box(x - 0.08, ridge, x + 0.08, ridge + 0.05, darker(wall, 0.5))
    pen.box(-half, 0.0, half, eaves + 0.02, wall)
    _draw_courses(pen, rng, half, eaves, wall)
    over, flat = half + rng.uniform(0.05, 0.12), rng.choice([0.0, rng.uniform(0.3, 0.8)]) * half
    pen.polygon([(-over, eaves), (over, eaves), (flat, ridge), (-flat, ridge)], roof)
    for level in np.linspace(0.2, 0.8, 4).tolist():
        x, y = over + (flat - over) * level, eaves + (ridge - eaves) * level
        pen.stroke([(-x, y), (x, y)], 0.02, darker(roof, 0.25))
    pen.box(-over, eaves - 0.03, over, eaves + 0.02, darker(roof, 0.4))
    door, door_x = palette.paint(rng), rng.uniform(-0.6, 0.6) * half
    tall = eaves * rng.uniform(0.55, 0.7)
    pen.box(door_x - 0.1, 0.0, door_x + 0.1, tall + 0.03, lighter(wall, 0.6))
    pen.box(door_x - 0.075, 0.0, door_x + 0.075, tall, darker(door, 0.2))
    glass = (250, 222, 130) if rng.random() < 0.3 else darker(GLASS, rng.uniform(0.1, 0.6))
    for x in (-0.68, -0.05, 0.6):
        if abs(x * half - door_x) > 0.2:
            _draw_window(pen, x * half, eaves * 0.6, 0.075, 0.1, glass)
    if flat == 0.0 and rng.random() < 0.5:
        _draw_window(pen, 0.0, eaves + (ridge - eaves) * 0.35, 0.06, 0.06, glass)


def _draw_courses(pen: Pen, rng: np.random.Generator, half: float, eaves: float, wall: Colour) -> None:
    """Brick courses or upright boards, or plain plaster."""
    kind = rng.integers(3)
    if kind == 0:
        for row, y in enumerate(np.linspace(0.0, eaves, 7)[1:].tolist()):
            pen.stroke([(-half, y), (half, y)], 0.016, darker(wall, 0.25))
            for x in np.arange(-half + 0.06 + 0.07 * (row % 2), half, 0.16).tolist():
                pen.stroke([(x, y), (x, y - eaves / 6)], 0.016, darker(wall, 0.25))
    elif kind == 1:
        for x in np.linspace(-half, half, 9)[1:-1].tolist():
            pen.stroke([(x, 0.0), (x, eaves)], 0.018, darker(wall, 0.25))


def _draw_window(pen: Pen, x: float, y: float, half: float, high: float, glass: Colour) -> None:
    pen.box(x - half - 0.025, y - high - 0.025, x + half + 0.025, y + high + 0.025, WHITE)
    pen.box(x - half, y - high, x + half, y + high, glass)
    pen.stroke([(x, y - high), (x, y + high)], 0.022, WHITE)
    pen.stroke([(x - half, y), (x + half, y)], 0.022, WHITE)


def draw_mushroom(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A mushroom with a spotted or plain cap, sometimes with a small one beside it."""
    cap = palette.paint(rng) if rng.random() < 0.7 else palette.wood(rng)
    flesh = lighter(hsv(0.1, 0.3, rng.uniform(0.7, 0.95)), 0.3)
    if rng.random() < 0.4:
        _draw_one_mushroom(pen, rng, rng.choice([-1, 1]) * 0.4, rng.uniform(0.35, 0.55), cap, flesh)
    _draw_one_mushroom(pen, rng, 0.0, 1.0, cap, flesh)


def _draw_one_mushroom(
    pen: Pen, rng: np.random.Generator, x: float, size: float, cap: Colour, flesh: Colour
) -> None:
    half, rim = size * rng.uniform(0.36, 0.54), size * rng.uniform(0.45, 0.62)
    foot, neck, dome = size * rng.uniform(0.12, 0.2), size * rng.uniform(0.08, 0.13), size - rim
    left = curve((x - foot, 0.0), (x - foot * 1.1, rim * 0.3), (x - neck, rim))
    right = curve((x + neck, rim), (x + foot * 1.1, rim * 0.3), (x + foot, 0.0))
    pen.polygon([*left, *right], flesh)
    pen.stroke([(x - neck * 1.3, rim * 0.7), (x + neck * 1.3, rim * 0.7)], 0.05 * size, darker(flesh, 0.15))
    pen.ellipse(x, rim, half * 0.97, dome * 0.2, darker(flesh, 0.3))
    for place in (-0.6, -0.3, 0.0, 0.3, 0.6):
        pen.stroke(
            [(x + place * half, rim - 0.01), (x + place * neck, rim - dome * 0.16)], 0.016, darker(flesh, 0.5)
        )
    brim = arc(x, rim, half, dome * 0.14, math.pi, 2 * math.pi)
    peak = x + rng.uniform(-0.05, 0.05)
    if rng.random() < 0.65:
        top = arc(x, rim, half, dome, 0.0, math.pi)
    else:
        top = [*curve((x + half, rim), (x + half * 0.5, rim + dome * 0.9), (peak, size))]
        top += curve((peak, size), (x - half * 0.5, rim + dome * 0.9), (x - half, rim))
    pen.polygon([*top, *[(px, 2 * rim - py) for px, py in brim]], cap)
    if rng.random() < 0.65:
        spot = lighter(cap, 0.85)
        for place in rng.permutation(6)[: rng.integers(3, 6)].tolist():
            angle, reach = 0.35 + place * 0.48, rng.uniform(0.45, 0.75)
            px, py = x + half * reach * np.cos(angle), rim + dome * reach * np.sin(angle) * 0.95
            pen.ellipse(px, py, size * rng.uniform(0.035, 0.06), size * 0.035, spot)


def draw_robot(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A tin robot with an antenna, on legs or on tracks."""
    tin = mix(palette.paint(rng), palette.stone(rng), rng.uniform(0.2, 0.9))
    trim, light = palette.paint(rng), hsv(rng.random(), 0.6, 1.0)
    half, hip, shoulder = rng.uniform(0.22, 0.32), rng.uniform(0.2, 0.3), rng.uniform(0.6, 0.68)
    head, high = rng.uniform(0.15, 0.22), rng.uniform(0.18, 0.24)
    if rng.random() < 0.6:
        for side in (-1, 1):
            pen.box(side * half * 0.55 - 0.06, 0.04, side * half * 0.55 + 0.06, hip + 0.02, darker(tin, 0.35))
            pen.box(side * half * 0.6 - 0.1, 0.0, side * half * 0.6 + 0.1, 0.08, darker(trim, 0.2))
    else:
        pen.polygon(arc(0.0, hip * 0.45, half * 1.25, hip * 0.45, 0, 2 * math.pi), RUBBER)
        for x in (-0.7, 0.0, 0.7):
            pen.ellipse(x * half, hip * 0.45, 0.055, 0.055, lighter(tin, 0.2))
    for side in (-1, 1):
        hand = (side * (half + rng.uniform(0.12, 0.22)), rng.choice([hip, shoulder + 0.15]))
        elbow = (side * (half + rng.uniform(0.12, 0.24)), (shoulder + hip) / 2)
        pen.stroke(curve((side * half * 0.9, shoulder - 0.07), elbow, hand), 0.075, darker(tin, 0.25))
        pen.ellipse(*hand, 0.06, 0.06, trim)
    pen.box(-half, hip, half, shoulder, tin)
    pen.box(-half * 0.62, hip + 0.12, half * 0.62, shoulder - 0.08, lighter(tin, 0.45))
    for x, colour in ((-0.35, trim), (0.0, light), (0.35, INK)):
        pen.ellipse(x * half, shoulder - 0.15, 0.035, 0.035, colour)
    pen.stroke([(-half * 0.45, hip + 0.17), (half * 0.45, hip + 0.17)], 0.03, darker(tin, 0.5))
    pen.box(-0.07, shoulder - 0.01, 0.07, shoulder + 0.05, darker(tin, 0.4))
    base, top = shoulder + 0.04, shoulder + 0.04 + high
    pen.box(-head, base, head, top, tin)
    antenna = rng.uniform(-0.5, 0.5) * head
    pen.stroke([(antenna, top), (antenna, top + 0.1)], 0.03, darker(tin, 0.4))
    pen.ellipse(antenna, top + 0.1, 0.04, 0.04, light)
    eye = rng.uniform(0.04, 0.06)
    for side in (-1, 1):
        pen.ellipse(side * head * 0.48, base + high * 0.62, eye * 1.3, eye * 1.3, darker(tin, 0.55))
        pen.ellipse(side * head * 0.48, base + high * 0.62, eye * 0.8, eye * 0.8, light)
    pen.box(-head * 0.5, base + 0.03, head * 0.5, base + 0.065, darker(tin, 0.6))


def draw_tree(pen: Pen, rng: np.random.Generator, palette: Palette) -> None:
    """A broad tree, a fir or a poplar."""
    bark, leaf, kind = palette.wood(rng), palette.leaf(rng), rng.integers(3)
    if rng.random() < 0.25:  # in blossom, or of a picture book
        leaf = palette.paint(rng)
    wide = rng.uniform(0.05, 0.1)
    pen.polygon([(-wide * 1.5, 0.0), (wide * 1.5, 0.0), (wide * 0.7, 0.6), (-wide * 0.7, 0.6)], bark)
    pen.stroke([(-wide * 0.4, 0.02), (-wide * 0.2, 0.4)], 0.025, darker(bark, 0.35))
    if kind == 0:
        _draw_round_crown(pen, rng, wide, bark, leaf)
    elif kind == 1:
        _draw_fir_crown(pen, rng, leaf)
    else:
        half, low = rng.uniform(0.17, 0.25), rng.uniform(0.15, 0.25)
        pen.polygon(arc(0.0, (1 + low) / 2, half, (1 - low) / 2, 0.0, 2 * math.pi), leaf)
        _draw_dabs(pen, rng, 0.0, (1 + low) / 2, half * 0.75, (1 - low) / 2 * 0.8, leaf)


def _draw_round_crown(pen: Pen, rng: np.random.Generator, wide: float, bark: Colour, leaf: Colour) -> None:
    for side in (-1, 1):
        pen.stroke([(0.0, 0.3), (side * 0.25, 0.6)], wide * 1.1, bark, wide * 0.4)
    spread, count = rng.uniform(0.18, 0.3), int(rng.integers(3, 6))
    for place in range(count):
        angle = math.pi * (place + 0.5) / count + rng.uniform(-0.2, 0.2)
        x, y = spread * np.cos(angle) * 1.1, 0.6 + 0.16 * np.sin(angle)
        pen.polygon(blob(rng, x, y, rng.uniform(0.19, 0.25)), mix(leaf, darker(leaf), rng.uniform(0, 0.5)))
    _draw_dabs(pen, rng, 0.0, 0.68, spread + 0.1, 0.2, leaf)
    if rng.random() < 0.35:
        fruit = hsv(rng.choice([0.0, 0.08, 0.14, 0.8]), 0.8, 0.9)
        for _ in range(rng.integers(4, 9)):
            pen.ellipse(rng.uniform(-0.32, 0.32), rng.uniform(0.52, 0.84), 0.035, 0.035, fruit)


def _draw_fir_crown(pen: Pen, rng: np.random.Generator, leaf: Colour) -> None:
    tiers, half, low = int(rng.integers(3, 6)), rng.uniform(0.28, 0.42), rng.uniform(0.14, 0.24)
    edges = np.linspace(low, 1.0, tiers + 1).tolist()
    for tier in range(tiers):
        reach, bottom = half * (1 - tier / (tiers + 0.8)), edges[tier]
        top = min(1.03, edges[tier + 1] + 0.14)
        shade = mix(darker(leaf, 0.3), lighter(leaf, 0.15), tier / tiers)
        hem = curve((-reach, bottom), (0.0, bottom - 0.08), (reach, bottom))
        pen.polygon([*hem, (0.0, top)], shade)
        pen.stroke(hem, 0.02, darker(leaf, 0.5))


def _draw_dabs(
    pen: Pen, rng: np.random.Generator, x: float, y: float, radius_x: float, radius_y: float, leaf: Colour
) -> None:
    """Clusters of leaves: lighter dabs above, darker ones below."""
    for radius, angle in zip(np.sqrt(rng.random(14)), rng.uniform(0, 2 * math.pi, 14), strict=True):
        dx, dy = radius * np.cos(angle), radius * np.sin(angle)
        tone = lighter(leaf, 0.1 + 0.25 * dy) if dy > 0 else darker(leaf, 0.1 - 0.3 * dy)
        pen.ellipse(x + dx * radius_x, y + dy * radius_y, 0.045, 0.03, tone, turn=angle)


Figure = Callable[[Pen, np.random.Generator, Palette], None]

FIGURES: dict[str, tuple[Figure, float]] = {  # class name: how to draw it, and its usual width / height
    "bird": (draw_bird, 1.0),
    "boat": (draw_boat, 1.05),
    "car": (draw_car, 2.0),
    "cat": (draw_cat, 0.95),
    "cup": (draw_cup, 1.2),
    "flower": (draw_flower, 0.65),
    "house": (draw_house, 1.1),
    "mushroom": (draw_mushroom, 0.95),
    "robot": (draw_robot, 0.8),
    "tree": (draw_tree, 0.7),
}

CLASSES = tuple(FIGURES)
