"""Scenes of the embedded sample: a place, a light, and one to three figures that stand in it.

`draw_scene` decides everything from one generator. A place has a ground, textured in perspective, and behind
it a sky or a wall; light falls from above and from one side, shades the figures and casts their shadows.
As in photographs, a kind of figure is more often seen in some places than in others (a boat on water, a cup
on a table): the place hints at the class, the figure tells it, and the colours say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from figures import CLASSES, FIGURES, INK, Colour, Palette, Pen, arc, blob, darker, hsv, lighter, mix
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.floating[Any]]  # (H, W, 3) in 0..255, or (H, W); float32 throughout, for speed

FIGURE_SUPERSAMPLING = 4
PLACE_SUPERSAMPLING = 2
LAYER_MARGIN = 0.5  # alpha above which a pixel belongs to a figure
SHADOW_COLOUR = np.array([1.0, 0.95, 0.8], dtype=np.float32)  # how much of each channel a shadow takes
USUAL_PLACE_RATIO = 0.6  # how often a figure is in its usual place
SMALLEST_FIGURE = 0.006  # of the image's area; a figure that shows less is left out


@dataclass(frozen=True)
class Scene:
    """A picture and what stands in it."""

    image: NDArray[np.uint8]  # (H, W, 3)
    mask: NDArray[np.uint8]  # (H, W): 0 background, i the i-th of `labels`, counted from 1
    labels: list[int]  # class of every figure; the main one, which is the class of the image, first

    def boxes(self) -> list[list[int]]:
        """[x, y, width, height] px of the visible part of every figure."""
        boxes = []
        for instance in range(1, len(self.labels) + 1):
            rows, columns = np.nonzero(self.mask == instance)
            left, top = int(columns.min()), int(rows.min())
            boxes.append([left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1])
        return boxes


@dataclass(frozen=True)
class Light:
    """Where light comes from, and its colour."""

    side: float  # -1 from the left, 1 from the right
    strength: float  # contrast of shading and shadow
    tint: Pixels  # (3,), multiplies every pixel

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Light:
        warmth, brightness = rng.uniform(-0.12, 0.12), rng.uniform(0.82, 1.1)
        tint = brightness * np.array([1 + warmth, 1 + 0.02, 1 - warmth], dtype=np.float32)
        return cls(rng.uniform(-1, 1), rng.uniform(0.5, 1.0), tint)


@dataclass(frozen=True)
class Stand:
    """Where a figure stands."""

    label: int
    x: float  # of its foot, in widths of the image
    y: float
    size: float  # root of its width times height, in sides of the image


def draw_scene(rng: np.random.Generator, label: int, size_px: int) -> Scene:
    """Draw a picture of `size_px` square whose main figure is of class `label`."""
    palette, light, horizon = Palette.draw(rng), Light.draw(rng), rng.uniform(0.2, 0.66)
    picture = _draw_place(rng, palette, horizon, size_px, CLASSES[label])
    mask = np.zeros((size_px, size_px), dtype=np.uint8)
    stands = sorted(_place_figures(rng, label, horizon), key=lambda stand: stand.y)
    main = max(stands, key=lambda stand: stand.size)
    order = [main, *[stand for stand in stands if stand is not main]]
    for stand in stands:
        colour, alpha = _draw_figure(rng, stand, palette, size_px)
        _cast_shadow(picture, alpha, stand, light, horizon)
        _composite(picture, _shade(rng, colour, alpha, light), alpha)
        mask[alpha > LAYER_MARGIN] = order.index(stand) + 1
    _draw_foreground(rng, palette, picture)
    return _finish(picture, mask, [stand.label for stand in order], light)


def _place_figures(rng: np.random.Generator, label: int, horizon: float) -> list[Stand]:
    """One main figure, and up to two of at most half its size that leave it visible."""
    main = Stand(
        label, rng.uniform(0.3, 0.7), rng.uniform(max(0.72, horizon + 0.15), 0.97), rng.uniform(0.5, 0.76)
    )
    stands = [main]
    for _ in range(rng.choice(3, p=[0.35, 0.4, 0.25])):
        size = main.size * rng.uniform(0.3, 0.46)
        x = main.x + rng.choice([-1, 1]) * rng.uniform(0.25, 0.5)
        y = rng.uniform(horizon + 0.08, 0.99)
        stands.append(Stand(int(rng.integers(len(CLASSES))), min(max(x, 0.08), 0.92), y, size))
    return stands


def _draw_figure(
    rng: np.random.Generator, stand: Stand, palette: Palette, size_px: int
) -> tuple[Pixels, Pixels]:
    """Colour (H, W, 3), times alpha, and alpha (H, W) of one figure, posed by a random affine map."""
    figure, usual_width = FIGURES[CLASSES[stand.label]]
    height = min(stand.size / usual_width**0.5, 0.86)
    squeeze, lean = rng.uniform(0.88, 1.12), rng.normal(0, 0.06)
    mirror = rng.choice([-1, 1])
    width = min(height * squeeze, 0.98 / usual_width)
    foot = max(stand.y, min(height * 1.12, 0.97))  # keeps the head in the picture
    cos, sin = np.cos(lean), np.sin(lean)
    frame = np.array(
        [[mirror * width * cos, -height * sin, stand.x], [-mirror * width * sin, -height * cos, foot]]
    )
    layer = _Layer(size_px)
    figure(Pen(layer.canvas, frame * size_px * FIGURE_SUPERSAMPLING), rng, palette)
    return layer.pixels()


class _Layer:
    """A transparent drawing at FIGURE_SUPERSAMPLING times the size of the picture."""

    def __init__(self, size_px: int) -> None:
        side = size_px * FIGURE_SUPERSAMPLING
        self._image = Image.new("RGBX", (side, side))  # X is alpha: what is drawn is opaque, so 255
        self.canvas = ImageDraw.Draw(self._image)
        self.to_canvas = np.array([[side, 0.0, 0.0], [0.0, side, 0.0]])  # from unit coordinates, y down

    def pixels(self) -> tuple[Pixels, Pixels]:
        """Colour (H, W, 3) in 0..255, times alpha, and alpha (H, W) in [0, 1]."""
        small = np.asarray(self._image.reduce(FIGURE_SUPERSAMPLING), dtype=np.float32)
        return small[..., :3], small[..., 3] / 255


def _composite(picture: Pixels, colour: Pixels, alpha: Pixels) -> None:
    picture *= 1 - alpha[..., None]
    picture += colour


def _blur(plane: Pixels, radius_px: float) -> Pixels:
    image = Image.fromarray((plane * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius_px)), dtype=np.float32) / 255


def _shade(rng: np.random.Generator, colour: Pixels, alpha: Pixels, light: Light) -> Pixels:
    """Round a flat figure off: bright where its outline faces the light, with a little grain."""
    side_px = len(alpha)
    height = _blur(alpha, side_px / 22)
    slope_y, slope_x = np.gradient(height * side_px / 22)
    facing = slope_y * 1.3 - slope_x * light.side
    grain = (noise(rng, 24, side_px) - 0.5) * rng.uniform(0.0, 0.22)
    shade = 1 + light.strength * np.clip(facing, -0.45, 0.45) + grain
    return np.clip(colour * shade[..., None], 0, 255 * alpha[..., None])


def _cast_shadow(picture: Pixels, alpha: Pixels, stand: Stand, light: Light, horizon: float) -> None:
    """Lay the silhouette on the ground, away from the light, and darken the contact."""
    side_px = len(alpha)
    rows = np.nonzero(alpha.max(axis=1) > LAYER_MARGIN)[0]
    if len(rows) == 0:
        return
    foot, flatness, slant = float(rows[-1]), 0.3, -1.4 * light.side
    silhouette = Image.fromarray((alpha * 255).astype(np.uint8))
    laid = (1, slant, -slant * foot, 0, 1 / flatness, foot * (1 - 1 / flatness))
    shadow = silhouette.transform(silhouette.size, Image.Transform.AFFINE, laid, Image.Resampling.BILINEAR)
    soft = shadow.filter(ImageFilter.GaussianBlur(side_px / 70))
    depth = np.asarray(soft, dtype=np.float32) * (0.5 / 255 * light.strength)
    width = float(alpha[max(0, int(foot) - 2) : int(foot) + 1].max(axis=0).sum())
    place = np.arange(side_px, dtype=np.float32)
    across = np.exp(-(((place - stand.x * side_px) / (0.6 * width + 1)) ** 2))
    along = np.exp(-(((place - foot) / (0.025 * side_px)) ** 2))
    depth = np.maximum(depth, 0.45 * along[:, None] * across)
    depth[: int(horizon * side_px)] *= 0.3
    picture *= 1 - depth[..., None] * SHADOW_COLOUR


def _finish(picture: Pixels, mask: NDArray[np.uint8], labels: list[int], light: Light) -> Scene:
    """Tint by the light, and leave out figures that are hidden or too small to see."""
    image = np.clip(picture * light.tint + 0.5, 0, 255).astype(np.uint8)
    visible = np.bincount(mask.ravel(), minlength=len(labels) + 1)[1:] >= SMALLEST_FIGURE * mask.size
    assert visible[0], "the main figure is hidden"
    numbers = np.concatenate([[0], np.where(visible, np.cumsum(visible), 0)]).astype(np.uint8)
    return Scene(image, numbers[mask], [label for label, seen in zip(labels, visible, strict=True) if seen])


def noise(rng: np.random.Generator, cells: int, side_px: int) -> Pixels:
    """Smooth noise in about [0, 1]: (side, side), `cells` bumps along a side."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    smooth = grid.resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def _draw_place(
    rng: np.random.Generator, palette: Palette, horizon: float, size_px: int, figure: str
) -> Pixels:
    """The empty scene, (H, W, 3): what is behind, the ground, and things in the distance."""
    side_px = size_px * PLACE_SUPERSAMPLING
    indoors, draw_surface = _choose_ground(rng, figure)
    row, column = np.mgrid[0:side_px, 0:side_px].astype(np.float32) / side_px
    seam = slice(int((horizon - 0.03) * side_px), int((horizon + 0.03) * side_px))  # rows that show both
    above, below = slice(seam.stop), slice(seam.start, None)
    behind = (_draw_wall if indoors else _draw_sky)(rng, palette, column[above], row[above])
    ground = _draw_ground(rng, palette, column[below], row[below], horizon, draw_surface)
    edge = horizon if indoors else horizon + 0.03 * (noise(rng, 4, side_px)[:1] - 0.5)
    ratio = np.clip((row[seam] - edge) * side_px + 0.5, 0, 1)[..., None]
    both = behind[below] * (1 - ratio) + ground[: ratio.shape[0]] * ratio
    place: Pixels = np.concatenate([behind[: seam.start], both, ground[ratio.shape[0] :]])
    step = PLACE_SUPERSAMPLING
    place = np.mean([place[i::step, j::step] for i in range(step) for j in range(step)], axis=0)
    layer = _Layer(size_px)
    pen = Pen(layer.canvas, layer.to_canvas)
    if indoors:
        _furnish(pen, rng, palette, horizon)
    else:
        _landscape(pen, rng, palette, horizon, mix(_colour(place[0].mean(axis=0)), (190, 200, 215), 0.4))
    _composite(place, *layer.pixels())
    return place


def _colour(mean: Pixels) -> Colour:
    red, green, blue = (int(channel) for channel in np.clip(mean, 0, 255))
    return red, green, blue


def _rgb(colour: Colour) -> Pixels:
    return np.array(colour, dtype=np.float32)


def _blend(first: Colour, second: Colour, ratio: Pixels) -> Pixels:
    """(H, W) of ratios -> (H, W, 3)."""
    return _rgb(first) + (_rgb(second) - _rgb(first)) * np.clip(ratio, 0, 1)[..., None]


def _draw_sky(rng: np.random.Generator, palette: Palette, x: Pixels, y: Pixels) -> Pixels:
    """A gradient from zenith to horizon, with clouds; `x` and `y` in sides of the picture."""
    kind = rng.choice(["clear", "evening", "overcast", "dusk"], p=[0.45, 0.2, 0.2, 0.15])
    zenith, low = {
        "clear": (hsv(rng.uniform(0.54, 0.62), rng.uniform(0.4, 0.7), 0.85), (214, 230, 240)),
        "evening": (hsv(rng.uniform(0.6, 0.75), 0.4, 0.65), hsv(rng.uniform(0.02, 0.12), 0.5, 0.97)),
        "overcast": (hsv(0.6, 0.12, rng.uniform(0.5, 0.7)), (214, 216, 218)),
        "dusk": (hsv(rng.uniform(0.62, 0.7), 0.6, 0.3), hsv(rng.uniform(0.5, 0.95), 0.3, 0.65)),
    }[str(kind)]
    sky = _blend(zenith, low, 1.6 * y)
    tops = 0.65 * noise(rng, 5, x.shape[1])[: len(x)] + 0.35 * noise(rng, 11, x.shape[1])[: len(x)]
    cover = np.clip((tops - rng.uniform(0.4, 0.75)) * 3, 0, 0.85) * np.clip(1.3 - 1.6 * y, 0.2, 1)
    cloud = _rgb(lighter(low, 0.5))
    return np.asarray(sky + (cloud - sky) * cover[..., None])


def _draw_wall(rng: np.random.Generator, palette: Palette, x: Pixels, y: Pixels) -> Pixels:
    """A papered, tiled, boarded or plain wall, brighter towards the top."""
    side_px = x.shape[1]
    base = lighter(palette.paint(rng), rng.uniform(0.1, 0.7)) if rng.random() < 0.6 else palette.stone(rng)
    other = mix(base, palette.paint(rng), 0.45) if rng.random() < 0.5 else darker(base, 0.2)
    pitch, phase = rng.uniform(0.07, 0.18), rng.random(2).tolist()
    u, v = x / pitch + phase[0], y / pitch + phase[1]
    kind = rng.integers(5)
    if kind == 0:  # stripes
        pattern = _pulse(u, rng.uniform(0.25, 0.5), pitch * side_px)
    elif kind == 1:  # dots, every other row shifted
        shifted = u + 0.5 * (np.floor(v) % 2)
        distance = np.hypot(shifted % 1 - 0.5, v % 1 - 0.5)
        pattern = np.clip((0.28 - distance) * pitch * side_px, 0, 1)
    elif kind == 2:  # bricks
        shifted = u / 2 + 0.5 * (np.floor(v) % 2)
        pattern = np.maximum(_pulse(v, 0.12, pitch * side_px), _pulse(shifted, 0.06, 2 * pitch * side_px))
    elif kind == 3:  # tiles
        pattern = np.maximum(_pulse(u, 0.1, pitch * side_px), _pulse(v, 0.1, pitch * side_px))
    else:  # plaster
        pattern = noise(rng, 7, side_px)[: len(x)] * 0.6
    wall = _blend(base, other, pattern + 0.25 * (noise(rng, 30, side_px)[: len(x)] - 0.5))
    return (
        wall * (rng.uniform(0.75, 1.15) - 0.3 * y + 0.12 * (x - 0.5) * float(rng.choice([-1, 1])))[..., None]
    )


def _pulse(position: Pixels, duty: float, period_px: float) -> Pixels:
    """1 in the first `duty` of every period, 0 elsewhere, with edges one pixel soft."""
    distance = duty / 2 - np.abs((position - duty / 2 + 0.5) % 1 - 0.5)
    return np.asarray(np.clip(distance * period_px + 0.5, 0, 1))


def _draw_ground(
    rng: np.random.Generator, palette: Palette, x: Pixels, y: Pixels, horizon: float, draw_surface: Ground
) -> Pixels:
    """A floor or a field in perspective: its texture shrinks towards the horizon."""
    near = np.clip(y - horizon, 0.004, 1) / (1 - horizon)  # 0 at the horizon, 1 at the lower edge
    depth = 1 / (near + 0.12)
    u, v = (x - rng.uniform(0.3, 0.7)) * depth + rng.random() * 4, depth + rng.random() * 4
    surface = draw_surface(rng, palette, u, v, np.clip(near * 3, 0.15, 1))
    return np.asarray(surface * (rng.uniform(0.65, 1.1) + 0.2 * near)[..., None])


Ground = Callable[[np.random.Generator, Palette, Pixels, Pixels, Pixels], Pixels]


def _choose_ground(rng: np.random.Generator, figure: str) -> tuple[bool, Ground]:
    """Whether the scene is indoors, and its ground: the figure's usual one, or any."""
    indoors_grounds = (_boards, _cloth, _tiles, _carpet)
    outdoors_grounds = (_meadow, _sand, _snow, _earth, _tiles, _water)
    usual: dict[str, tuple[bool, Ground]] = {
        "bird": (False, _sand),
        "boat": (False, _water),
        "car": (False, _tiles),
        "cat": (True, _carpet),
        "cup": (True, _cloth),
        "flower": (False, _meadow),
        "house": (False, _snow),
        "mushroom": (False, _earth),
        "robot": (True, _tiles),
        "tree": (False, _meadow),
    }
    if rng.random() < USUAL_PLACE_RATIO:
        return usual[figure]
    indoors = bool(rng.random() < 0.45)
    grounds = indoors_grounds if indoors else outdoors_grounds
    return indoors, grounds[rng.integers(len(grounds))]


def _scatter(rng: np.random.Generator, u: Pixels, v: Pixels, along: float, across: float) -> Pixels:
    """Noise that lies on the ground: `along` and `across` bumps per unit."""
    tile = rng.random(64 * 64, dtype=np.float32)
    s, t = u * along, v * across
    left, top = np.floor(s), np.floor(t)
    ds, dt = s - left, t - top
    column, row = left.astype(np.int32) & 63, (top.astype(np.int32) & 63) << 6
    right, down = (column + 1) & 63, (row + 64) & 4095
    upper, lower = (
        tile.take(line + column) * (1 - ds) + tile.take(line + right) * ds for line in (row, down)
    )
    return np.asarray(upper + (lower - upper) * dt)


def _meadow(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    grass = palette.leaf(rng)
    blades = _scatter(rng, u, v, 22, 9)
    return _blend(
        darker(grass, 0.3),
        lighter(grass, 0.3),
        0.5 + (blades - 0.5) * clear + _scatter(rng, u, v, 3, 2) - 0.5,
    )


def _sand(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    sand = hsv(rng.uniform(0.08, 0.13), rng.uniform(0.2, 0.45), rng.uniform(0.75, 0.95))
    waves = np.sin(v * rng.uniform(9, 16) + 4 * _scatter(rng, u, v, 2, 1)) * 0.5
    grain = _scatter(rng, u, v, 26, 20) - 0.5
    return _blend(darker(sand, 0.3), lighter(sand, 0.3), 0.5 + (0.45 * waves + 0.4 * grain) * clear)


def _water(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    water = hsv(rng.uniform(0.5, 0.62), rng.uniform(0.4, 0.7), rng.uniform(0.5, 0.8))
    waves = np.sin(v * rng.uniform(14, 22) + 6 * _scatter(rng, u, v, 1.5, 3)) * 0.5
    glitter = np.clip(_scatter(rng, u, v, 5, 16) - 0.7, 0, 1) * 2
    return _blend(darker(water, 0.35), lighter(water, 0.45), 0.4 + (0.5 * waves + glitter) * clear)


def _snow(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    shadow = hsv(rng.uniform(0.56, 0.66), rng.uniform(0.12, 0.28), 0.82)
    drifts = _scatter(rng, u, v, 1.6, 1.5) * 0.8 + _scatter(rng, u, v, 6, 4) * 0.3
    return _blend(shadow, (247, 249, 253), drifts)


def _earth(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    soil = hsv(rng.uniform(0.03, 0.1), rng.uniform(0.3, 0.55), rng.uniform(0.35, 0.6))
    clods = 0.6 * _scatter(rng, u, v, 5, 5) + 0.5 * _scatter(rng, u, v, 14, 12)
    return _blend(darker(soil, 0.35), lighter(soil, 0.35), 0.5 + (clods - 0.55) * clear)


def _boards(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    wood, per_unit = palette.wood(rng), rng.uniform(2.5, 5)
    plank = np.floor(u * per_unit)
    tone = (np.sin(plank * 12.9898 + rng.uniform(0, 6)) * 43758.5) % 1
    grain = _scatter(rng, u, v, 30, 3)
    seams = _pulse(u * per_unit, 0.07, 14.0)
    boards = _blend(darker(wood, 0.3), lighter(wood, 0.4), 0.2 + 0.4 * tone + 0.4 * (grain - 0.3) * clear)
    return boards * (1 - 0.5 * seams * clear)[..., None]


def _cloth(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    base, check, per_unit = lighter(palette.paint(rng), 0.6), palette.paint(rng), rng.uniform(2, 4.5)
    across, along = _pulse(u * per_unit, 0.5, 16.0), _pulse(v * per_unit, 0.5, 16.0)
    return _blend(base, check, (across + along) * 0.42 * clear + 0.42 * (1 - clear))


def _tiles(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    stone, per_unit = palette.stone(rng), rng.uniform(1.5, 4)
    other = darker(stone, 0.35) if rng.random() < 0.5 else mix(stone, palette.paint(rng), 0.5)
    chequer = (np.floor(u * per_unit) + np.floor(v * per_unit)) % 2 * float(rng.choice([0.15, 0.8]))
    joints = np.maximum(_pulse(u * per_unit, 0.07, 16.0), _pulse(v * per_unit, 0.07, 16.0))
    floor = _blend(stone, other, 0.4 + (chequer - 0.4) * clear + 0.2 * (_scatter(rng, u, v, 12, 12) - 0.5))
    return floor * (1 - 0.4 * joints * clear)[..., None]


def _carpet(rng: np.random.Generator, palette: Palette, u: Pixels, v: Pixels, clear: Pixels) -> Pixels:
    base, stripe = palette.paint(rng), palette.paint(rng)
    bands = _pulse(v * rng.uniform(1, 2), rng.uniform(0.2, 0.5), 20.0)
    pile = _scatter(rng, u, v, 34, 30) - 0.5
    return _blend(base, stripe, bands * 0.8) * (1 + 0.3 * pile * clear)[..., None]


def _landscape(pen: Pen, rng: np.random.Generator, palette: Palette, horizon: float, haze: Colour) -> None:
    """Hills, a sun, and a fence or bushes along the horizon."""
    if rng.random() < 0.3:
        radius = rng.uniform(0.03, 0.07)
        x, y = rng.uniform(0.1, 0.9), rng.uniform(0.06, 0.2)
        pen.ellipse(x, y, radius * 1.6, radius * 1.6, lighter(haze, 0.3))
        pen.ellipse(x, y, radius, radius, (255, 240, 196))
    for ridge in range(rng.integers(0, 3)):
        tone = mix(palette.leaf(rng), haze, 0.65 - 0.3 * ridge)
        along = np.linspace(-0.05, 1.05, 24)
        waves = rng.uniform(2, 9, 2)
        rise = (
            0.08 + 0.05 * np.sin(along * waves[0] + rng.uniform(0, 6)) + 0.025 * np.sin(along * 2 * waves[1])
        )
        top = horizon - rise * rng.uniform(0.5, 1.5) / (1 + ridge)
        crest = list(zip(along.tolist(), top.tolist(), strict=True))
        pen.polygon([*crest, (1.05, horizon + 0.02), (-0.05, horizon + 0.02)], tone)
    if rng.random() < 0.35:
        _fence(pen, rng, palette, horizon)
    for _ in range(rng.integers(0, 5)):
        x, radius = rng.uniform(0, 1), rng.uniform(0.02, 0.06)
        bush = mix(palette.leaf(rng), haze, 0.2)
        pen.polygon(blob(rng, x, horizon - radius * 0.3, radius), darker(bush, 0.2))
        pen.ellipse(x, horizon - radius * 0.7, radius * 0.6, radius * 0.4, lighter(bush, 0.12))


def _fence(pen: Pen, rng: np.random.Generator, palette: Palette, horizon: float) -> None:
    wood, high, pitch = (
        lighter(palette.wood(rng), rng.uniform(0, 0.5)),
        rng.uniform(0.08, 0.14),
        rng.uniform(0.07, 0.13),
    )
    for rail in (0.35, 0.75):
        y = horizon + 0.02 - rail * high
        pen.box(-0.01, y, 1.01, y + 0.018, darker(wood, 0.15))
    for x in np.arange(rng.uniform(0, pitch), 1, pitch).tolist():
        pen.box(x, horizon - high, x + 0.025, horizon + 0.02, wood)


def _furnish(pen: Pen, rng: np.random.Generator, palette: Palette, horizon: float) -> None:
    """A skirting board, and perhaps a picture or a window on the wall."""
    board = lighter(palette.wood(rng), rng.uniform(0, 0.7))
    if rng.random() < 0.7:
        pen.box(-0.01, horizon - rng.uniform(0.02, 0.05), 1.01, horizon + 0.01, board)
        pen.box(-0.01, horizon, 1.01, horizon + 0.015, darker(board, 0.5))
    for _ in range(rng.integers(0, 3)):
        x, top = rng.uniform(0, 0.8), rng.uniform(0.0, 0.12)
        width, high = rng.uniform(0.12, 0.3), rng.uniform(0.12, 0.26)
        pen.box(x, top, x + width, top + high, darker(board, 0.2))
        inner = palette.paint(rng) if rng.random() < 0.5 else (176, 208, 226)
        pen.box(x + 0.025, top + 0.025, x + width - 0.025, top + high - 0.025, inner)
        hill = curve_over(x + 0.025, x + width - 0.025, top + high - 0.025, high * rng.uniform(0.3, 0.8))
        pen.polygon(hill, darker(mix(inner, palette.leaf(rng), 0.5), 0.1))


def curve_over(left: float, right: float, bottom: float, rise: float) -> list[tuple[float, float]]:
    """A low arch that stands on `bottom` (y down)."""
    return arc((left + right) / 2, bottom, (right - left) / 2, rise, np.pi, 2 * np.pi)


def _draw_foreground(rng: np.random.Generator, palette: Palette, picture: Pixels) -> None:
    """Clutter without a label: pebbles, tufts or toy bricks, near the lower edge and small."""
    layer = _Layer(len(picture))
    pen = Pen(layer.canvas, layer.to_canvas)
    kind = rng.integers(4)
    for _ in range(rng.integers(1, 6) if kind else 0):
        x, y, size = rng.uniform(0, 1), rng.uniform(0.8, 1.0), rng.uniform(0.02, 0.045)
        if kind == 1:
            stone = palette.stone(rng)
            pen.ellipse(x, y + size * 0.3, size * 1.3, size * 0.6, darker(stone, 0.7))
            pen.ellipse(x, y, size * 1.2, size * 0.7, darker(stone, 0.25))
            pen.ellipse(x - size * 0.1, y - size * 0.2, size * 0.8, size * 0.35, lighter(stone, 0.25))
        elif kind == 2:
            for turn in (-0.8, -0.3, 0.2, 0.7):
                pen.stroke(
                    [(x, y), (x + turn * size, y - size * 2)], 0.014, mix(palette.leaf(rng), INK, 0.15), 0.003
                )
        else:
            paint = palette.paint(rng)
            pen.box(x - size, y - size, x + size, y + size, paint)
            pen.box(x - size, y - size * 1.4, x + size, y - size * 0.8, lighter(paint, 0.4))
    _composite(picture, *layer.pixels())
