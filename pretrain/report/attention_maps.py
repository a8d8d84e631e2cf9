"""The section on what tokens look at in the last block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.report.markup import Markup, tag
from pretrain.report.page import Section, how_to_read, section, table
from pretrain.report.palette import heat, heat_stops
from pretrain.report.pictures import Pixels, panel, panels, picture

MAX_HEADS = 12  # that are shown
DIMMED = 0.22  # brightness of what is outside the mass


@dataclass(frozen=True)
class TokenAttention:
    """Of one query: weights on the patches, each a map (rows, columns)."""

    name: str  # class, or the task whose token it is
    heads: NDArray[np.float32]  # (H, rows, columns)
    on_patches: float  # share of the attention that goes to patches, mean over heads
    evenness: float  # 0: one patch, 1: all alike
    mass: NDArray[np.bool_]  # (rows, columns): the fewest patches with 60 % of the mean over the heads


@dataclass(frozen=True)
class ImageAttention:
    """One image and what each token looks at in it."""

    image: Pixels
    tokens: tuple[TokenAttention, ...]
    label: str | None = None


@dataclass(frozen=True)
class Attention:
    """The last block's attention on a few images."""

    images: tuple[ImageAttention, ...]
    network: str  # such as "teacher, step 720"
    source: str
    readers: dict[str, str]  # what each token is for, by its name


def attention_section(attention: Attention) -> Section:
    first = attention.images[0].tokens[0]
    is_mean = first.name == "mean patch"
    query = (
        "what a patch attends to on average, for no task of this run reads a class token"
        if is_mean
        else f"the {first.name} token as query and the patches as keys"
    )
    parts: list[Markup | None] = [
        how_to_read(
            f"Softmax weights of the last block ({attention.network}; images of {attention.source}): "
            f"{query}. Every map is as bright as its own largest weight. Beside the mean of the heads, the "
            "fewest patches that hold 60 % of its mass. ",
            tag("b", "Good"),
            ": heads that differ, and look at things rather than at corners or at everything alike.",
        ),
        _scale(),
    ]
    parts += [_heads(image) for image in attention.images]
    if len(attention.images[0].tokens) > 1:
        parts += _tokens(attention)
    return section("attention", "Attention of the last block", *parts)


def _heads(image: ImageAttention) -> Markup:
    token = image.tokens[0]
    named = f" ({image.label})" if image.label else ""
    mean = token.heads.mean(axis=0)
    cells = [
        panel(picture(image.image, f"image{named}"), f"image{named}"),
        panel(picture(_map(mean), f"mean attention of all heads{named}"), "mean of heads"),
        panel(
            picture(masked(image.image, token.mass), f"patches with 60 % of the attention{named}"),
            "60 % of the mass",
        ),
    ]
    for number, head in enumerate(token.heads[:MAX_HEADS]):
        cells.append(
            panel(picture(_map(head), f"attention of head {number + 1}{named}"), f"head {number + 1}")
        )
    return panels(cells, "panels maps")


def _tokens(attention: Attention) -> list[Markup | None]:
    """The tokens of tasks beside the class token, mean over heads."""
    rows = []
    for place, token in enumerate(attention.images[0].tokens):
        all_of_it = [image.tokens[place] for image in attention.images]
        like = [likeness(image.tokens[0], image.tokens[place]) for image in attention.images]
        rows.append(
            (
                token.name,
                attention.readers.get(token.name, ""),
                f"{100 * np.mean([one.on_patches for one in all_of_it]):.0f} %",
                f"{np.mean([one.evenness for one in all_of_it]):.2f}",
                "itself" if place == 0 else f"{np.mean(like):.2f}",
            )
        )
    cells: list[Markup] = []
    for image in attention.images:
        named = f" ({image.label})" if image.label else ""
        cells.append(panel(picture(image.image, f"image{named}"), f"image{named}"))
        for token in image.tokens:
            mean = token.heads.mean(axis=0)
            cells.append(
                panel(picture(_map(mean), f"mean attention of the {token.name} token{named}"), token.name)
            )
    width = 2 * (1 + len(attention.images[0].tokens))
    return [
        tag("h3", "Tokens of tasks beside the class token"),
        how_to_read(
            "Mean over the heads. Tasks with a token of their own read the image there, so that its "
            "attention shows what that task needs. Evenness is 1 where all patches get the same; the last "
            "column is the correlation with the first token's map. ",
            tag("b", "Good"),
            ": tokens that have learned different things, so a correlation below 1.",
        ),
        table(("token", "read by", "on patches", "evenness", "like the first"), rows, numbers=(2, 3, 4)),
        panels(cells, "panels tokens", width),
    ]


def likeness(one: TokenAttention, other: TokenAttention) -> float:
    """Correlation of two maps, each the mean of its heads; 0 where one of them is the same everywhere."""
    maps = [token.heads.mean(axis=0).ravel().astype(np.float64) for token in (one, other)]
    centred = [values - values.mean() for values in maps]
    lengths = [float(np.linalg.norm(values)) for values in centred]
    return float(centred[0] @ centred[1]) / (lengths[0] * lengths[1]) if min(lengths) > 1e-9 else 0.0


def masked(image: Pixels, mass: NDArray[np.bool_]) -> Pixels:
    """The image, dark outside the patches of the mass: nearest x P."""
    height, width = image.shape[:2]
    rows = np.arange(height) * mass.shape[0] // height
    columns = np.arange(width) * mass.shape[1] // width
    shown = mass[rows][:, columns][..., None]
    dimmed: Pixels = np.where(shown, image, (image * DIMMED).astype(np.uint8))
    return dimmed


def _map(weights: NDArray[np.float32]) -> Pixels:
    """A map in its own range from 0; one pixel for each patch, enlarged where it is shown."""
    return heat(weights / max(float(weights.max()), 1e-12))


def _scale() -> Markup:
    bar = tag("span", class_="scale", style=f"background:linear-gradient(90deg, {', '.join(heat_stops())})")
    return tag("p", "no attention ", bar, " the most in this map", class_="reading")
