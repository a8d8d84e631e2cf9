"""Colours that people with any kind of colour vision can tell apart, and maps from numbers to colours.

Series are Okabe and Ito's (2008), darkened or lightened for white and for dark paper where their contrast was
below 3:1; what they name is also told by a shape, a dash or a label. Maps rise in lightness, so they survive
a grey printer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# on light and on dark paper, in order of use: --c0 to --c7 of the page's style
SERIES_LIGHT = ("#0072b2", "#c35500", "#00805f", "#a8327f", "#946b00", "#2b8fc4", "#555555", "#7a4fb5")
SERIES_DARK = ("#56b4e9", "#f08a3c", "#2fc79b", "#e59ac6", "#e6b73c", "#8fd3ff", "#b5b5b5", "#b99aec")

# of points, where classes are named beside them: ten colours, then the same with another shape
POINTS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"),
    *("#56b4e9", "#8c6bb1", "#7f7f00", "#a0522d", "#3d8b8b"),
)

# anchors of viridis, which Smith and van der Walt gave away for any use, from dark to light
_VIRIDIS = (
    "#440154",
    "#482878",
    "#3e4a89",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6dcd59",
    "#b4de2c",
    "#fde725",
)


def heat(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Numbers in [0, 1], clipped, as colours from dark violet to yellow: (...,) -> uint8 (..., 3)"""
    anchors = np.array([_rgb(color) for color in _VIRIDIS], dtype=np.float64)  # (10, 3)
    place = np.clip(np.nan_to_num(values.astype(np.float64)), 0, 1) * (len(anchors) - 1)
    low = np.minimum(place.astype(np.int64), len(anchors) - 2)
    share = (place - low)[..., None]
    mixed = anchors[low] * (1 - share) + anchors[low + 1] * share
    colors: NDArray[np.uint8] = mixed.round().astype(np.uint8)
    return colors


def heat_stops() -> Sequence[str]:
    """The same colours from 0 to 1, for a legend."""
    return _VIRIDIS


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
