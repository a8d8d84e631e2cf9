"""The pixel stage of two views on the device, and what share of a ViT-B/16 step it is.

What peers do differs: torchvision's transforms draw one set of numbers for a whole batch, kornia's one for
each image, as here. Crops are cut before, by the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gpu.clock import digits, timed, turns
from gpu.setting import Measured, Setting, Slice, Variant
from gpu.training import MODELS, Training, compiled, configuration, random_crops
from pretrain.views.pixels import blur_kernel_px

MODEL = "ViT-B/16"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.4, 0.4, 0.2, 0.1)
SIGMA_PX = (0.1, 2.0)


def _rate(images: int, seconds: float) -> Measured:
    return {"images_per_second": digits(images / seconds), "headline": f"{images / seconds:,.0f} views/s"}


def ours(setting: Setting, is_compiled: bool) -> Measured:
    config = configuration(setting, MODEL, MODELS[MODEL].usual_batch, compiled(setting, is_compiled))
    training = Training(config, setting.device)
    num_views = len(config.views) * config.batch.global_size
    runs: dict[str, Callable[[], object]] = {"views": training.views, "step": training.step}
    timings = turns(runs, setting.device, setting.steady)
    views, step = timings["views"], timings["step"]
    training.close()
    return {
        "views": num_views,
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "share_of_step_ratio": digits(views.median / step.median),
        **_rate(num_views, views.median),
    }


def _crops(setting: Setting) -> Tensor:
    """uint8 (M, 3, H, W), as the peers take them."""
    config = configuration(setting, MODEL, MODELS[MODEL].usual_batch)
    (crops,) = random_crops(config, setting.device)
    return crops.flatten(0, 1).permute(0, 3, 1, 2).contiguous()


def torchvision(setting: Setting) -> Measured:
    from torchvision.transforms import v2

    crops = _crops(setting)
    transform: Any = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.GaussianBlur(blur_kernel_px(crops.shape[-1]), SIGMA_PX),
            v2.RandomSolarize(0.5, p=0.1),
            v2.Normalize(MEAN, STD),
        ]
    )
    timing = timed(lambda: transform(crops), setting.device, setting.steady)
    note = "one set of numbers for the whole batch"
    return {"seconds": timing.to_json(), "note": note, **_rate(len(crops), timing.median)}


def kornia(setting: Setting) -> Measured:
    from kornia import augmentation as k

    crops = _crops(setting)
    kernel = blur_kernel_px(crops.shape[-1])
    transform: Any = k.AugmentationSequential(
        k.RandomHorizontalFlip(p=0.5),
        k.ColorJitter(*JITTER, p=0.8),
        k.RandomGrayscale(p=0.2),
        k.RandomGaussianBlur((kernel, kernel), SIGMA_PX, p=0.5),
        k.RandomSolarize(p=0.1),
        k.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input"],
    ).to(setting.device)
    timing = timed(lambda: transform(crops.float() / 255), setting.device, setting.steady)
    return {"seconds": timing.to_json(), **_rate(len(crops), timing.median)}


def variants(setting: Setting) -> dict[str, Variant]:
    return {
        "ours, compiled": Variant(lambda: ours(setting, True), 90.0),
        "ours, eager": Variant(lambda: ours(setting, False)),
        "torchvision v2": Variant(lambda: torchvision(setting)),
        "kornia": Variant(lambda: kornia(setting)),
    }


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    best = good["ours, compiled"]["images_per_second"]
    return {
        f"ours, compiled / {name}": digits(best / found["images_per_second"]) for name, found in good.items()
    }


VIEW_PIXELS = Slice("the pixel stage: eager, compiled, torchvision v2, kornia", variants, summary)
