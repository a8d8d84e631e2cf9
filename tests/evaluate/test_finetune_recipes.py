"""Recipes hold the published numbers, and a user changes them by name."""

from __future__ import annotations

import math

import pytest

from pretrain.errors import ConfigError
from pretrain.evaluate.recipes import RECIPES, recipe_with


def test_the_learning_rate_scales_with_the_batch_as_each_paper_says() -> None:
    assert RECIPES["deit"].lr(1024) == pytest.approx(5e-4 * 1024 / 512)
    assert RECIPES["mae"].lr(1024) == pytest.approx(5e-4 * 1024 / 256)
    assert RECIPES["relvit"].lr(64) == RECIPES["relvit"].lr(256) == 5e-4


@pytest.mark.parametrize("name", ["deit", "mae"])
def test_deit_and_mae_share_their_regularisation(name: str) -> None:
    recipe = RECIPES[name]  # type: ignore[index]
    assert (recipe.mixup_alpha, recipe.cutmix_alpha, recipe.label_smoothing_ratio) == (0.8, 1.0, 0.1)
    assert (recipe.erase_ratio, recipe.drop_path_ratio, recipe.weight_decay) == (0.25, 0.1, 0.05)
    assert (recipe.betas, recipe.warmup_epochs, recipe.clip_norm) == ((0.9, 0.999), 5, 0)
    assert recipe.rand_augment == "rand-m9-mstd0.5-inc1"


def test_relvit_regularises_nothing_and_clips() -> None:
    recipe = RECIPES["relvit"]
    assert (recipe.weight_decay, recipe.drop_path_ratio, recipe.label_smoothing_ratio) == (0, 0, 0)
    assert (recipe.mixup_alpha, recipe.cutmix_alpha, recipe.erase_ratio) == (0, 0, 0)
    assert (recipe.batch_size, recipe.clip_norm, recipe.pool, recipe.pos_embed) == (256, 1.0, "class", "add")
    assert recipe.crops_padded(64)
    assert not recipe.crops_padded(65)


def test_relvit_warms_up_for_a_tenth_and_ends_a_quarter_cosine() -> None:
    """Of 100 epochs of 196 steps: the peak after 1960, 0.707 of it half way, 1.25e-6 in the end."""
    lr = RECIPES["relvit"].lr_schedule(256, 196)
    assert lr(0) == 0
    assert lr(980) == pytest.approx(2.5e-4)
    assert lr(1960) == pytest.approx(5e-4 * math.cos(0.05 * math.pi), rel=1e-3)
    assert lr(9800) == pytest.approx(5e-4 / math.sqrt(2), rel=2e-3)
    assert lr(19600) == pytest.approx(1.25e-6)


def test_deit_warms_up_for_five_epochs_then_follows_half_a_cosine() -> None:
    lr = RECIPES["deit"].lr_schedule(512, 10)
    assert lr(0) == 1e-6
    assert lr(50) == 5e-4
    assert lr(525) == pytest.approx((5e-4 + 1e-5) / 2)
    assert lr(1000) == pytest.approx(1e-5)


def test_settings_are_replaced_by_name() -> None:
    recipe = recipe_with("mae", ["base_lr=1e-3", "betas=[0.9,0.95]", "rand_augment=null", "pool=class"])
    assert (recipe.base_lr, recipe.betas, recipe.rand_augment, recipe.pool) == (
        1e-3,
        (0.9, 0.95),
        None,
        "class",
    )
    assert recipe.layer_decay == RECIPES["mae"].layer_decay


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("layer_deccay=0.65", "did you mean 'layer_decay'"),
        ("weight_decay", "reads key=value"),
        ("weight_decay=-1", "weight_decay: .*greater than or equal to 0"),
        ("num_epochs=many", "num_epochs: .*got 'many'"),
        ("drop_path_ratio=1", "drop_path_ratio"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        recipe_with("deit", [override])
    assert "\n" not in str(error.value)


def test_a_warm_up_that_fills_the_run_is_told_with_the_remedy() -> None:
    recipe = recipe_with("deit", ["num_epochs=5"])
    with pytest.raises(ConfigError, match=r"warmup_epochs=0\.5"):
        recipe.lr_schedule(512, 10)
