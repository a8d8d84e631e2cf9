"""Local corruptions of SiT: rectangles of a view turn grey, are blurred, filled with noise, or swapped.

SiT: Self-supervised vIsion Transformer (Atito, Awais and Kittler, 2021, arXiv:2104.03602); blocks as in GMML
(arXiv:2205.14986) and its later releases. Works on normalised pixels; the clean view stays as it is, to be
the target. A rectangle is four numbers, (top, left, height, width) in px; one of no height changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pretrain.constants import constant
from pretrain.randomness import bits

Draw = Callable[[int], Tensor]  # n -> float32 (M, n), uniform in [0, 1): a row of numbers for each view
Area = Annotated[float, Field(ge=0.0, le=0.8)]  # of a view; more would need very many rectangles

LEAST_SIDE = 0.05  # of a rectangle, as a ratio of the view's side
MOST_SIDE = 0.25  # of a rectangle of noise or of another image
MOST_BLOCK_SIDE = 0.3
MAX_BLUR_RADIUS_PX = 7  # kernels of 3, 5, ... 15 px
BLUR_SIGMA_PX = (0.1, 5.1)
COLOR_STRENGTHS = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
_NUM_COLOR, _NUM_GRAY, _NUM_BLUR = 12, 4, 6  # numbers that these three draw
_KINDS: dict[str, dict[str, Any]] = {
    "rectangles": {"gray": True, "blur": True, "drop_ratio": (0.0, 0.3), "replace_ratio": (0.0, 0.3)},
    "blocks": {"gray": False, "blur": False, "drop_ratio": (0.5, 0.7), "replace_ratio": (0.35, 0.35)},
}


class LocalConfig(BaseModel):
    """What is done to parts of one view, in this order: colours, grey, blur, drop, replace.

    rectangles (the first SiT): a drop and a replacement, each with rectangles of 5 to 25 % of the side until
    their areas, overlaps counted twice, sum to a ratio drawn from its range. blocks (the later ones): either
    a drop or a replacement, with blocks of up to 30 % of the side until they cover the ratio.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["rectangles", "blocks"] = "rectangles"
    gray: bool = True  # one rectangle; by default only with kind rectangles, as `blur`
    blur: bool = True  # one rectangle
    color: bool = False  # colour jitter of one rectangle: on the authors' list, not in their code
    fill: Literal["noise", "zeros"] = "noise"  # what replaces a drop; zero is the mean colour
    drop_ratio: tuple[Area, Area] = (0.0, 0.3)  # area; of blocks by default (0.5, 0.7)
    replace_ratio: tuple[Area, Area] = (0.0, 0.3)  # area that shows another image; of blocks (0.35, 0.35)
    aligned: bool = False  # blocks are made of whole patches

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, settings: Any) -> Any:
        """Fill in what depends on the kind."""
        if not isinstance(settings, dict):
            return settings
        kind = settings.get("kind", "rectangles")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        return (_KINDS.get(kind, {}) if isinstance(kind, str) else {}) | given

    @model_validator(mode="after")
    def _makes_sense(self) -> LocalConfig:
        for name in ("drop_ratio", "replace_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"'{name}' is a range from low to high, not {[low, high]}")
        if self.aligned and self.kind != "blocks":
            raise ValueError("'aligned' is of kind 'blocks'; rectangles are placed by pixels")
        return self


SIT_V1 = LocalConfig()
SIT_V2 = LocalConfig(kind="blocks")
SIT_V3 = LocalConfig(kind="blocks", fill="zeros", drop_ratio=(0.5, 0.5), replace_ratio=(0.3, 0.3))


@dataclass(frozen=True)
class LocalPlan:
    """Numbers of the corruptions of M views; rectangles are int64 (M, R, 4), R = 0 where there are none."""

    color: Tensor  # R = 0 or 1
    color_factors: Tensor  # float32 (M, 4): brightness, contrast, saturation factor, hue shift in turns
    color_order: Tensor  # int64 (M, 4): the operations (0..3, numbered as the factors), first to last
    gray: Tensor  # R = 0 or 1
    blur: Tensor  # R = 0 or 1
    blur_radius_px: Tensor  # int64 (M,): of the kernel of 2 * radius + 1
    blur_sigma_px: Tensor  # float32 (M,)
    drop: Tensor
    replace: Tensor
    donor: Tensor  # int64 (M,): the row of the image that is shown in `replace`


def num_rectangles(config: LocalConfig) -> tuple[int, int]:
    """The most rectangles of a drop and of a replacement.

    They fall short of the largest area of a range less than once in 5000 times: from simulations of ratios of
    0.1 to 0.8, at 16 to 224 px and, of aligned blocks, with 4 to 14 patches a side.
    """
    most = config.drop_ratio[1], config.replace_ratio[1]
    if config.kind == "rectangles":  # of 2 % of the area on average
        drop, replace = (math.ceil(90 * area) + 10 if area else 0 for area in most)
        return drop, replace
    num_blocks = math.ceil(-90 * math.log(1 - max(most))) + 10  # they cover 1 - exp(-sum of areas)
    return num_blocks, num_blocks


def draw_local(
    config: LocalConfig, num_images: int, num_views: int, side_px: int, patch_px: int, draw: Draw
) -> LocalPlan:
    """Decide about V views of B images of `side_px`; view-major, M = V * B.

    All follows from a view's own numbers, but for the donor: the same view of another image of the batch. A
    single image has none, so that nothing is replaced and blocks are always dropped.
    """
    num_drop, num_replace = num_rectangles(config)
    draws = draw(_NUM_COLOR + _NUM_GRAY + _NUM_BLUR + 2 + 4 * (num_drop + num_replace) + 1)
    widths = [_NUM_COLOR, _NUM_GRAY, _NUM_BLUR, 2, 4 * num_drop, 4 * num_replace, 1]
    color, gray, blur, areas, drop, replace, donors = torch.split(draws, widths, dim=1)
    drop, replace = drop.reshape(len(draws), num_drop, 4), replace.reshape(len(draws), num_replace, 4)
    if config.kind == "rectangles":
        drop = _rectangles_to_area(drop, config.drop_ratio, areas[:, 0], side_px)
        replace = _rectangles_to_area(replace, config.replace_ratio, areas[:, 1], side_px)
    else:
        prefers = (areas[:, 0] < 0.5) | (num_images == 1)  # to drop
        drop, replace = _blocks_to_area(config, drop, areas[:, 1], prefers, side_px, patch_px)
    row = torch.arange(num_views * num_images, device=draws.device)
    other = (row + 1 + (donors[:, 0] * (num_images - 1)).long()) % num_images
    sigma_low, sigma_high = BLUR_SIGMA_PX
    factors, order = _jitter(color[:, 4:])
    return LocalPlan(
        color=_large_rectangle(color[:, :4], side_px)[:, : int(config.color)],
        color_factors=factors,
        color_order=order,
        gray=_large_rectangle(gray, side_px)[:, : int(config.gray)],
        blur=_large_rectangle(blur[:, :4], side_px)[:, : int(config.blur)],
        blur_radius_px=(1 + blur[:, 4] * MAX_BLUR_RADIUS_PX).long(),
        blur_sigma_px=sigma_low + (sigma_high - sigma_low) * blur[:, 5],
        drop=drop,
        replace=replace if num_images > 1 else replace[:, :0],
        donor=row - row % num_images + other,
    )


def covered(rectangles: Tensor, side_px: int) -> Tensor:
    """The pixels of a view that are in any of its rectangles: int64 (M, R, 4) -> bool (M, 1, H, W)"""
    place = torch.arange(side_px, device=rectangles.device)
    top, left, height, width = rectangles.unsqueeze(3).unbind(2)  # (M, R, 1)
    rows = ((place >= top) & (place < top + height)).float()  # (M, R, H)
    columns = ((place >= left) & (place < left + width)).float()
    return (rows.mT @ columns > 0).unsqueeze(1)  # how many cover a pixel; rounding makes no zero of a count


def apply_local(
    clean: Tensor,
    plan: LocalPlan,
    mean: Sequence[float],
    std: Sequence[float],
    noise: Callable[[], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Corrupt the views as planned; other images are shown as they were before any corruption.

    clean: (M, 3, H, W) normalised with `mean` and `std`. noise: gives as many standard normal numbers for the
    drop, and is called only if there is one; None fills with zeros. Returns what the network sees, like
    `clean`, and where any corruption was at work, bool (M, 1, H, W).
    """
    side_px = clean.shape[-1]
    shown, changed = clean, torch.zeros_like(clean[:, :1], dtype=torch.bool)

    def paste(rectangles: Tensor, make: Callable[[], Tensor]) -> None:
        nonlocal shown, changed
        if rectangles.shape[1]:
            place = covered(rectangles, side_px)
            shown, changed = torch.where(place, make().to(shown.dtype), shown), changed | place

    paste(plan.color, lambda: _recolored(shown, plan, mean, std))
    paste(plan.gray, lambda: shown.mean(dim=1, keepdim=True))  # of normalised channels, as the release
    paste(plan.blur, lambda: _blurred(shown, plan.blur_radius_px, plan.blur_sigma_px))
    paste(plan.drop, noise if noise is not None else lambda: torch.zeros_like(shown))
    paste(plan.replace, lambda: clean[plan.donor])
    return shown, changed


def standard_normal(
    seed: int, epochs: Tensor, sample_ids: Tensor, streams: Tensor | int, shape: Sequence[int]
) -> Tensor:
    """Normal numbers of mean 0 and variance 1 that belong to each sample: float32 (M, *shape).

    epochs, sample_ids: int64 (M,); streams: one of all samples or int64 (M,), as a view's numbers come from
    streams of its own. Pairs from hashed counters (Box and Muller, 1958), no further than 5.8 from zero.
    """
    count = math.prod(shape)
    hashed = bits(seed, epochs, sample_ids, cast(int, streams), (count + 1) // 2)  # takes tensors as well
    first = ((hashed >> 40) & 0xFFFFFF).float().add_(1).mul_(2.0**-24)  # (0, 1]
    turn = (hashed & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    radius = first.log_().mul_(-2).sqrt_()
    pairs = torch.cat([radius * turn.cos(), radius.mul_(turn.sin())], dim=1)
    return pairs[:, :count].reshape(-1, *shape)


# --- choosing rectangles


def _rectangles(draws: Tensor, least: int, most: int, side: int) -> Tensor:
    """Rectangles with sides from `least` to `most`, cut off at the border: (M, R, 4) draws -> int64 (M, R, 4)

    As in the release, a corner lies anywhere but in the last `least` rows and columns, so the border is as
    likely to be covered as the middle.
    """
    start = (draws[..., :2] * (side - least + 1)).long()
    length = least + (draws[..., 2:] * (most - least + 1)).long()
    return torch.cat([start, torch.minimum(length, side - start)], dim=2)


def _side(ratio: float, side: int) -> int:
    return max(1, int(ratio * side))


def _large_rectangle(draws: Tensor, side_px: int) -> Tensor:
    """One of 5 to 100 % of the side: (M, 4) draws -> int64 (M, 1, 4)"""
    return _rectangles(draws.unsqueeze(1), _side(LEAST_SIDE, side_px), side_px, side_px)


def _keep_first(rectangles: Tensor, num_kept: Tensor) -> Tensor:
    """All zero, thus nothing, instead of the rectangles after the first `num_kept`, int64 (M,)."""
    index = torch.arange(rectangles.shape[1], device=rectangles.device)
    return rectangles * (index < num_kept.unsqueeze(1)).unsqueeze(2)


def _rectangles_to_area(draws: Tensor, ratio: tuple[float, float], area_draw: Tensor, side_px: int) -> Tensor:
    """Rectangles until their areas sum to a ratio of the view's: (M, R, 4) draws -> int64 (M, R, 4)"""
    least, most = _side(LEAST_SIDE, side_px), _side(MOST_SIDE, side_px)
    rectangles = _rectangles(draws, least, most, side_px)
    area_px = rectangles[..., 2] * rectangles[..., 3]  # (M, R)
    wanted_px = (ratio[0] + (ratio[1] - ratio[0]) * area_draw) * side_px**2
    num_short = ((area_px.cumsum(dim=1) - area_px) < wanted_px.unsqueeze(1)).sum(dim=1)
    return _keep_first(rectangles, num_short)


def _blocks_to_area(
    config: LocalConfig, draws: Tensor, area_draw: Tensor, drops: Tensor, side_px: int, patch_px: int
) -> tuple[Tensor, Tensor]:
    """Blocks until they cover a ratio of the view, as a drop or else a replacement: int64 (M, R, 4) each."""
    unit_px = patch_px if config.aligned else 1
    side = side_px // unit_px
    blocks = _rectangles(draws, 1, _side(MOST_BLOCK_SIDE, side), side)
    (drop_low, drop_high), (replace_low, replace_high) = config.drop_ratio, config.replace_ratio
    low = torch.where(drops, drop_low, replace_low)
    wanted = torch.lerp(low, torch.where(drops, drop_high, replace_high), area_draw) * side**2
    fewest = torch.zeros_like(drops, dtype=torch.int64)
    enough = torch.full_like(fewest, blocks.shape[1])
    for _ in range(blocks.shape[1].bit_length()):  # bisection, as more blocks never cover less
        middle = (fewest + enough) // 2
        reached = covered(_keep_first(blocks, middle), side).sum(dim=(1, 2, 3)) >= wanted
        enough = torch.where(reached, middle, enough)
        fewest = torch.where(reached, fewest, middle + 1).minimum(enough)
    blocks = _keep_first(blocks, enough) * unit_px
    chosen = drops.view(-1, 1, 1)
    return blocks * chosen, blocks * ~chosen


def _jitter(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Factors and order of a colour jitter: (M, 8) draws -> float32 (M, 4), int64 (M, 4)"""
    strengths = constant(COLOR_STRENGTHS, torch.float32, draws.device)
    center = constant((1.0, 1.0, 1.0, 0.0), torch.float32, draws.device)
    return center + strengths * (2 * draws[:, :4] - 1), draws[:, 4:].argsort(dim=1, stable=True)


# --- changing pixels


def _recolored(images: Tensor, plan: LocalPlan, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    # `plan` imports this module and `pixels` imports `plan`, so these wait until both are loaded
    from pretrain.views.pixels import color_jitter, normalize
    from pretrain.views.plan import JitterPlan

    center, scale = (constant(tuple(of), torch.float32, images.device).view(3, 1, 1) for of in (mean, std))
    unit = (images * scale + center).clamp_(0, 1)
    everywhere = torch.ones_like(plan.blur_radius_px, dtype=torch.bool)
    return normalize(
        color_jitter(unit, JitterPlan(everywhere, plan.color_factors, plan.color_order)), mean, std
    )


def _blurred(images: Tensor, radius_px: Tensor, sigma_px: Tensor) -> Tensor:
    """Gaussian blur with a kernel of 2 * radius + 1 and reflected borders; radius, sigma: (M,) px."""
    reach = min(MAX_BLUR_RADIUS_PX, images.shape[-1] - 1)
    steps = torch.arange(reach + 1, device=images.device)
    half = torch.exp(-0.5 * (steps / sigma_px.unsqueeze(1)) ** 2) * (steps <= radius_px.unsqueeze(1))
    half = (half / (2 * half.sum(dim=1, keepdim=True) - half[:, :1])).view(-1, reach + 1, 1, 1, 1)
    blurred = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    for dim in (2, 3):
        length = images.shape[dim]
        shifted = [blurred.narrow(dim, i, length) for i in range(2 * reach + 1)]
        blurred = half[:, 0] * shifted[reach]
        for i in range(1, reach + 1):
            blurred.addcmul_(half[:, i], shifted[reach - i] + shifted[reach + i])
    return blurred
