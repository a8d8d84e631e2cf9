"""The pixels of finished views: ours beside torchvision's and kornia's on the same uint8 crops."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import count
from typing import Any

import torch
from torch import Tensor

from pretrain import build
from pretrain.views.prepare import prepare
from steps.ours import Setting, configuration, real_batch
from steps.turns import CPU, Step, absent, row, table, take_turns

SIMCLR = "methods/simclr_vits16.yaml"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
SIGMA_PX = (0.1, 2.0)
OURS = "ours: per sample, in one call"
NUM_IMAGES = 8


def torchvision_transform(size_px: int) -> Any:
    """SimCLR's view after its crop, of uint8 (..., 3, H, W), as torchvision's second transforms make it."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(**JITTER)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel_px(size_px), SIGMA_PX)], p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def kornia_transform(size_px: int) -> Any:
    """The same of float32 (M, 3, H, W) in 0 to 1, with numbers of its own for every sample."""
    from kornia import augmentation as ka

    blur = kernel_px(size_px)
    return ka.AugmentationSequential(
        ka.RandomHorizontalFlip(p=0.5),
        ka.ColorJitter(**JITTER, p=0.8),
        ka.RandomGrayscale(p=0.2),
        ka.RandomGaussianBlur((blur, blur), SIGMA_PX, p=0.5),
        ka.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input"],
    )


def kernel_px(size_px: int) -> int:
    """A tenth of the side, odd, as SimCLR and this project have it."""
    return max(3, size_px // 10 // 2 * 2 + 1)


def pixels(setting: Setting) -> dict[str, Any]:
    size_px = setting.view_px(224)
    views = [f"views.{view}.size_px={size_px}" for view in ("one", "two")]
    strong = "{prob: 0.8, brightness: 0.8, contrast: 0.8, saturation: 0.8, hue: 0.2}"
    views += [f"views.{view}.jitter={strong}" for view in ("one", "two")]
    views += [f"views.{view}.blur={{prob: 0.5, sigma_px: [0.1, 2.0]}}" for view in ("one", "two")]
    config = configuration(SIMCLR, "data.lanes=1", setting.model(224, 16), *views, setting.batch(NUM_IMAGES))
    batch, recipe = real_batch(config, setting.shards), build.recipe(config)
    flat = batch.crops[0].flatten(0, 1).permute(0, 3, 1, 2).contiguous()  # uint8 (M, 3, H, W)
    transform = torchvision_transform(size_px)
    each, whole, kornia = (
        "torchvision v2, sample by sample",
        "torchvision v2, one draw for the batch",
        "kornia",
    )

    epochs = count()

    def ours() -> Tensor:
        """Other numbers each time, as the others draw."""
        return prepare(recipe, 0, batch.crops, batch.epochs + next(epochs), batch.sample_ids).images

    steps: dict[str, Step] = {
        OURS: ours,
        each: lambda: torch.stack([transform(image) for image in flat]),
        whole: lambda: transform(flat),
    }
    if find_spec("kornia"):
        augment = kornia_transform(size_px)
        steps[kornia] = lambda: augment(flat.to(torch.float32) / 255)
    for name, step in steps.items():
        made = step()
        assert isinstance(made, Tensor)
        assert made.shape == flat.shape, f"{name} made {tuple(made.shape)}"
        assert made.dtype == torch.float32
    seconds = take_turns(steps, setting.rounds_or(31))
    rows = [row(f"view pixels: ours / {name}", seconds, OURS, name, 1.0) for name in steps if name != OURS]
    if kornia not in steps:
        rows.append(absent(f"view pixels: ours / {kornia}", "not installed (make bench installs it)"))
    done = "flip, colour, grey, blur, normalise"
    what = f"two SimCLR views of {NUM_IMAGES} decoded and cropped images at {size_px} px: {done}"
    return table(what, CPU, seconds, rows)
