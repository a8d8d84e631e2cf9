"""Reconstructions: the arithmetic from what a head gives to pixels, and the section that shows them.

Images are (B, 3, H, W) float32 in [0, 1] unless said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.report.markup import Markup, tag
from pretrain.report.page import Section, how_to_read, section
from pretrain.report.palette import heat, heat_stops
from pretrain.report.patch_drawing import Plan
from pretrain.report.pictures import Pixels, panel, panels, picture
from pretrain.tokens import take
from pretrain.views.corrupt import put
from pretrain.views.pixels import join_patches, split_patches

HIDDEN_GREY = 0.5  # what stands for a patch that the encoder does not get
FULL_DIFFERENCE = 0.5  # of the range of a pixel, from which on a difference has the brightest colour


@dataclass(frozen=True)
class Restoration:
    """One image: four panels."""

    original: Pixels
    seen: Pixels
    restored: Pixels
    difference: Pixels
    error: float | None = None  # mean over what was asked for, in the range of a pixel
    plan: Plan | None = None  # which patches each task of the view works on


@dataclass(frozen=True)
class TaskRestorations:
    """What a task restored of several images it did not see whole."""

    task: str
    captions: tuple[str, str, str, str]
    reading: str
    rows: tuple[Restoration, ...]
    has_scale: bool = True  # the last panel is a difference in colours


# --- arithmetic


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of the data's normalisation, clipped to [0, 1]."""
    center, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images * scale + center).clamp(0, 1)


def restore_statistics(predicted: Tensor, target: Tensor) -> Tensor:
    """Undo the target's own normalisation (`norm_pix`): scale and shift each predicted patch by the standard
    deviation and mean of the true one. predicted, target: (..., d) -> the same"""
    mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    return predicted * (variance + 1e-6).sqrt() + mean


def paste(images: Tensor, tiles: Tensor, index: Tensor, patch_px: int) -> Tensor:
    """The images with patches `index`, int64 (B, K), replaced by tiles (B, K, 3, P, P)."""
    patches = put(split_patches(images, patch_px), index, tiles.to(images.dtype))
    return join_patches(patches, images.shape[3] // patch_px)


def hide(images: Tensor, hidden: Tensor, patch_px: int) -> Tensor:
    """The images with the patches where bool (B, N) holds in plain grey."""
    patches = split_patches(images, patch_px)
    blank = torch.full_like(patches, HIDDEN_GREY)
    return join_patches(
        torch.where(hidden[:, :, None, None, None], blank, patches), images.shape[3] // patch_px
    )


def tiles_of(values: Tensor, patch_px: int, channels: int = 3) -> Tensor:
    """Patches as heads give them, row by row with the channels of a pixel together: (B, K, C P^2) ->
    (B, K, C, P, P)"""
    pixels = values.reshape(*values.shape[:2], patch_px, patch_px, channels)
    return pixels.permute(0, 1, 4, 2, 3)


def grey_to_lightness(grey: Tensor) -> Tensor:
    """L* of CIE Lab of sRGB greys in [0, 1]; any shape."""
    linear = torch.where(grey > 0.04045, ((grey + 0.055) / 1.055) ** 2.4, grey / 12.92)
    edge = 6 / 29
    root = torch.where(linear > edge**3, linear.clamp(min=1e-6) ** (1 / 3), linear / (3 * edge**2) + 4 / 29)
    return 116 * root - 16


def lab_to_rgb(lightness: Tensor, ab: Tensor) -> Tensor:
    """sRGB in [0, 1] of CIE L*a*b*, white point D65, colours outside the gamut clipped.

    lightness: (T, 1, P, P), ab: (T, 2, P, P) -> (T, 3, P, P)
    """
    middle = (lightness + 16) / 116
    along = torch.cat([middle + ab[:, :1] / 500, middle, middle - ab[:, 1:] / 200], dim=1)
    edge = 6 / 29
    xyz = torch.where(along > edge, along**3, 3 * edge**2 * (along - 4 / 29))
    x, y, z = (xyz * torch.tensor([0.95047, 1.0, 1.08883], device=ab.device).view(3, 1, 1)).unbind(1)
    linear = torch.stack(
        [
            3.2404542 * x - 1.5371385 * y - 0.4985314 * z,
            -0.9692660 * x + 1.8760108 * y + 0.0415560 * z,
            0.0556434 * x - 0.2040259 * y + 1.0572252 * z,
        ],
        dim=1,
    ).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def colored_tiles(ab: Tensor, shown: Tensor) -> Tensor:
    """Tiles with the lightness of the grey that was shown and the colours that were told.

    ab: (B, K, 2, P, P) in units of a and b; shown: grey tiles (B, K, 3, P, P) -> (B, K, 3, P, P)
    """
    lightness = grey_to_lightness(shown[:, :, :1])
    rgb = lab_to_rgb(lightness.flatten(0, 1), ab.flatten(0, 1))
    return rgb.view(*shown.shape)


def difference_map(restored: Tensor, target: Tensor, asked: Tensor | None) -> NDArray[np.uint8]:
    """How far apart two images are, as colours, mean over the channels; grey where nothing was asked.

    restored, target: (3, H, W); asked: bool (H, W), None for all -> uint8 (H, W, 3)
    """
    far = (restored - target).abs().mean(dim=0)  # (H, W)
    colors = heat((far / FULL_DIFFERENCE).cpu().numpy())
    if asked is not None:
        colors[~asked.cpu().numpy()] = 128
    return colors


def mean_difference(restored: Tensor, target: Tensor, asked: Tensor | None) -> float:
    far = (restored - target).abs().mean(dim=0)
    return float(far.mean() if asked is None else far[asked].mean())


def to_pixels(image: Tensor) -> Pixels:
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3)"""
    rounded = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(1, 2, 0).cpu().numpy())


def patches_to_pixels(chosen: Tensor, grid: tuple[int, int], patch_px: int) -> Tensor:
    """Which pixels belong to chosen patches: bool (N,) -> bool (H, W)"""
    return chosen.view(grid).repeat_interleave(patch_px, 0).repeat_interleave(patch_px, 1)


def true_tiles(images: Tensor, index: Tensor, patch_px: int) -> Tensor:
    """(B, 3, H, W), int64 (B, K) -> (B, K, 3, P, P)"""
    return take(split_patches(images, patch_px), index)


# --- the section


def restorations_section(tasks: Sequence[TaskRestorations], source: str) -> Section:
    parts: list[Markup | None] = [
        how_to_read(
            f"Images of {source}, without colour or crop augmentation; the trained head answers for what it "
            "did not see. A network that has learned little gives mean colours; "
            "what a single L1 or L2 answer can know of a hidden patch is blurred even when it is good. ",
            tag("b", "Good"),
            ": shapes and colours that go on into what was hidden, and dark differences.",
        )
    ]
    for task in tasks:
        errors = [row.error for row in task.rows if row.error is not None]
        told = f" Mean difference here: {sum(errors) / len(errors):.3f} of the range." if errors else ""
        parts += [tag("h3", task.task), how_to_read(task.reading, told)]
        parts += [_row(task, row) for row in task.rows]
        if task.has_scale:
            parts.append(_scale())
    return section("restorations", "Reconstructions and colorizations", *parts)


def _row(task: TaskRestorations, row: Restoration) -> Markup:
    pictures = (row.original, row.seen, row.restored, row.difference)
    return panels(
        [
            panel(picture(pixels, f"{task.task}: {caption}"), caption)
            for pixels, caption in zip(pictures, task.captions, strict=True)
        ],
        "panels four",
    )


def _scale() -> Markup:
    colors = ", ".join(heat_stops())
    bar = tag("span", class_="scale", style=f"background:linear-gradient(90deg, {colors})")
    return tag(
        "p",
        "difference 0 ",
        bar,
        f" {FULL_DIFFERENCE:g} of the range and more; grey: not asked",
        class_="reading",
    )
