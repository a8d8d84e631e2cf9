"""A small trained module put together by hand: real views, a real backbone, the tasks that a test names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pretrain.models.backbone import (
    BackboneConfig,
    create_backbone,
    layout_of,
    levels_of,
    num_features,
)
from pretrain.tasks import TASKS
from pretrain.tasks.balance import Balance, BalanceConfig
from pretrain.tasks.contract import TaskSite
from pretrain.tasks.multitask import MultiTask, Reading
from pretrain.views.pixels import patchify, unpatchify
from pretrain.views.plan import PatchConfig, ViewConfig
from pretrain.views.prepare import Inputs, Recipe, prepare

# 8 x 8 patches
VIT = BackboneConfig(
    name="vit_tiny_patch16_224", img_px=32, patch_px=4, args={"depth": 2, "embed_dim": 24, "num_heads": 2}
)
# 2 x 2 patches in the last of four stages
SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    img_px=32,
    patch_px=2,
    args={"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2},
)
MEAN, STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)


def small_multitask(
    tasks: Mapping[str, Mapping[str, Any]],
    views: Mapping[str, ViewConfig],
    model: BackboneConfig = VIT,
    balance: str = "fixed",
    weights: Mapping[str, float] | None = None,
) -> MultiTask:
    """tasks: name -> settings. A module has the same backbone and heads whatever other tasks run."""
    registers = tuple(name for name in tasks if TASKS[name].needs_register)
    layout = layout_of(model, registers)
    torch.manual_seed(0)
    backbone = create_backbone(model, len(registers))
    levels = levels_of(backbone)
    site = TaskSite(layout, num_features(backbone), model.token_px, levels)
    made, readings, likelihoods = {}, {}, {}
    for name, settings in tasks.items():
        spec = TASKS[name]
        config = spec.config(**settings)
        torch.manual_seed(len(name))
        made[name] = spec.task(config, site)
        likelihoods[name] = spec.likelihood_of(config)
        names = {"pair": tuple(views)[:2], "first": tuple(views)[:1]}.get(spec.reads, tuple(views))
        seen = spec.teacher_views(config, names) if spec.teacher_views else ()
        readings[name] = Reading(
            names,
            spec.taps(config, len(levels)) if spec.taps else (),
            seen,
            spec.teacher_head if seen else None,
        )
    weighted = dict.fromkeys(tasks, 1.0) | dict(weights or {})
    return MultiTask(
        backbone,
        {model.img_px: layout},
        made,
        readings,
        Balance(likelihoods, weighted, BalanceConfig(kind=balance)),
        mask_token=any(view.mask is not None and view.mask.how == "token" for view in views.values()),
        no_position=False,
    ).train()


def small_inputs(
    views: Mapping[str, ViewConfig], model: BackboneConfig = VIT, num_images: int = 3, seed: int = 0
) -> Inputs:
    """What the encoder is to see of images of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    px = model.img_px
    crops = torch.randint(0, 256, (len(views), num_images, px, px, 3), dtype=torch.uint8, generator=generator)
    ids = torch.arange(num_images)
    recipe = Recipe(
        dict(views), PatchConfig(layout_of(model, ()).grid, model.token_px), MEAN, STD, needs_whole=True
    )
    return prepare(recipe, seed, crops, torch.zeros_like(ids), ids)


def repaint(inputs: Inputs, where: Tensor, patch_px: int = 4) -> Inputs:
    """The same inputs with other pixels in the patches where bool (M, N) holds, shown and clean."""
    (group,) = inputs.groups
    columns = group.images.shape[3] // patch_px

    def painted(images: Tensor) -> Tensor:
        return unpatchify(patchify(images, patch_px) + 0.5 * where.unsqueeze(2), patch_px, columns)

    assert group.whole is not None
    group = replace(
        group, images=painted(group.images), clean=painted(group.clean), whole=painted(group.whole)
    )
    return replace(inputs, groups=(group,))
