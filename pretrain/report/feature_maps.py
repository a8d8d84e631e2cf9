"""The sections on features: colours of patches, the plane of an evaluation set, neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.report.markup import Markup, join, tag
from pretrain.report.page import Section, how_to_read, section
from pretrain.report.pictures import Pixels, panel, panels, picture
from pretrain.report.scatter import Points, scatter

NUM_NEIGHBOURS = 5


@dataclass(frozen=True)
class PatchColors:
    """Images, and their patches' features as colours."""

    images: tuple[Pixels, ...]
    maps: tuple[Pixels, ...]  # a pixel for each patch
    variance_ratio: float  # that the three colours hold
    network: str
    source: str


@dataclass(frozen=True)
class Neighbour:
    """One image of the bank."""

    image: Pixels
    label: str | None
    similarity: float
    is_right: bool | None  # of the query's class; None without labels


@dataclass(frozen=True)
class Query:
    """An image and those that are most like it."""

    image: Pixels
    label: str | None
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Neighbours:
    """k-NN of a few queries."""

    queries: tuple[Query, ...]
    num_bank: int
    queries_from: str
    bank_from: str
    feature: str  # class, mean_patch, ...
    network: str


@dataclass(frozen=True)
class Plane:
    """An evaluation set in two dimensions."""

    points: NDArray[np.float64]  # (N, 2)
    labels: NDArray[np.int64]  # (N,), -1 for none
    names: dict[int, str]
    num_classes: int  # of the set; not all may be shown
    source: str
    feature: str
    network: str
    perplexity: float


def patch_colors_section(colors: PatchColors) -> Section:
    cells: list[Markup] = []
    for number, (image, shown) in enumerate(zip(colors.images, colors.maps, strict=True), start=1):
        pair = [
            panel(picture(image, f"image {number}")),
            panel(picture(shown, f"features of the patches of image {number} as colours")),
        ]
        cells.append(tag("div", join(pair), class_="pair"))
    return section(
        "patches",
        "Patch features as colours",
        how_to_read(
            f"The first three principal components of all patch features ({colors.network}; images of "
            f"{colors.source}) as red, green and blue; they hold {100 * colors.variance_ratio:.0f} % of the "
            "variance. The same colour means the same feature, in all images. ",
            tag("b", "Good"),
            ": parts of one thing share a colour and differ from the ground; a smooth gradient over every "
            "image alike shows positions only.",
        ),
        panels(cells, "pairs"),
    )


def plane_section(plane: Plane) -> Section:
    shown = sorted({int(label) for label in plane.labels if label >= 0})
    chosen = f"{len(shown)} of {plane.num_classes} classes, " if plane.num_classes > len(shown) else ""
    if plane.num_classes and not shown:
        chosen = f"of {plane.num_classes} classes, too many for colours; "
    return section(
        "plane",
        "The evaluation set in a plane (t-SNE)",
        how_to_read(
            f"{len(plane.points)} images of {plane.source} ({chosen}{plane.feature} feature, "
            f"{plane.network}): 50 principal components, then t-SNE of perplexity {plane.perplexity:.0f}, so "
            "that near points are similar images; distances between groups say little. ",
            tag("b", "Good"),
            ": classes lie together, though no label was trained on.",
        ),
        scatter(Points(plane.points, plane.labels, plane.names)),
    )


def neighbours_section(neighbours: Neighbours) -> Section:
    judged = [
        one.is_right for query in neighbours.queries for one in query.neighbours if one.is_right is not None
    ]
    told = f" Here {sum(judged)} of {len(judged)} are of the query's class." if judged else ""
    return section(
        "neighbours",
        "Nearest neighbours",
        how_to_read(
            f"Queries of {neighbours.queries_from}, each with the {NUM_NEIGHBOURS} images most like it among "
            f"{neighbours.num_bank} of {neighbours.bank_from} (cosine of {neighbours.feature} features, "
            f"{neighbours.network}).{told} ",
            tag("b", "Good"),
            ": the same thing in other colours and places, not the same colours.",
        ),
        join(_row(query) for query in neighbours.queries),
    )


def _row(query: Query) -> Markup:
    named = query.label or "no label"
    cells = [panel(picture(query.image, f"query, {named}"), join([tag("b", "query"), f" {named}"]))]
    for place, one in enumerate(query.neighbours, start=1):
        label = one.label or "no label"
        told = None
        if one.is_right is not None:
            told = tag("span", "right" if one.is_right else "wrong", class_="good" if one.is_right else "bad")
        cells.append(
            panel(
                picture(one.image, f"neighbour {place}, {label}, similarity {one.similarity:.3f}"),
                join([f"{label}, {one.similarity:.3f}", tag("br") if told else None, told]),
            )
        )
    return panels(cells, "panels six")
