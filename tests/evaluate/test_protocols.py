"""Every method is read out as its authors do it, found by its tasks; anything else by a wide sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from method_configs import PATHS
from run_folder import TINY, tiny_config, write_checkpoint

from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.evaluate.arguments import FEATURES as FEATURE_CHOICES
from pretrain.evaluate.arguments import PROTOCOLS as PROTOCOL_CHOICES
from pretrain.evaluate.arguments import RECIPES as RECIPE_CHOICES
from pretrain.evaluate.encoder import open_encoder
from pretrain.evaluate.feature import FEATURES
from pretrain.evaluate.protocols import PROTOCOLS, method_of, protocol_for
from pretrain.evaluate.recipes import RECIPES

# how the names of the configs begin, RePre's by what they add it to; the rest is generic
PROTOCOL_OF = {
    "byol": "moco_v3",
    "simclr": "moco_v3",
    "simsiam": "moco_v3",
    "moco_v2": "moco_v3",
    "moco_v3": "moco_v3",
    "moby": "moby",
    "mae_vit": "mae",
    "maskfeat": "mae",
    "ijepa": "ijepa",
    "sit_v1": "sit",
    "sit_vits4": "sit",
    "sit_v3": "moco_v3",
    "relvit": "relvit",
    "relswin": "relvit",
    "relt2t": "relvit",
    "drloc": "relvit",
    "dino_vits16": "dino_small",
    "dino_vitb16": "dino",
}
WIDTHS = {"vit_base_patch16_224": 768, "vit_large_patch16_224": 1024, "vit_huge_patch14_224": 1280}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_config_of_a_method_finds_its_protocol(path: Path) -> None:
    config = load_config(path)
    name = path.stem.removeprefix("repre_")
    wanted = next((value for start, value in PROTOCOL_OF.items() if name.startswith(start)), "generic")
    width = WIDTHS.get(config.model.name, 384)
    assert method_of(config.tasks.enabled(), width) == wanted


@pytest.mark.parametrize(
    "tasks",
    [
        (),
        ("classification",),
        ("rotation",),
        ("contrastive", "mae"),
        ("contrastive", "rotation", "jigsaw"),
        ("contrastive", "spatial_relation"),
    ],
)
def test_a_mixture_is_of_no_method(tasks: tuple[str, ...]) -> None:
    assert method_of(tasks) == "generic"


@pytest.mark.parametrize(
    ("name", "optimizer", "lr_of_1024", "num_epochs", "batch_size", "warmup", "inputs"),
    [
        ("dino_small", "sgd", 0.004, 100, 1024, 0, ("raw",)),
        ("dino", "sgd", 0.004, 100, 1024, 0, ("raw",)),
        ("ijepa", "sgd", 0.004, 100, 1024, 0, ("raw",)),
        ("relvit", "sgd", 0.004, 100, 1024, 0, ("raw",)),
        ("moco_v3", "sgd", 12.0, 90, 1024, 0, ("raw",)),
        ("moby", "sgd", 2.0, 100, 1024, 5, ("raw",)),
        ("mae", "lars", 0.4, 90, 16384, 10, ("standardised",)),
        ("sit", "adamw", 2e-3, 501, 480, 0, ("raw",)),
        ("generic", "sgd", 0.4, 100, 1024, 0, ("raw", "standardised")),
    ],
)
def test_a_protocol_has_the_published_numbers(
    name: str,
    optimizer: str,
    lr_of_1024: float,
    num_epochs: int,
    batch_size: int,
    warmup: float,
    inputs: tuple[str, ...],
) -> None:
    probe = PROTOCOLS[name].probe
    assert probe.base_lr * 1024 / 256 == pytest.approx(lr_of_1024)
    assert (probe.optimizer, probe.num_epochs, probe.batch_size) == (optimizer, num_epochs, batch_size)
    assert (probe.warmup_epochs, probe.inputs) == (warmup, inputs)
    assert {0.01, 0.03, 0.1, 0.3, 1.0, 3.0} <= set(probe.lr_factors)
    assert probe.held_out_ratio == 0.1
    decay, end = (5e-4, 5e-6) if name == "sit" else (0.0, 0.0)
    assert (probe.weight_decay, probe.final_lr) == (decay, end)


def test_features_are_those_of_the_methods() -> None:
    features = {name: (one.knn, one.linear, one.also) for name, one in PROTOCOLS.items()}
    assert features == {
        "generic": ("class", "class", ()),
        "dino_small": ("class", "class_last4", ()),
        "dino": ("class", "class_mean_patch", ()),
        "moco_v3": ("class", "class", ()),
        "moby": ("class", "class", ()),
        "mae": ("class", "class", ()),
        "ijepa": ("mean_patch", "mean_patch_last4", ("mean_patch",)),
        "sit": ("class", "class_rotation", ()),
        "relvit": ("mean_patch", "mean_patch", ()),
    }


def test_a_network_without_the_tokens_of_a_method_gives_what_it_has(tmp_path: Path) -> None:
    resnet = open_encoder("untrained:test_resnet")
    assert (protocol_for(resnet, "dino").linear, protocol_for(resnet, "dino").knn) == ("pooled", "pooled")
    assert protocol_for(open_encoder("pixels")).linear == "pixels"
    config = tiny_config(args={**TINY, "depth": 2}, class_token=False)
    write_checkpoint(tmp_path / "run", config)
    found = protocol_for(open_encoder(tmp_path / "run"), "ijepa")
    assert (found.linear, found.also) == ("mean_patch", ())  # there are no four layers
    with pytest.raises(UserError, match=r"--protocol dno: did you mean 'dino'"):
        protocol_for(resnet, "dno")


def test_the_command_line_offers_what_there_is() -> None:
    """Its lists are its own, because it must start without importing torch."""
    assert FEATURE_CHOICES == FEATURES
    assert tuple(PROTOCOLS) == PROTOCOL_CHOICES
    assert tuple(RECIPES) == RECIPE_CHOICES
