from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import _registry
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.models import t2t
from pretrain.models.backbone import encode
from pretrain.models.initial import fix_positions, initialize
from pretrain.models.positions import sincos_positions, sinusoid_positions
from pretrain.models.t2t import (
    TokenPerformer,
    TokensToToken,
    orthogonal_directions,
    random_feature_attention,
    register_t2t,
)
from pretrain.tokens import TokenLayout

SMALL: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
NO_CLASS: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def build(**args: Any) -> VisionTransformer:
    register_t2t()
    torch.manual_seed(0)
    return timm.create_model("t2t_vit_14", num_classes=0, **args)


# --- attention by random features


def inputs(num_tokens: int = 6, dim: int = 4, scale: float = 0.7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = torch.randn(3, 2, num_tokens, dim, generator=generator, dtype=torch.float64)
    return [queries * scale, keys * scale, values]


def test_random_feature_attention_equals_its_formula_written_as_loops() -> None:
    queries, keys, values = inputs()
    directions = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def features(x: Tensor) -> Tensor:
        return torch.stack([(w @ x - x @ x / 2).exp() for w in directions]) / math.sqrt(3)

    found = random_feature_attention(queries, keys, values, directions)
    for image in range(2):
        for i in range(6):
            weights = torch.stack([features(queries[image, i]) @ features(key) for key in keys[image]])
            expected = weights @ values[image] / weights.sum()
            torch.testing.assert_close(found[image, i], expected, rtol=1e-6, atol=1e-6)


def test_many_random_features_give_softmax_attention() -> None:
    """Performer, lemma 1: the estimate is unbiased, so its error vanishes with their number."""
    queries, keys, values = inputs(scale=0.3)
    directions = torch.randn(200_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    softmax = (queries @ keys.mT).softmax(dim=2)
    error = (random_feature_attention(queries, keys, values, directions) - softmax @ values).abs().max()
    from_uniform = (values.mean(dim=1, keepdim=True) - softmax @ values).abs().max()
    assert error < 0.01 < 0.1 < from_uniform


def test_large_inputs_and_half_precision_stay_finite() -> None:
    """|q|^2 / 2 is up to 2e5 here, and 16 bits cannot hold exp of much less."""
    queries, keys, values = (x.bfloat16() * 300 for x in inputs())
    queries.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        found = random_feature_attention(queries, keys, values, orthogonal_directions(3, 4))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    found.sum().backward()
    assert queries.grad is not None
    assert queries.grad.isfinite().all()


def test_weights_sum_to_one_where_exp_would_vanish() -> None:
    """|q|^2 / 2 and |k|^2 / 2 above 100, where exp(-|q|^2 / 2) is 0 in float32."""
    directions = orthogonal_directions(2, 4)
    ones = torch.ones(2, 6, 1)
    for long, short in ((0, 1), (1, 0)):
        pair = [x.float() for x in inputs(scale=0.1)[:2]]
        pair[long] = pair[long] + 20.0
        pair[short] = pair[short] * 0.1
        found = random_feature_attention(pair[0], pair[1], ones, directions)
        torch.testing.assert_close(found, ones, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num", "dim"), [(32, 64), (64, 64), (10, 4)])
def test_directions_are_orthogonal_in_groups_and_of_length_sqrt_dim(num: int, dim: int) -> None:
    torch.manual_seed(0)
    directions = orthogonal_directions(num, dim)
    assert directions.shape == (num, dim)
    for group in directions.split(dim):
        torch.testing.assert_close(group @ group.T, dim * torch.eye(len(group)), rtol=0, atol=1e-4)


# --- the patch embedding


def seen_by(module: torch.nn.Module) -> list[Tensor]:
    """What a module is given from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    return seen


def test_the_soft_splits_are_overlapping_windows_row_by_row() -> None:
    """7 x 7 px every 4 px from -2 on, then 3 x 3 tokens every 2 tokens from -1 on."""
    embed = TokensToToken(img_size=(32, 64), embed_dim=24)
    first, second, last = seen_by(embed.first), seen_by(embed.second), seen_by(embed.project)
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        tokens = embed(images)
        narrow = embed.first(first[0]), embed.second(second[0])
    assert tokens.shape == (2, 2 * 4, 24)
    assert (embed.grid_size, embed.num_patches) == ((2, 4), 8)
    padded = F.pad(images, (2, 2, 2, 2))
    assert first[0].shape == (2, 8 * 16, 147)
    window = padded[1, :, 4 * 3 : 4 * 3 + 7, 4 * 5 : 4 * 5 + 7]  # row 3, column 5
    assert torch.equal(first[0][1, 3 * 16 + 5], window.flatten())
    for stage, (given, before, columns) in enumerate(((second, narrow[0], 16), (last, narrow[1], 8))):
        grid = F.pad(before.mT.unflatten(2, (-1, columns)), (1, 1, 1, 1))  # (2, 64, rows + 2, columns + 2)
        assert given[0].shape == (2, 8 * 16 // 4 ** (stage + 1), 64 * 9)
        window = grid[1, :, 2 * 1 : 2 * 1 + 3, 2 * 2 : 2 * 2 + 3]  # row 1, column 2
        assert torch.equal(given[0][1, 1 * columns // 2 + 2], window.flatten())


def test_a_token_layer_carries_the_values_past_the_attention() -> None:
    torch.manual_seed(0)
    layer = TokenPerformer(10, 4, 2)
    tokens = torch.randn(2, 5, 10)
    q, k, v = layer.qkv(layer.norm1(tokens)).split(4, dim=2)
    expected = v + layer.proj(random_feature_attention(q, k, v, layer.directions))
    expected = expected + layer.mlp(layer.norm2(expected))
    torch.testing.assert_close(layer(tokens), expected)
    with torch.no_grad():
        layer.proj.weight.zero_()
        layer.proj.bias.zero_()
        layer.mlp[2].weight.zero_()
        layer.mlp[2].bias.zero_()
    torch.testing.assert_close(layer(tokens), v)


# --- the model


def test_the_parameters_are_those_of_the_paper() -> None:
    """21.5 M with the classifier for ImageNet (table 1 of the paper); and exactly, counted by hand."""
    register_t2t()
    with torch.random.fork_rng():
        vit = timm.create_model("t2t_vit_14")
    count = sum(parameter.numel() for parameter in vit.parameters())
    assert count == pytest.approx(21.5e6, rel=0.02)
    block = 384 * 1152 + (384 * 384 + 384) + (384 * 1152 + 1152) + (1152 * 384 + 384) + 4 * 384
    first = 2 * 147 + (147 * 192 + 192) + 3 * (64 * 64 + 64) + 2 * 64
    second = 2 * 576 + (576 * 192 + 192) + 3 * (64 * 64 + 64) + 2 * 64
    rest = (576 * 384 + 384) + 197 * 384 + 384 + 2 * 384 + (384 * 1000 + 1000)
    assert count == 14 * block + first + second + rest
    assert (len(vit.blocks), vit.embed_dim, vit.blocks[0].attn.num_heads) == (14, 384, 6)
    assert vit.blocks[0].attn.qkv.bias is None
    assert vit.patch_embed.first.directions.shape == (32, 64)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15)


VARIANTS: dict[str, tuple[dict[str, Any], TokenLayout]] = {
    "class token": (SMALL, TokenLayout((2, 2))),
    "registers": (SMALL | {"reg_tokens": 2}, TokenLayout((2, 2), ("a", "b"))),
    "no class token": (SMALL | NO_CLASS, TokenLayout((2, 2), (), False)),
    "no class token, registers": (
        SMALL | NO_CLASS | {"reg_tokens": 1},
        TokenLayout((2, 2), ("a",), False),
    ),
    "positions of patches only": (SMALL | {"no_embed_class": True}, TokenLayout((2, 2))),
    "no positions": (SMALL | {"pos_embed": "none"}, TokenLayout((2, 2))),
    "224 px": (SMALL | {"img_size": 224, "depth": 1, "reg_tokens": 1}, TokenLayout((14, 14), ("a",))),
    "two columns more": (SMALL | {"img_size": (32, 64)}, TokenLayout((2, 4))),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_encoding_equals_timms(variant: str) -> None:
    args, layout = VARIANTS[variant]
    vit = build(**args).eval()
    assert isinstance(vit, VisionTransformer)
    assert vit.num_prefix_tokens == layout.num_prefix
    assert vit.patch_embed.grid_size == layout.grid
    assert vit.patch_embed.num_patches == layout.num_patches
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    with torch.no_grad():
        assert vit.patch_embed(images).shape == (2, layout.num_patches, 24)
        expected = vit.forward_features(images)
        found = encode(vit, images, layout).final
    assert found.shape == (2, layout.num_tokens, 24)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "num_before", "class_row"),
    [
        ({}, 1, 0),
        ({"reg_tokens": 2}, 3, 0),
        (NO_CLASS | {"reg_tokens": 2}, 2, None),
        ({"no_embed_class": True}, 0, None),
    ],
)
def test_positions_are_a_fixed_sinusoid_over_class_token_and_patches(
    args: dict[str, Any], num_before: int, class_row: int | None
) -> None:
    vit = build(**SMALL | args)
    table = sinusoid_positions(24, 5)
    assert not vit.pos_embed.requires_grad
    assert vit.pos_embed.shape == (1, num_before + 4, 24)
    assert torch.equal(vit.pos_embed[0, num_before:], table[1:])
    for row in range(num_before):
        expected = table[0] if row == class_row else torch.zeros(24)
        assert torch.equal(vit.pos_embed[0, row], expected)


def test_every_parameter_but_the_positions_learns() -> None:
    vit = build(**SMALL, reg_tokens=1, drop_path_rate=0.3).train()
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    (vit.forward_features(torch.randn(2, 3, 32, 32)) * torch.randn(2, 6, 24)).sum().backward()
    silent = [name for name, p in vit.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == ["pos_embed"]


def test_the_random_directions_travel_with_the_weights_and_differ_between_layers_and_seeds() -> None:
    vit = build(**SMALL)
    state = vit.state_dict()
    names = [name for name in state if name.endswith("directions")]
    assert names == ["patch_embed.first.directions", "patch_embed.second.directions"]
    assert not torch.equal(*(state[name] for name in names))
    torch.manual_seed(5)
    other = timm.create_model("t2t_vit_14", num_classes=0, **SMALL)
    assert not torch.equal(other.patch_embed.first.directions, vit.patch_embed.first.directions)
    images = torch.randn(1, 3, 32, 32)
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other.eval().forward_features(images), vit.eval().forward_features(images))


def test_an_export_is_opened_again_by_timm(tmp_path: Path) -> None:
    vit = build(**SMALL, reg_tokens=1).eval()
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "t2t_vit_14",
        "num_classes": 0,
        "model_args": {**SMALL, "patch_size": 16, "reg_tokens": 1},
        "pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True, "num_classes": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(9)
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(opened.forward_features(images), vit.forward_features(images))
    assert not opened.pos_embed.requires_grad


def test_registering_is_asked_for_and_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing registers nothing; timm would warn of a second registration, and warnings are errors here."""
    known = {name: entry for name, entry in _registry._model_entrypoints.items() if name != "t2t_vit_14"}
    monkeypatch.setattr(_registry, "_model_entrypoints", known)
    spec = importlib.util.spec_from_file_location("fresh_t2t", t2t.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert not timm.is_model("t2t_vit_14")
    register_t2t()
    register_t2t()
    assert timm.is_model("t2t_vit_14")
    assert "t2t_vit_14" in timm.list_models("t2t*")


def test_fixed_grid_positions_and_initial_weights_of_other_methods_apply() -> None:
    vit = build(**SMALL)
    fix_positions(vit, "moco")
    assert torch.equal(vit.pos_embed[0, 1:], sincos_positions(24, (2, 2), "moco"))
    initialize(vit, "moco")
    layer = vit.patch_embed.second.qkv  # 576 -> 64, three times
    assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (576 + 64)), rel=0.01)


def test_another_size_is_set_in_timms_way() -> None:
    vit = build(**SMALL).eval()
    vit.set_input_size(img_size=(48, 64))
    assert vit.patch_embed.grid_size == (3, 4)
    assert not vit.pos_embed.requires_grad
    assert vit.forward_features(torch.randn(1, 3, 48, 64)).shape == (1, 13, 24)
    with pytest.raises(ConfigError, match=r"16 px patches, not \(8, 8\)"):
        vit.set_input_size(patch_size=(8, 8))
    with torch.no_grad():
        features = vit.forward_intermediates(torch.randn(1, 3, 48, 64), indices=1, intermediates_only=True)
    assert features[0].shape == (1, 24, 3, 4)


def test_images_of_another_size_are_refused_unless_allowed() -> None:
    embed = TokensToToken(img_size=32, embed_dim=24)
    with pytest.raises(ValueError, match=r"48 x 32 px for a model of \(32, 32\)"):
        embed(torch.zeros(1, 3, 48, 32))
    embed.strict_img_size = False
    assert embed(torch.zeros(1, 3, 48, 32)).shape == (1, 6, 24)
    with pytest.raises(ValueError, match="not whole 16 px patches"):
        embed(torch.zeros(1, 3, 40, 32))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"patch_size": 8}, ConfigError, r"^model\.patch_px: .* 16 px patches, not 8; use 16$"),
        ({"img_size": 40}, ConfigError, r"^model\.img_px: 40 x 40 px .*; use multiples of 16$"),
        ({"dynamic_img_pad": True}, ConfigError, r"^model\.args\.dynamic_img_pad: "),
        ({"dynamic_img_size": True}, TypeError, "output_fmt"),  # told by create_backbone in one line
        ({"patch_sise": 16}, TypeError, "patch_sise"),
    ],
)
def test_what_the_architecture_cannot_be_is_refused(
    args: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(**SMALL | args)
    assert build(**SMALL, patch_size=16).patch_embed.patch_size == (16, 16)
