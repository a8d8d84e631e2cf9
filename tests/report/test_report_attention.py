"""Attention: weights taken again from a block's parts are those with which it computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig, create_backbone, encode, layout_of
from pretrain.report.attention import (
    attend,
    attention_weights,
    evenness,
    last_attention,
    mass_mask,
    queries_of,
)
from pretrain.report.attention_maps import TokenAttention, likeness, masked
from pretrain.tokens import TokenLayout

TINY: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3}


def config(**changes: Any) -> BackboneConfig:
    fields: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_px": 32, "patch_px": 8, "args": TINY}
    return BackboneConfig(**{**fields, **changes})


def random_model(settings: BackboneConfig, num_registers: int = 0) -> nn.Module:
    """Every tensor random and not small: attention is far from even."""
    torch.manual_seed(0)
    model = create_backbone(settings, num_registers).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def manual_weights(model: nn.Module, images: Tensor) -> Tensor:
    """The last block's softmax as timm's own unfused path computes it, caught at its dropout."""
    attention = model.blocks[-1].attn
    attention.fused_attn = False
    caught: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda _, given, made: caught.append(given[0]))
    model.forward_features(images)
    hook.remove()
    attention.fused_attn = True
    return caught[-1]


@pytest.mark.parametrize(
    ("changes", "registers"),
    [
        ({}, ()),
        ({}, ("rotation", "clustering")),
        ({"class_token": False}, ()),
        ({"class_token": False, "pos_embed": "sincos"}, ("rotation",)),
        ({"args": {**TINY, "qk_norm": True}}, ()),
        ({"args": {**TINY, "qkv_bias": False, "init_values": 1e-1}}, ("rotation",)),
        ({"name": "t2t_vit_14", "img_px": 64, "patch_px": 16}, ()),
    ],
)
@torch.no_grad()
def test_the_weights_are_those_of_the_fused_attention(
    changes: dict[str, Any], registers: tuple[str, ...]
) -> None:
    settings = config(**changes)
    model, layout = random_model(settings, len(registers)), layout_of(settings, registers)
    images = torch.randn(2, 3, settings.img_px, settings.img_px)
    assert model.blocks[-1].attn.fused_attn, "this is what hides the weights"
    weights, why = last_attention(model, images, layout)
    assert weights is not None, why
    assert weights.shape == (2, 3, layout.num_tokens, layout.num_tokens)
    torch.testing.assert_close(weights, manual_weights(model, images))
    assert float(weights.max()) > 2 / layout.num_tokens, "attention that is even would hide mistakes"
    # and they give the very output of the block's attention
    caught: list[tuple[Tensor, Tensor]] = []
    attention = model.blocks[-1].attn
    hook = attention.register_forward_hook(lambda _, given, made: caught.append((given[0], made)))
    encode(model, images, layout)
    hook.remove()
    tokens, made = caught[-1]
    torch.testing.assert_close(attend(attention, tokens, weights), made, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_of_another_kind_is_refused_rather_than_drawn_wrongly() -> None:
    class Sharper(nn.Module):
        """Looks like timm's attention from outside, but attends with another temperature."""

        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            for name in ("qkv", "q_norm", "k_norm", "proj"):
                setattr(self, name, getattr(own, name))
            self.scale, self.num_heads = own.scale, own.num_heads

        def forward(self, tokens: Tensor, **_: Any) -> Tensor:
            self.scale *= 3
            made = attend(self, tokens, attention_weights(self, tokens))
            self.scale /= 3
            return made

    settings = config()
    model = random_model(settings)
    model.blocks[-1].attn = Sharper(model.blocks[-1].attn)
    weights, why = last_attention(model, torch.randn(1, 3, 32, 32), layout_of(settings, ()))
    assert weights is None
    assert "cannot be taken again" in why


def test_a_swin_has_no_map_of_the_whole_image() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 6)
    )
    weights, why = last_attention(swin, torch.randn(1, 3, 64, 64), TokenLayout((2, 2), (), False))
    assert weights is None
    assert "windows" in why


def test_each_token_is_asked_by_its_own_row() -> None:
    """Weights that name their query and key: 100 * query + key."""
    layout = TokenLayout((2, 3), ("rotation", "clustering"))
    count = layout.num_tokens
    index = torch.arange(count).float()
    weights = (100 * index[:, None] + index).expand(1, 2, count, count)
    found = queries_of(weights, layout, ("class", "rotation", "clustering"))
    patches = torch.arange(3, 9).float()
    assert list(found) == ["class", "rotation", "clustering"]
    for place, name in enumerate(found):
        assert torch.equal(found[name][0, 1], 100 * place + patches)
    assert list(queries_of(weights, layout, ("rotation",))) == ["rotation"]


def test_without_a_token_that_is_read_it_is_the_mean_over_the_patches() -> None:
    layout = TokenLayout((2, 2), (), has_class_token=True)
    weights = torch.rand(2, 3, 5, 5)
    ((name, mean),) = queries_of(weights, layout, ()).items()
    assert name == "mean patch"
    wanted = sum(weights[:, :, query, 1:] for query in (1, 2, 3, 4)) / 4
    torch.testing.assert_close(mean, wanted)


def test_the_mass_is_the_fewest_patches_that_hold_it() -> None:
    weights = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    assert mass_mask(weights, 0.6).tolist() == [False, True, False, True, False]
    assert mass_mask(weights, 0.66).tolist() == [False, True, False, True, True]
    assert mass_mask(weights * 7, 0.6).tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]  # of what the patches get
    torch.manual_seed(0)
    for row in torch.rand(20, 30):
        mask = mass_mask(row, 0.6)
        kept = row[mask]
        assert kept.sum() >= 0.6 * row.sum()
        assert kept.sum() - kept.min() < 0.6 * row.sum()
        assert kept.min() >= row[~mask].max()


def test_evenness_runs_from_one_patch_to_all() -> None:
    assert evenness(torch.full((2, 16), 1 / 16)) == pytest.approx(1.0, abs=1e-6)
    one = torch.zeros(2, 16)
    one[:, 3] = 0.9
    assert evenness(one) == pytest.approx(0.0, abs=1e-6)
    half = torch.zeros(1, 16)
    half[0, :4] = 0.25
    assert evenness(half) == pytest.approx(0.5, abs=1e-6)


def of_maps(*heads: list[float]) -> TokenAttention:
    maps = np.array(heads, np.float32).reshape(len(heads), 2, 2)
    return TokenAttention("class", maps, 1.0, 1.0, np.ones((2, 2), bool))


def test_tokens_are_compared_by_the_mean_of_their_heads() -> None:
    one, other = of_maps([1, 2, 3, 4], [3, 2, 1, 4]), of_maps([2, 2, 2, 5])
    assert (
        likeness(one, other)
        == pytest.approx(np.corrcoef([2, 2, 2, 4], [2, 2, 2, 5])[0, 1])
        == pytest.approx(1)
    )
    assert likeness(one, of_maps([4, 3, 2, 1])) < 0
    assert likeness(one, of_maps([1, 1, 1, 1])) == 0.0  # nothing to compare, and no warning


def test_the_mask_dims_all_other_patches() -> None:
    image = np.full((6, 4, 3), 200, np.uint8)
    shown = masked(image, np.array([[True, False], [False, False], [False, True]]))
    assert (shown[:2, :2] == 200).all()
    assert (shown[4:, 2:] == 200).all()
    assert (shown[:2, 2:] == 44).all()
    assert (shown[2:4] == 44).all()
