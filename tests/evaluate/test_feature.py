"""A feature is made of the tokens that its name says, and is refused where a network has none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from run_folder import MEAN, STD, TINY, random_state, tiny_config, write_checkpoint
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluate.encoder import open_encoder
from pretrain.evaluate.feature import FEATURES, FeatureName, columns_in, problem_of
from pretrain.export.timm_folder import export_timm
from pretrain.tokens import TokenLayout

IMAGES = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
FIVE = tiny_config(args={**TINY, "depth": 5})
REGISTERS = ("jigsaw", "rotation")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks, two registers; beside it its export."""
    folder = tmp_path_factory.mktemp("weights")
    networks = {"student": random_state(FIVE, 2)}
    write_checkpoint(folder / "run", FIVE, REGISTERS, networks=networks)
    export_timm(folder / "run", folder / "export")
    return folder / "run"


@pytest.fixture(scope="module")
def after_blocks(run: Path) -> list[Tensor]:
    """The tokens after every block, each after the final norm: (3, 1 + 2 + 16, 24)"""
    model: Any = timm.create_model(f"local-dir:{run.parent / 'export'}", pretrained=True).eval()
    found: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: found.append(model.norm(output)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        model.forward_features((IMAGES / 255 - mean) / std)
    return found


def expected(feature: str, tokens: list[Tensor]) -> Tensor:
    last = tokens[-1]
    return {
        "class": last[:, 0],
        "mean_patch": last[:, 3:].mean(dim=1),
        "tokens": last[:, :3].flatten(1),
        "class_last4": torch.cat([one[:, 0] for one in tokens[1:]], dim=1),
        "mean_patch_last4": torch.cat([one[:, 3:].mean(dim=1) for one in tokens[1:]], dim=1),
        "class_mean_patch": torch.cat([last[:, 0], last[:, 3:].mean(dim=1)], dim=1),
        "class_rotation": torch.cat([last[:, 0], last[:, 2]], dim=1),  # the second register
        "pooled": last[:, 0],
    }[feature]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_what_its_name_says_of_a_run_and_of_its_export(
    feature: FeatureName, run: Path, after_blocks: list[Tensor]
) -> None:
    for weights in (run, run.parent / "export"):
        encoder = open_encoder(weights, feature)
        found = encoder.encode(IMAGES)
        torch.testing.assert_close(found, expected(feature, after_blocks), rtol=0, atol=1e-5)
        assert encoder.num_features == found.shape[1]


@pytest.mark.parametrize("weights", ["run", "export"])
def test_several_features_of_one_forward_pass_are_those_of_a_pass_each(run: Path, weights: str) -> None:
    names: tuple[FeatureName, ...] = ("pooled", "class_last4", "tokens", "mean_patch", "class")
    encoder = open_encoder(run.parent / weights).reading_all(names)
    together = encoder.encode(IMAGES)
    alone = [encoder.reading(name).encode(IMAGES) for name in names]
    for name, one in zip(names, alone, strict=True):
        assert torch.equal(together[:, encoder.columns(name)], one), name
    assert together.shape[1] == sum(one.shape[1] for one in alone)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("class_last4", "class"),
        ("mean_patch_last4", "mean_patch"),
        ("class_mean_patch", "class"),
        ("class_mean_patch", "mean_patch"),
        ("class_rotation", "class"),
        ("tokens", "tokens"),
    ],
)
def test_what_is_stored_of_a_long_feature_holds_a_shorter_one(
    stored: FeatureName, wanted: FeatureName, run: Path
) -> None:
    long, short = (open_encoder(run, feature).encode(IMAGES) for feature in (stored, wanted))
    columns = columns_in(stored, wanted, width=24)
    assert columns is not None
    torch.testing.assert_close(long[:, columns], short, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "wanted"), [("class", "class_last4"), ("class_last4", "mean_patch"), ("pooled", "class")]
)
def test_what_is_not_stored_is_not_found(stored: str, wanted: str) -> None:
    assert columns_in(stored, wanted, width=24) is None


PATCHES_ONLY = TokenLayout((2, 2), has_class_token=False)


@pytest.mark.parametrize(
    ("feature", "layout", "told"),
    [
        ("clas", TokenLayout((2, 2)), "did you mean 'class'"),
        ("class", None, "use 'pooled'"),
        ("class", PATCHES_ONLY, "use 'mean_patch'"),
        ("class_mean_patch", PATCHES_ONLY, "use 'mean_patch'"),
        ("tokens", PATCHES_ONLY, "use 'mean_patch'"),
        ("class_rotation", TokenLayout((2, 2), ("jigsaw",)), "no token of the rotation task; use 'class'"),
        ("class_last4", TokenLayout((2, 2)), "has 3 blocks only; use 'class'"),
        ("mean_patch_last4", PATCHES_ONLY, "has 3 blocks only; use 'mean_patch'"),
    ],
)
def test_a_feature_that_a_network_lacks_is_told_with_the_remedy(
    feature: str, layout: TokenLayout | None, told: str
) -> None:
    problem = problem_of(feature, layout, num_blocks=3)
    assert problem is not None
    assert told in problem


def test_patches_without_any_prefix_have_their_last_four_layers_as_well(tmp_path: Path) -> None:
    config = tiny_config(args={**TINY, "depth": 4}, class_token=False)
    write_checkpoint(tmp_path / "run", config)
    four = open_encoder(tmp_path / "run", "mean_patch_last4").encode(IMAGES)
    last = open_encoder(tmp_path / "run", "mean_patch").encode(IMAGES)
    torch.testing.assert_close(four[:, -24:], last, rtol=0, atol=1e-6)
    assert four.shape == (3, 4 * 24)
    with pytest.raises(UserError, match="--feature class_last4: this model has no class token"):
        open_encoder(tmp_path / "run", "class_last4")
