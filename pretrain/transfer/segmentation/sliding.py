"""Logits of images of any size from a network that was trained on crops of one size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor], Tensor]  # (B, 3, h, w) -> (B, K, h, w)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side, so that they cover it; the last one ends with the side.

    A side shorter than the window has one window, at 0.
    """
    last = max(0, length - window)
    starts = list(range(0, last, stride))
    return [*starts, last]


def slide(network: Network, pixels: Tensor, window: int, stride: int) -> Tensor:
    """Logits of one image, in windows; where several overlap, the mean of what they say.

    pixels: normalised (3, H, W); returns float32 (K, H, W). An image smaller than a window is padded with
    zeros, the mean colour, as crops are in training.
    """
    height, width = pixels.shape[1:]
    padded = F.pad(pixels, (0, max(0, window - width), 0, max(0, window - height)))
    total: Tensor | None = None
    count = pixels.new_zeros(padded.shape[1:], dtype=torch.float32)
    for top in window_starts(padded.shape[1], window, stride):
        for left in window_starts(padded.shape[2], window, stride):
            there = (..., slice(top, top + window), slice(left, left + window))
            logits = network(padded[there][None])[0].float()
            if total is None:
                total = logits.new_zeros(len(logits), *padded.shape[1:])
            total[there] += logits
            count[there] += 1
    assert total is not None
    return (total / count)[:, :height, :width]


def predict(
    network: Network, pixels: Tensor, size: tuple[int, int], window: int | None, stride: int, flip: bool
) -> Tensor:
    """The class of every pixel of one image: int64 (H, W) of `size`.

    pixels: normalised (3, h, w), maybe of another size than is asked for: logits are resized to that.
    window: None takes the image in one piece. flip: mean of the probabilities of the image and its mirror
    image.
    """

    def logits_of(image: Tensor) -> Tensor:
        logits = network(image[None])[0].float() if window is None else slide(network, image, window, stride)
        if logits.shape[1:] != size:
            logits = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
        return logits

    logits = logits_of(pixels)
    if not flip:
        return logits.argmax(dim=0)
    mirrored = logits_of(pixels.flip(2)).flip(2)
    return (logits.softmax(dim=0) + mirrored.softmax(dim=0)).argmax(dim=0)
