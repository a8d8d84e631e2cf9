"""Parameters and checkpoints of a plan are those of the module that a run builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_configs import METHODS, PATHS, reduced_config

from pretrain import build, changes
from pretrain.config import RunConfig, load_config
from pretrain.peers import ALONE
from pretrain.plan.backbone import encoder_of
from pretrain.plan.flops import site_of
from pretrain.plan.parameters import Parameters, parameters_of

NUM_SAMPLES = 16
CHOSEN = ["dino_vits16", "moby_swin_t", "relt2t_14_cifar10", "mae_vits4_cifar10", "repre_simsiam_vits16"]
OTHERS = [path.stem for path in PATHS if path.stem not in CHOSEN]


def planned(config: RunConfig) -> Parameters:
    settings = config.model_dump(mode="json")
    encoder = encoder_of(settings)
    return parameters_of(settings, encoder, site_of(settings, encoder, 1, NUM_SAMPLES))


def assert_as_built(config: RunConfig, device: torch.device) -> None:
    told = planned(config)
    with torch.device(device):
        module = build.module(config, ALONE, device, NUM_SAMPLES)
    assert told.student == sum(parameter.numel() for parameter in module.parameters())
    assert told.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert told.backbone == sum(parameter.numel() for parameter in module.backbone.parameters())
    for name, task in module.tasks.items():
        assert told.heads[name] == sum(parameter.numel() for parameter in task.parameters()), name
    teacher = module.make_teacher()._parameters().values() if config.teacher else ()
    assert told.teacher == sum(parameter.numel() for parameter in teacher)
    # running statistics of batch norms are left out
    bytes_of_run = changes.num_bytes(changes.outline(config, NUM_SAMPLES))
    assert told.checkpoint_bytes == pytest.approx(bytes_of_run, rel=0.01, abs=8192)


@pytest.mark.parametrize("name", CHOSEN)
def test_parameters_of_a_method_are_those_that_are_built(name: str) -> None:
    assert_as_built(reduced_config(METHODS / f"{name}.yaml", Path("shards")), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_parameters_of_every_other_method_are_those_that_are_built(name: str) -> None:
    assert_as_built(reduced_config(METHODS / f"{name}.yaml", Path("shards")), torch.device("cpu"))


def test_parameters_of_a_whole_vit_with_the_core_tasks() -> None:
    config = load_config(METHODS.parent / "imagenet_vitb16_multitask.yaml")
    assert_as_built(config, torch.device("meta"))
    assert planned(config).backbone == pytest.approx(85.8e6, rel=0.001)


def test_what_is_frozen_is_not_trained() -> None:
    config = reduced_config(
        METHODS / "moco_v3_vits16.yaml",
        Path("shards"),
        "model.pos_embed=sincos_moco",
        "model.freeze_patch_embed=true",
    )
    assert planned(config).frozen > 0
    assert_as_built(config, torch.device("cpu"))
