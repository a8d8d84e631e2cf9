"""A classifier is the encoder with a head, and its layers learn as fast as the recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from run_folder import TINY, random_state, tiny_config, write_checkpoint
from timm.layers import DropPath, resample_abs_pos_embed
from timm.optim import param_groups_layer_decay

from pretrain.errors import UserError
from pretrain.evaluate.classifier import build_classifier, learning_groups
from pretrain.evaluate.encoder import Encoder, open_encoder
from pretrain.evaluate.recipes import recipe_with

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run_of(folder: Path, num_registers: int = 0, **changes: Any) -> Path:
    config = tiny_config(**changes)
    registers = tuple(f"task {number}" for number in range(num_registers))
    networks = {"student": random_state(config, num_registers)}
    write_checkpoint(folder, config, registers, networks=networks)
    return folder


def scales(encoder: Encoder, recipe: Any) -> dict[str, float]:
    groups = learning_groups(encoder.model, recipe)
    of_parameter = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(of_parameter) == sum(len(group["params"]) for group in groups)
    return {name: of_parameter[id(value)] for name, value in encoder.model.named_parameters()}


def test_the_learning_rate_decays_by_layer_down_to_the_embedding(tmp_path: Path) -> None:
    """Two blocks: d ** (L + 1 - i) with L = 2 is d^3 for the embedding, d^2, d, and 1 above the blocks."""
    recipe = recipe_with("mae", ["layer_decay=0.5", "pool=class"])
    encoder = build_classifier(open_encoder(run_of(tmp_path / "run", 2)), recipe, 3, seed=0)
    found = scales(encoder, recipe)
    for name in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert found[name] == 0.125
    assert {value for name, value in found.items() if name.startswith("blocks.0")} == {0.25}
    assert {value for name, value in found.items() if name.startswith("blocks.1")} == {0.5}
    assert {found[name] for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")} == {1.0}
    timms = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(encoder.model, layer_decay=0.5)
        for p in group["params"]
    }
    for name, parameter in encoder.model.named_parameters():
        if not name.startswith("norm."):  # timm counts it to the last block
            assert found[name] == timms[id(parameter)]


def test_removing_the_final_norm_moves_no_layer(tmp_path: Path) -> None:
    recipe = recipe_with("mae", ["layer_decay=0.5"])
    found = scales(build_classifier(open_encoder(run_of(tmp_path / "run")), recipe, 3, seed=0), recipe)
    assert (found["fc_norm.weight"], found["blocks.1.norm1.weight"], found["pos_embed"]) == (1.0, 0.5, 0.125)


def test_a_swin_decays_and_spares_as_timm_has_it() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=2,
        embed_dim=8,
        depths=(1, 2),
        num_heads=(1, 2),
    )
    recipe = recipe_with("mae", ["layer_decay=0.5"])
    expected = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
        )
        for p in group["params"]
    }
    found = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in learning_groups(model, recipe)
        for p in group["params"]
    }
    assert found == expected
    assert len({scale for scale, _ in found.values()}) > 3


def test_vectors_positions_and_prefix_tokens_are_not_decayed(tmp_path: Path) -> None:
    recipe = recipe_with("deit")
    encoder = build_classifier(open_encoder(run_of(tmp_path / "run", 1)), recipe, 3, seed=0)
    decayed = {
        id(p)
        for group in learning_groups(encoder.model, recipe)
        if group["weight_decay"]
        for p in group["params"]
    }
    names = {name for name, value in encoder.model.named_parameters() if id(value) in decayed}
    matrices = {name for name, value in encoder.model.named_parameters() if value.ndim > 1}
    assert names == matrices - {"pos_embed", "cls_token", "reg_token"}
    everything = recipe_with("relvit", ["weight_decay=0.1"])
    assert {group["weight_decay"] for group in learning_groups(encoder.model, everything)} == {0.1}


def test_the_head_reads_the_normed_class_token(tmp_path: Path) -> None:
    encoder = build_classifier(open_encoder(run_of(tmp_path / "run", 2)), recipe_with("relvit"), 3, seed=0)
    model: Any = encoder.model.eval()
    expected = model.head(model.forward_features(PIXELS)[:, 0])
    torch.testing.assert_close(model(PIXELS), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mae_norms_the_mean_of_the_patches_instead_of_the_tokens(tmp_path: Path) -> None:
    frozen = open_encoder(run_of(tmp_path / "run", 2))
    before: Any = frozen.model
    before.norm = torch.nn.Identity()
    patches = before.forward_features(PIXELS)[:, 3:]
    encoder = build_classifier(open_encoder(tmp_path / "run"), recipe_with("mae"), 3, seed=0)
    model: Any = encoder.model.eval()
    normed = torch.nn.functional.layer_norm(patches.mean(dim=1), (24,), eps=1e-6)  # fresh: scale 1, shift 0
    torch.testing.assert_close(model(PIXELS), model.head(normed))
    assert encoder.feature == "mean_patch"


def test_positions_are_added_where_asked_and_absent_only(tmp_path: Path) -> None:
    placeless, placed = run_of(tmp_path / "a", 1, pos_embed="none"), run_of(tmp_path / "b")
    kept = build_classifier(open_encoder(placeless), recipe_with("deit"), 3, seed=0)
    assert kept.model.pos_embed is None
    added: Any = build_classifier(open_encoder(placeless), recipe_with("relvit"), 3, seed=0).model
    assert added.pos_embed.shape == (1, 1 + 1 + 16, 24)
    assert 0.015 < added.pos_embed.std() < 0.025
    shuffled = PIXELS.roll(8, dims=3)
    assert not torch.allclose(added.eval()(PIXELS), added(shuffled))
    before: Any = open_encoder(placed).model.pos_embed
    after: Any = build_classifier(open_encoder(placed), recipe_with("relvit"), 3, seed=0).model.pos_embed
    assert torch.equal(before, after)


def test_another_image_size_resamples_the_positions_of_the_patches(tmp_path: Path) -> None:
    frozen: Any = open_encoder(run_of(tmp_path / "run"))
    before = frozen.model.pos_embed.clone()
    encoder = build_classifier(frozen, recipe_with("deit"), 3, seed=0, image_px=64)
    after: Any = encoder.model.pos_embed
    expected = resample_abs_pos_embed(before, new_size=[8, 8], old_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(after, expected)
    assert torch.equal(after[:, 0], before[:, 0])
    assert encoder.crop.size_px == 64
    assert encoder.model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(UserError, match="whole patches of 8 px"):
        build_classifier(open_encoder(tmp_path / "run"), recipe_with("deit"), 3, seed=0, image_px=60)


def test_drop_path_rises_linearly_over_the_blocks(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", args=TINY | {"depth": 3}, drop_path_ratio=0.4)
    model: Any = build_classifier(open_encoder(run), recipe_with("deit"), 3, seed=0).model
    rates = [
        [getattr(module, "drop_prob", 0.0) for module in (block.drop_path1, block.drop_path2)]
        for block in model.blocks
    ]
    assert rates == [[0, 0], pytest.approx([0.05, 0.05]), pytest.approx([0.1, 0.1])]
    plain = build_classifier(open_encoder(run), recipe_with("relvit"), 3, seed=0).model
    assert not any(isinstance(module, DropPath) for module in plain.modules())


def test_new_weights_follow_the_seed_and_leave_the_random_state(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", pos_embed="none")
    state = torch.get_rng_state()

    def fresh(seed: int, weights: str = f"untrained:{run}") -> dict[str, torch.Tensor]:
        encoder = open_encoder(weights, seed=seed)
        return build_classifier(encoder, recipe_with("relvit"), 3, seed).model.state_dict()

    first, again, other = fresh(1), fresh(1), fresh(2)
    for name, value in first.items():
        assert torch.equal(value, again[name])
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed", "head.weight"):
        assert not torch.equal(first[name], other[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_class_token_that_is_not_there_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", class_token=False)
    with pytest.raises(UserError, match=r"--pool class: .*use 'mean_patch'"):
        build_classifier(open_encoder(run), recipe_with("deit"), 3, seed=0)
    encoder = build_classifier(open_encoder(run), recipe_with("deit", ["pool=mean_patch"]), 3, seed=0)
    assert encoder.model(PIXELS).shape == (2, 3)
    with pytest.raises(UserError, match="no network"):
        build_classifier(open_encoder("pixels"), recipe_with("deit"), 3, seed=0)
