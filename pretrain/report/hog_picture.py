"""Histograms of oriented gradients as pictures: in each cell a stroke along every edge's direction."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from pretrain.report.pictures import Pixels
from pretrain.views.hog import CELLS, NUM_BINS

CELL_PX = 12
PAPER = (24, 28, 36)
PAPER_HIDDEN = (52, 44, 24)


def hog_picture(values: Tensor, grid: tuple[int, int], hidden: Tensor | None = None) -> Pixels:
    """values: (N, 108) of `views.hog`, in the order (channel, bin, cell row, cell column); hidden: bool (N,),
    patches on another ground. A stroke is as bright as its bin is strong, the mean over the channels.

    A bin's angle is that of the gradient, from the y axis; an edge runs across it.
    """
    rows, columns = grid
    cells = values.view(rows, columns, 3, NUM_BINS, CELLS, CELLS).mean(dim=2).clamp(min=0)
    strength = cells.permute(0, 3, 1, 4, 2).reshape(rows * CELLS, columns * CELLS, NUM_BINS).cpu().numpy()
    image = Image.new("RGB", (columns * CELLS * CELL_PX, rows * CELLS * CELL_PX), PAPER)
    pen = ImageDraw.Draw(image)
    if hidden is not None:
        side = CELLS * CELL_PX
        for place in np.flatnonzero(hidden.cpu().numpy()).tolist():
            top, left = place // columns * side, place % columns * side
            pen.rectangle((left, top, left + side - 1, top + side - 1), fill=PAPER_HIDDEN)
    reach = CELL_PX / 2 - 1
    for row in range(strength.shape[0]):
        for column in range(strength.shape[1]):
            x, y = (column + 0.5) * CELL_PX, (row + 0.5) * CELL_PX
            for place in np.argsort(strength[row, column]).tolist():  # the strongest on top
                level = min(1.0, float(strength[row, column, place]))
                if level < 0.08:
                    continue
                angle = (place + 0.5) * math.pi / NUM_BINS  # of the gradient, from the y axis
                # the gradient points along (sin, cos) in (x, y); the edge along (cos, -sin)
                across, down = reach * math.cos(angle), -reach * math.sin(angle)
                shade = round(70 + 185 * level)
                pen.line((x - across, y - down, x + across, y + down), fill=(shade, shade, shade), width=1)
    return np.asarray(image).copy()
