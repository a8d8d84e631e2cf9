"""From crops to network input: draw the plan, apply it to the pixels, corrupt the patches, normalise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.views import pixels, pixels_cpu
from pretrain.views.corrupt import corrupt
from pretrain.views.plan import PatchConfig, ViewConfig, ViewPlan, draw_view_plan


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the network sees of an image."""

    names: tuple[str, ...]  # of the views
    views: tuple[ViewConfig, ...]  # all of one size
    patches: PatchConfig
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    blank_inpainting: bool = False  # show the masked patches as the mean colour instead of a learned token


@dataclass(frozen=True)
class Inputs:
    """V views of B images, ready for one encoder call; view-major, M = V * B rows."""

    images: Tensor  # (M, 3, H, W) float32, corrupted and normalised
    clean: Tensor  # (M, 3, H, W) float32 in [0, 1]
    plan: ViewPlan


@torch.no_grad()
def prepare(recipe: Recipe, seed: int, crops: Tensor, epochs: Tensor, sample_ids: Tensor) -> Inputs:
    """crops: uint8 (V, B, S, S, 3); epochs and sample_ids: int64 (B,); all on one device."""
    plan = draw_view_plan(recipe.views, recipe.patches, seed, epochs, sample_ids)
    flat = crops.flatten(0, 1)
    on_cpu = crops.device.type == "cpu"
    if on_cpu:
        clean = pixels_cpu.render(flat, plan)
    else:
        clean = pixels.render(flat, plan, blur=any(view.blur.prob > 0 for view in recipe.views))
    shown = clean
    if recipe.patches.total and recipe.views[0].corrupt:
        blank = torch.tensor(recipe.mean, device=crops.device) if recipe.blank_inpainting else None
        shown = corrupt(clean, plan, recipe.patches.patch_px, blank)
    normalize = pixels_cpu.normalize if on_cpu else pixels.normalize
    return Inputs(normalize(shown, recipe.mean, recipe.std), clean, plan)
