"""A pass for each task that destroys content, as a composition of views, beside one pass for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain import build
from pretrain.check import check
from pretrain.config import RunConfig, load_config
from pretrain.errors import ConfigError
from pretrain.peers import ALONE
from pretrain.tasks.multitask import MultiTask
from pretrain.views.pixels import split_patches
from pretrain.views.pixels_cpu import normalize
from pretrain.views.plan import crop_boxes, in_places
from pretrain.views.prepare import Inputs, prepare

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "model.name=vit_tiny_patch16_224",
    "model.args={depth: 1, embed_dim: 24, num_heads: 2}",
    "tasks.contrastive={hidden_dim: 32, out_dim: 16}",
    "batch.global_size=4",
    "data.lanes=4",
    "engine={kind: local, precision: fp32}",
]
OWN_TASKS = ("colorization", "inpainting", "relative_position", "jigsaw")


def configured(name: str, *overrides: str) -> RunConfig:
    config = load_config(CONFIGS / f"{name}.yaml", [*SMALL, *overrides])
    check(config, world_size=1)
    return config


def inputs_of(config: RunConfig) -> Inputs:
    """Views of the same four images, cut where the config says."""
    ids, zeros = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    images = torch.randint(
        0, 256, (4, 64, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    sides = torch.full((4,), 64)
    crops = []
    for place, view in enumerate(in_places(build.views(config))):
        boxes = crop_boxes(view, 0, zeros, ids, place, sides, sides)
        corners = [(min(top, 32), min(left, 32)) for top, left, _, _ in boxes.tolist()]
        crops.append(
            torch.stack(
                [images[i, top : top + 32, left : left + 32] for i, (top, left) in enumerate(corners)]
            )
        )
    return prepare(build.recipe(config), 0, torch.stack(crops), zeros, ids)


def module_of(config: RunConfig) -> MultiTask:
    torch.manual_seed(0)
    return build.module(config, ALONE, torch.device("cpu")).train()


@pytest.mark.parametrize("size", ["cpu", "vits4"])
def test_each_task_sees_its_own_patches_of_the_same_views_in_a_pass_of_its_own(size: str) -> None:
    together, apart = configured(f"cifar10_{size}_multitask"), configured(f"cifar10_{size}_separate")
    one, many = inputs_of(together).groups, inputs_of(apart).groups
    assert len(one) == 1
    assert len(many) == 5
    whole, *single = many
    mean, std = apart.normalization.mean, apart.normalization.std
    clean = split_patches(normalize(one[0].clean, mean, std), apart.model.patch_px)
    assert torch.equal(split_patches(whole.images, apart.model.patch_px), clean)
    names = {
        "colorization": "colorization",
        "inpainting": "inpainting",
        "relative_position": "pairs",
        "jigsaw": "jigsaw",
    }
    for task, group in zip(OWN_TASKS, single, strict=True):
        assert torch.equal(group.clean, one[0].clean)
        for other in OWN_TASKS:
            index = getattr(group.plan.patches, names[other])
            expected = getattr(one[0].plan.patches, names[other])
            assert torch.equal(index, expected if other == task else expected[:, :0])
        shown = split_patches(group.images, apart.model.patch_px)
        touched = (shown != clean).flatten(2).any(dim=2)
        own = getattr(group.plan.patches, names[task]).flatten(1)
        assert not (touched & ~torch.zeros_like(touched).scatter(1, own, True)).any()
        if task != "inpainting":  # whose patches a learned token replaces in the backbone
            assert touched.any(dim=1).all()


def test_every_pass_teaches_and_image_level_tasks_learn_as_if_alone() -> None:
    """A pass for each counts five, every parameter gets a gradient, and whole views give the loss that they
    give without the other tasks."""
    apart = configured("cifar10_cpu_separate")
    module = module_of(apart)
    outputs = module(inputs_of(apart))
    outputs["total"].backward()
    assert module.num_backbone_calls == 5
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []

    none = [f"tasks.{task}=null" for task in OWN_TASKS]
    alone = configured("cifar10_cpu_multitask", *none)
    other = module_of(alone)
    other.load_state_dict(module.state_dict(), strict=False)
    for name in ("contrastive", "rotation"):
        torch.testing.assert_close(other(inputs_of(alone))[f"loss/{name}"], outputs[f"loss/{name}"].detach())


def test_a_task_that_a_view_does_not_name_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"view 'one_jigsaw', whose `corrupt` does not name it; add it there"
    ):
        configured(
            "cifar10_cpu_separate",
            *(f"views.{view}_jigsaw.corrupt=[colorization]" for view in ("one", "two")),
        )
    with pytest.raises(ConfigError, match=r"views.one.corrupt: 'rotation' is no patch-level task"):
        configured("cifar10_cpu_multitask", "views.one.corrupt=[rotation]")


def test_tasks_that_are_taken_out_leave_their_views_whole() -> None:
    config = configured("cifar10_cpu_separate", "tasks.jigsaw=null")
    assert build.views(config)["one_jigsaw"].corrupt is False
    module = module_of(config)
    module(inputs_of(config))
    assert module.num_backbone_calls == 4


def test_overlapping_sets_train_every_task() -> None:
    config = configured("cifar10_cpu_multitask", "views.one.disjoint=false", "views.two.disjoint=false")
    module = module_of(config)
    module(inputs_of(config))["total"].backward()
    assert module.num_backbone_calls == 1
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
