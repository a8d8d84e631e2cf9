"""Batched image operations with one set of numbers per sample: what a `ViewPlan` says, done to pixels.

Images are (M, 3, H, W) float32 in [0, 1] unless said. Every operation has static shapes, no loop over samples
and never waits for the device, so a whole view compiles into one graph. Colours follow torchvision's formulas
and constants, so the results compare with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pretrain.views.plan import JitterPlan, ViewPlan

Interpolation = Literal["bilinear", "bicubic"]
_CUBIC = -0.5  # Keys' a, as Pillow and torch use it when antialiasing
GRAY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
_CONTRAST, _SATURATION, HUE = 1, 2, 3  # positions in JitterPlan.factors; brightness is 0


def _per_sample(values: Tensor) -> Tensor:
    """(M,) -> (M, 1, 1, 1)"""
    return values.view(-1, 1, 1, 1)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """A product that stays float32 under autocast: half precision has fewer steps than a pixel."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


# --- resampling


def _filter(distance: Tensor, interpolation: Interpolation) -> Tensor:
    """Value of the interpolation kernel at a distance >= 0 in (stretched) pixels."""
    if interpolation == "bilinear":
        return (1 - distance).clamp(min=0)
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def resample_matrix(
    start: Tensor, length: Tensor, in_px: int, out_px: int, interpolation: Interpolation
) -> Tensor:
    """Weights that cut [start, start + length) out of `in_px` pixels and resize it to `out_px`, antialiased.

    start, length: (M,) px. Returns float32 (M, out, in) with rows that sum to 1. Pixels outside the crop have
    no weight, so this equals cropping first and then `interpolate(antialias=True)`.
    """
    first, size = start.float().view(-1, 1, 1), length.float().view(-1, 1, 1)
    source = torch.arange(in_px, dtype=torch.float32, device=start.device)  # (in,)
    target = torch.arange(out_px, dtype=torch.float32, device=start.device).unsqueeze(1)  # (out, 1)
    scale = size / out_px
    center = first + scale * (target + 0.5)  # (M, out, 1)
    distance = (source + 0.5 - center).abs() / scale.clamp(min=1)  # (M, out, in)
    inside = (source >= first) & (source < first + size)  # (M, 1, in)
    weights = _filter(distance, interpolation) * inside
    return weights / weights.sum(dim=2, keepdim=True)


def crop_resize(images: Tensor, boxes: Tensor, size_px: int, interpolation: Interpolation) -> Tensor:
    """Cut one box out of each image and resize it to a square.

    images: uint8 (M, H, W, 3); boxes: int64 (M, 4), top, left, height, width in px.
    Returns uint8 (M, S, S, 3).
    """
    num_images, height, width, _ = images.shape
    top, left, box_height, box_width = boxes.unbind(1)
    rows = resample_matrix(top, box_height, height, size_px, interpolation)
    columns = resample_matrix(left, box_width, width, size_px, interpolation)
    narrow = _matmul(columns, images.transpose(1, 2).float().flatten(2))  # (M, S, H * 3), column by column
    narrow = narrow.clamp_(0, 255)  # as Pillow and torchvision, who keep uint8 between the two passes
    narrow = narrow.view(num_images, size_px, height, 3).transpose(1, 2).flatten(2)  # (M, H, S * 3)
    resized = _matmul(rows, narrow).view(num_images, size_px, size_px, 3)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def crop_resize_tiles(tiles: Tensor, offset_px: Tensor, length_px: int) -> Tensor:
    """Cut a square out of each tile and resize it back, bilinear.

    tiles: (T, 3, P, P); offset_px: int64 (T, 2), top and left of the square of `length_px`.
    """
    side = tiles.shape[-1]
    length = torch.full_like(offset_px[:, 0], length_px)
    rows = resample_matrix(offset_px[:, 0], length, side, side, "bilinear").unsqueeze(1)  # (T, 1, P, P)
    columns = resample_matrix(offset_px[:, 1], length, side, side, "bilinear").unsqueeze(1)
    return _matmul(_matmul(rows, tiles), columns.mT)


# --- geometry


def to_float(images: Tensor) -> Tensor:
    """uint8 (M, H, W, 3) -> float32 (M, 3, H, W) in [0, 1]"""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255


def shift(images: Tensor, shift_px: Tensor, border: Literal["black", "mirror"]) -> Tensor:
    """Move each image down and right (or up and left, where negative), by less than its side.

    images: uint8 (M, S, S, 3); shift_px: int64 (M, 2). What comes in over the border is black, or mirrored
    without repeating the edge. With black this is a random crop of the padded image.
    """
    side = images.shape[1]
    place = torch.arange(side, device=images.device)
    source = place - shift_px.unsqueeze(2)  # (M, 2, S)
    mirrored = source.abs()
    mirrored = torch.where(mirrored >= side, 2 * (side - 1) - mirrored, mirrored)
    rows, columns = mirrored.clamp(0, side - 1).unbind(1)
    number = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    moved = images[number, rows.unsqueeze(2), columns.unsqueeze(1)]  # (M, S, S, 3)
    if border == "mirror":
        return moved
    inside = (source >= 0) & (source < side)
    return moved * (inside[:, 0].unsqueeze(2) & inside[:, 1].unsqueeze(1)).unsqueeze(3)


def flip(images: Tensor, apply: Tensor) -> Tensor:
    """Mirror left and right where `apply`, bool (M,), says so."""
    return torch.where(_per_sample(apply), images.flip(3), images)


def quarter_turn(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate square images clockwise by `turns` quarter turns: int64 (M,) in 0..3. Exact."""
    k = _per_sample(turns)
    images = torch.where(k % 2 == 1, images.mT, images)
    images = torch.where((k == 1) | (k == 2), images.flip(3), images)
    return torch.where(k >= 2, images.flip(2), images)


# --- colour


def _luma(images: Tensor) -> Tensor:
    """(M, 3, H, W) -> (M, 1, H, W)"""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return (red * GRAY[0]).add(green, alpha=GRAY[1]).add(blue, alpha=GRAY[2])


def to_gray(images: Tensor) -> Tensor:
    """The grey value in all three channels."""
    return _luma(images).expand_as(images)


def _blend(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Move away from (factor > 1) or towards (factor < 1) black, the mean grey, or each pixel's grey.

    operation: int64 (M,), brightness, contrast or saturation; factor: (M,). A factor of 1 changes nothing.
    """
    operation = _per_sample(operation)
    gray = _luma(images)
    level = torch.where(operation == _CONTRAST, gray.mean(dim=(1, 2, 3), keepdim=True), 0.0)
    reference = torch.where(operation == _SATURATION, gray, level)
    return torch.lerp(reference, images, _per_sample(factor)).clamp_(0, 1)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue (of HSV) by a part of the colour circle: (M,) turns."""
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)  # (M, H, W)
    is_red, is_green = red == high, green == high
    sextant = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    sextant /= chroma.clamp(min=1e-12)
    sextant += torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    sextant += 6 * turns.view(-1, 1, 1)
    channels = []
    for place in (5, 3, 1):  # red, green, blue: where the channel is on the trapezoid that HSV gives each
        from_top = sextant + (place - 2)
        from_top -= ((from_top + 2) / 6).floor_().mul_(6)  # in [-2, 4)
        depth = from_top.abs_().neg_().add_(2).clamp_(0, 1)
        channels.append(torch.addcmul(high, chroma, depth, value=-1))
    return torch.stack(channels, dim=1)


def color_jitter(images: Tensor, plan: JitterPlan) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in its own order.

    The three blends share a formula, so three passes in the order of the plan serve all images. The hue,
    which costs more, is computed once: blends before it in an image's order are done before, others after.
    """
    hue_last = torch.argsort((plan.order == HUE).to(torch.int8), dim=1, stable=True)
    blends = plan.order.gather(1, hue_last)[:, :3]  # (M, 3): the order without the hue
    hue_place = (plan.order == HUE).to(torch.int8).argmax(dim=1)  # (M,): blends that come before the hue
    factors = torch.where(plan.apply.unsqueeze(1), plan.factors.gather(1, blends), 1.0)
    turns = torch.where(plan.apply, plan.factors[:, HUE], 0.0)
    for i in range(3):
        images = _blend(images, blends[:, i], torch.where(hue_place > i, factors[:, i], 1.0))
    images = torch.where(_per_sample(turns != 0), shift_hue(images, turns), images)
    for i in range(3):
        images = _blend(images, blends[:, i], torch.where(hue_place > i, 1.0, factors[:, i]))
    return images


def solarize(images: Tensor, apply: Tensor) -> Tensor:
    """Invert values of at least one half where `apply`, bool (M,), says so."""
    threshold = torch.where(apply, 0.5, 2.0)
    return torch.where(images >= _per_sample(threshold), 1 - images, images)


def blur_kernel_px(size_px: int) -> int:
    """A tenth of the side, odd, at least 3."""
    return max(3, size_px // 10 // 2 * 2 + 1)


def _blur_matrix(sigma_px: Tensor, kernel_px: int, side_px: int) -> Tensor:
    """One-dimensional Gaussian filters with reflected borders: (M, side, side) for sigma (M,) > 0 px."""
    radius = kernel_px // 2
    if radius >= side_px:
        raise ValueError(f"a blur kernel of {kernel_px} px does not fit an image of {side_px} px")
    steps = torch.arange(radius + 1, device=sigma_px.device)
    half = torch.exp(-0.5 * (steps / sigma_px.unsqueeze(1)) ** 2)  # (M, radius + 1): centre to border
    half = half / (2 * half.sum(dim=1, keepdim=True) - half[:, :1])
    half = torch.cat([half, torch.zeros_like(half[:, :1])], dim=1)  # the last stands for "out of reach"
    place = torch.arange(side_px, device=sigma_px.device)
    weights = half[:, (place - place.unsqueeze(1)).abs().clamp(max=radius + 1)]  # (M, side, side)
    mirrored = half[
        :, (steps[1:] + steps.unsqueeze(1)).clamp(max=radius + 1)
    ]  # pixel p seen at -p: (M, r + 1, r)
    weights[:, : radius + 1, 1 : radius + 1] += mirrored
    weights[:, -radius - 1 :, -radius - 1 : -1] += mirrored.flip(1, 2)
    return weights


def gaussian_blur(images: Tensor, sigma_px: Tensor, kernel_px: int) -> Tensor:
    """Blur each image with its own sigma, (M,) px; 0 leaves it as it is."""
    sigma = torch.where(sigma_px > 0, sigma_px, 1.0)
    height, width = images.shape[2:]
    rows = _blur_matrix(sigma, kernel_px, height)
    columns = rows if width == height else _blur_matrix(sigma, kernel_px, width)
    blurred = _matmul(_matmul(rows.unsqueeze(1), images), columns.mT.unsqueeze(1))
    return torch.where(_per_sample(sigma_px > 0), blurred, images)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std, each channel with its own."""
    channels = zip(images.unbind(1), mean, std, strict=True)
    return torch.stack([(channel - center) / scale for channel, center, scale in channels], dim=1)


def rgb_to_lab_ab(images: Tensor) -> Tensor:
    """The colour part (a, b) of CIE L*a*b* of sRGB images, white point D65: (M, 3, H, W) -> (M, 2, H, W)."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    red, green, blue = linear.unbind(1)
    x = (0.4124564 * red + 0.3575761 * green + 0.1804375 * blue) / 0.95047
    y = 0.2126729 * red + 0.7151522 * green + 0.0721750 * blue
    z = (0.0193339 * red + 0.1191920 * green + 0.9503041 * blue) / 1.08883
    edge = 6 / 29
    fx, fy, fz = (
        torch.where(t > edge**3, t.clamp(min=1e-6) ** (1 / 3), t / (3 * edge**2) + 4 / 29) for t in (x, y, z)
    )
    return torch.stack([500 * (fx - fy), 200 * (fy - fz)], dim=1)


# --- patches


def split_patches(images: Tensor, patch_px: int) -> Tensor:
    """(M, C, H, W) -> (M, N, C, P, P), row by row"""
    num_images, channels, height, width = images.shape
    rows, columns = height // patch_px, width // patch_px
    patches = images.reshape(num_images, channels, rows, patch_px, columns, patch_px)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(num_images, rows * columns, channels, patch_px, patch_px)


def join_patches(patches: Tensor, columns: int) -> Tensor:
    """The inverse of `split_patches`: (M, N, C, P, P) -> (M, C, H, W)"""
    num_images, num_patches, channels, side, _ = patches.shape
    rows = num_patches // columns
    patches = patches.reshape(num_images, rows, columns, channels, side, side)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(num_images, channels, rows * side, columns * side)


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """(M, 3, H, W) -> (M, N, P * P * 3); within a patch row by row, the channels of a pixel together."""
    return split_patches(images, patch_px).permute(0, 1, 3, 4, 2).flatten(2)


def unpatchify(patches: Tensor, patch_px: int, columns: int) -> Tensor:
    """The inverse of `patchify`: (M, N, P * P * 3) -> (M, 3, H, W)"""
    pixels = patches.reshape(*patches.shape[:2], patch_px, patch_px, 3)
    return join_patches(pixels.permute(0, 1, 4, 2, 3), columns)


# --- a whole view


def render(crops: Tensor, plan: ViewPlan, blur: bool = True) -> Tensor:
    """Finish views up to, not including, patch corruption: flip, colour, grey, blur, solarize, turn.

    crops: uint8 (M, S, S, 3). Returns float32 (M, 3, S, S) in [0, 1]. `blur=False` saves the time where the
    recipe blurs no view.
    """
    images = flip(to_float(crops), plan.flip)
    images = color_jitter(images, plan.jitter)
    images = torch.where(_per_sample(plan.gray), to_gray(images), images)
    if blur:
        images = gaussian_blur(images, plan.blur_sigma_px, blur_kernel_px(images.shape[-1]))
    images = solarize(images, plan.solarize)
    return quarter_turn(images, plan.quarter_turns)
