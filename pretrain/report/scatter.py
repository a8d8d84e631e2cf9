"""Points in a plane, coloured by class, with the names of the classes among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.report.markup import Markup, tag
from pretrain.report.palette import POINTS

SIDE = 400
MARGIN = 16
LABEL_HEIGHT = 15.0  # units between two names that would write over each other
NEAR = 8  # neighbours of its own class that a point is judged by
TALLEST = 1.2  # height of a drawing over its width
ROUNDS = 60  # of moving names apart
NO_CLASS_COLOR = "#8a93a0"


@dataclass(frozen=True)
class Points:
    """(N, 2) places, (N,) classes with -1 for none, and the names of the classes."""

    places: NDArray[np.float64]
    labels: NDArray[np.int64]
    names: dict[int, str]


def scatter(points: Points) -> Markup:
    """A drawing: a round or square dot for each point, a name at the middle of each class."""
    places, height = _fitted(points.places)
    classes = sorted({int(label) for label in points.labels})
    rest = "images" if classes == [-1] else "no label"
    dots, legend, middles = [], [], []
    for label in classes:
        mine = places[points.labels == label]
        color, cap = _looks(classes.index(label), label)
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in mine)
        dots.append(
            tag(
                "path",
                d=path,
                stroke=color,
                stroke_width=5,
                stroke_linecap=cap,
                stroke_opacity=0.75,
                fill="none",
            )
        )
        if label >= 0:
            middles.append((points.names.get(label, f"class {label}"), *densest(mine)))
        name = points.names.get(label, f"class {label}") if label >= 0 else rest
        swatch = tag("path", d="M7 7h0", stroke=color, stroke_width=9, stroke_linecap=cap)
        legend.append(
            tag(
                "li",
                tag("svg", swatch, viewBox="0 0 14 14", class_="swatch", aria_hidden="true"),
                f"{name} ({len(mine)})",
            )
        )
    names = [tag("text", name, x=x, y=y) for name, x, y in _apart(middles, height)]
    drawing = tag(
        "svg",
        *dots,
        *names,
        viewBox=f"0 0 {SIDE} {height:.0f}",
        role="img",
        aria_label=f"{len(places)} points of {len(classes)} classes",
        class_="scatter",
    )
    return tag("figure", drawing, tag("ul", *legend, class_="points"), class_="card plane")


def _looks(place: int, label: int) -> tuple[str, str]:
    """Colour and line cap, which is the shape of the dot: ten colours round, then the same square."""
    if label < 0:
        return NO_CLASS_COLOR, "round"
    return POINTS[place % len(POINTS)], "square" if place // len(POINTS) % 2 else "round"


def densest(places: NDArray[np.float64]) -> tuple[float, float]:
    """The point that its own kind lies closest around: where the name of a class belongs. (N, 2) -> (x, y)"""
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)  # (N, N)
    reach = np.sort(apart, axis=1)[:, min(NEAR, len(places) - 1)]
    x, y = places[int(reach.argmin())].tolist()
    return x, y


def _fitted(places: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Into the width of the drawing, keeping the proportions; and the drawing's height."""
    low, high = places.min(axis=0), places.max(axis=0)
    scale = (SIDE - 2 * MARGIN) / max(float(high[0] - low[0]), float(high[1] - low[1]) / TALLEST, 1e-12)
    size = (high - low) * scale
    fitted: NDArray[np.float64] = (places - low) * scale + MARGIN
    fitted[:, 0] += (SIDE - 2 * MARGIN - size[0]) / 2
    return fitted, float(size[1]) + 2 * MARGIN


def _apart(names: list[tuple[str, float, float]], height: float) -> list[tuple[str, float, float]]:
    """Move names up and down until none writes over another; and all of them into the drawing."""
    wide = [7.2 * len(name) / 2 for name, _, _ in names]
    xs = [min(max(x, wide[i] + 2), SIDE - wide[i] - 2) for i, (_, x, _) in enumerate(names)]
    ys = [min(max(y, 14.0), height - 6.0) for _, _, y in names]
    for _ in range(ROUNDS):
        moved = False
        for i in range(len(names)):
            for j in range(i):
                gap = LABEL_HEIGHT - abs(ys[i] - ys[j])
                if gap > 0 and abs(xs[i] - xs[j]) < wide[i] + wide[j] + 4:
                    sign = 1.0 if ys[i] >= ys[j] else -1.0
                    ys[i] = min(max(ys[i] + sign * gap / 2, 14.0), height - 6.0)
                    ys[j] = min(max(ys[j] - sign * gap / 2, 14.0), height - 6.0)
                    moved = True
        if not moved:
            break
    return [(name, xs[i], ys[i]) for i, (name, _, _) in enumerate(names)]
