"""One view from bytes to floats as a single compiled function, for `pixels_cpu`.

Loops over plain numbers, which the compiler turns into vector instructions: a step costs about the time to
read and write the view in the cache, and no thread waits for Python's lock. Constants are float32, so
that no step is widened; multiplications and additions are not fused, so each rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Function = TypeVar("Function", bound=Callable[..., Any])

_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # as pixels.GRAY
_0, _1, _2, _3, _255 = (np.float32(number) for number in (0, 1, 2, 3, 255))
_TINY = np.float32(1e-12)


def _compiled(function: Function) -> Function:
    """Compile at the first call, and keep the code beside this file's byte code, if that can be written."""
    try:
        return cast(Function, numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # no folder to keep it in: compile once per process
        return cast(Function, numba.njit(nogil=True)(function))


@_compiled
def _load(crop: NDArray[np.uint8], view: Floats, flip: bool) -> None:
    side = crop.shape[0]
    for row in range(side):
        source = crop[row].reshape(-1)
        red, green, blue = view[0, row], view[1, row], view[2, row]
        for column in range(side):
            red[column] = np.float32(source[3 * column]) / _255
            green[column] = np.float32(source[3 * column + 1]) / _255
            blue[column] = np.float32(source[3 * column + 2]) / _255
        if flip:
            for channel in (red, green, blue):
                for column in range(side // 2):
                    left, right = channel[column], channel[side - 1 - column]
                    channel[column], channel[side - 1 - column] = right, left


@_compiled
def _scale(planes: Floats, factor: np.float32, shift: np.float32) -> None:
    """Brightness and contrast; planes: (3, pixels)."""
    for channel in range(3):
        values = planes[channel]
        for i in range(values.size):
            values[i] = min(max(values[i] * factor + shift, _0), _1)


@_compiled
def _mean_gray(view: Floats) -> np.float32:
    """Columns first, in float32, so that the loop has no chain; then over the columns in float64."""
    side = view.shape[1]
    sums = np.zeros(side, np.float32)
    for row in range(side):
        red, green, blue = view[0, row], view[1, row], view[2, row]
        for column in range(side):
            sums[column] += red[column] * _RED + green[column] * _GREEN + blue[column] * _BLUE
    total = 0.0
    for column in range(side):
        total += sums[column]
    return np.float32(total / (side * side))


@_compiled
def _saturate(planes: Floats, factor: np.float32) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(red.size):
        gray = (red[i] * _RED + green[i] * _GREEN + blue[i] * _BLUE) * (_1 - factor)
        red[i] = min(max(red[i] * factor + gray, _0), _1)
        green[i] = min(max(green[i] * factor + gray, _0), _1)
        blue[i] = min(max(blue[i] * factor + gray, _0), _1)


@_compiled
def _shift_hue(planes: Floats, turns: float) -> None:
    """Rotate the hue (of HSV) by a part of the colour circle, in -0.5..0.5.

    Without a case for each channel that can be the largest: in sextants and seen from red, the hue lies
    1 + (green + blue - red - low) / chroma away, towards green where green exceeds blue. A channel is full up
    to 1 sextant from its own place on the circle, and empty from 2 sextants on.
    """
    red, green, blue = planes[0], planes[1], planes[2]
    from_red = np.float32((6 * turns + 3) % 6 - 3)
    from_green = np.float32((6 * turns + 1) % 6 - 3)
    from_blue = np.float32((6 * turns - 1) % 6 - 3)
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        low = min(min(r, g), b)
        chroma = max(max(r, g), b) - low
        hue = math.copysign((((g - r) + b) - low) / max(chroma, _TINY) + _1, g - b)
        base = low - chroma
        red[i] = base + chroma * min(max(abs(abs(hue + from_red) - _3), _1), _2)
        green[i] = base + chroma * min(max(abs(abs(hue + from_green) - _3), _1), _2)
        blue[i] = base + chroma * min(max(abs(abs(hue + from_blue) - _3), _1), _2)


@_compiled
def _blur(plane: Floats, half: Floats) -> None:
    """In place; half: the filter's weights from the centre to the border."""
    side, radius = plane.shape[0], half.size - 1
    mixed = np.empty((side, side), np.float32)
    for row in range(side):
        here, made, weight = plane[row], mixed[row], half[0]
        for i in range(side):
            made[i] = here[i] * weight
        for step in range(1, radius + 1):
            above, below = plane[abs(row - step)], plane[side - 1 - abs(side - 1 - row - step)]
            weight = half[step]
            for i in range(side):
                made[i] += weight * (above[i] + below[i])
    wide = np.empty(side + 2 * radius, np.float32)  # a row with what is mirrored at both ends
    for row in range(side):
        here, made, weight = mixed[row], plane[row], half[0]
        for i in range(side):
            wide[radius + i] = here[i]
            made[i] = here[i] * weight
        for step in range(1, radius + 1):
            wide[radius - step] = here[step]
            wide[radius + side - 1 + step] = here[side - 1 - step]
        for step in range(1, radius + 1):
            left, right = (
                wide[radius - step : radius - step + side],
                wide[radius + step : radius + step + side],
            )
            weight = half[step]
            for i in range(side):
                made[i] += weight * (left[i] + right[i])


@_compiled
def finish_view(
    crop: NDArray[np.uint8],
    view: Floats,
    flip: bool,
    operations: NDArray[np.int64],
    factors: Floats,
    gray: bool,
    half: Floats,
    solarize: bool,
) -> None:
    """Flip, colour, grey, blur and solarize one view.

    crop: (S, S, 3); view: (3, S, S), filled; operations and factors, (4,): as in `JitterPlan`, no operations
    for no jitter; half: the blur's weights from the centre to the border, a single one for no blur.
    """
    side = crop.shape[0]
    planes = view.reshape(3, side * side)
    _load(crop, view, flip)
    for operation in operations:
        if operation == 0:
            _scale(planes, factors[0], _0)
        elif operation == 1:
            _scale(planes, factors[1], _mean_gray(view) * (_1 - factors[1]))
        elif operation == 2:
            _saturate(planes, factors[2])
        elif factors[3] != 0:
            _shift_hue(planes, factors[3])
    num_channels = 3
    if gray:  # what follows is the same for all three channels
        num_channels = 1
        red, green, blue = planes[0], planes[1], planes[2]
        for i in range(red.size):
            red[i] = red[i] * _RED + green[i] * _GREEN + blue[i] * _BLUE
    for channel in range(num_channels):
        if half.size > 1:
            _blur(view[channel], half)
        if solarize:
            values = planes[channel]
            for i in range(values.size):
                values[i] = min(values[i], _1 - values[i])
    if gray:
        view[1], view[2] = view[0], view[0]
