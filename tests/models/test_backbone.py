from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.models.backbone import (
    BackboneConfig,
    Level,
    TokenFill,
    accept_any_size,
    create_backbone,
    encode,
    layout_of,
    levels_of,
    model_args,
    num_features,
)
from pretrain.tokens import TokenLayout

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 24, "num_heads": 2}
SWIN_NAME: dict[str, Any] = {"name": "swin_tiny_patch4_window7_224", "img_px": 64, "args": {}}
BASE = BackboneConfig(name="vit_tiny_patch16_224", img_px=16, patch_px=4, args=SMALL)
NO_CLASS = BASE.model_copy(update={"class_token": False})
REGISTERS = ("rotation", "clustering")


def build(config: BackboneConfig, registers: tuple[str, ...]) -> tuple[VisionTransformer, TokenLayout]:
    """In evaluation mode, with no weight at zero, so that nothing is equal by chance."""
    torch.manual_seed(0)
    vit = create_backbone(config, len(registers)).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return vit, layout_of(config, registers)


def images_for(config: BackboneConfig, count: int = 2) -> Tensor:
    return torch.randn(count, 3, config.img_px, config.img_px, generator=torch.Generator().manual_seed(1))


def marked(layout: TokenLayout, *rows: list[int]) -> Tensor:
    mask = torch.zeros(len(rows), layout.num_patches, dtype=torch.bool)
    for row, patches in enumerate(rows):
        mask[row, patches] = True
    return mask


VARIANTS = {
    "class and registers": (BASE, REGISTERS),
    "class only": (BASE, ()),
    "no class token": (NO_CLASS, REGISTERS),
    "no prefix at all": (NO_CLASS, ()),
    "no positions": (BASE.model_copy(update={"pos_embed": "none"}), REGISTERS),
    "no class token, no positions": (NO_CLASS.model_copy(update={"pos_embed": "none"}), ()),
    "positions of patches only": (
        BASE.model_copy(update={"args": {**SMALL, "no_embed_class": True}}),
        REGISTERS,
    ),
    "norm before": (BASE.model_copy(update={"args": {**SMALL, "pre_norm": True}}), REGISTERS),
    "layer scale and norms of q and k": (
        BASE.model_copy(update={"args": {**SMALL, "init_values": 0.1, "qk_norm": True}}),
        REGISTERS,
    ),
    "6 x 6 patches of 4": (BASE.model_copy(update={"img_px": 24}), REGISTERS),
    "3 x 3 patches of 7": (BASE.model_copy(update={"img_px": 21, "patch_px": 7}), REGISTERS),
    "5 x 5 patches of 6": (BASE.model_copy(update={"img_px": 30, "patch_px": 6}), ()),
    "one patch": (BASE.model_copy(update={"patch_px": 16}), REGISTERS),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_fills_the_tokens_are_those_of_stock_timm(variant: str) -> None:
    config, registers = VARIANTS[variant]
    vit, layout = build(config, registers)
    images = images_for(config)
    with torch.no_grad():
        expected, found = vit.forward_features(images), encode(vit, images, layout)
        nothing = torch.zeros(len(images), layout.num_patches, dtype=torch.bool)
        vector = torch.randn(1, 1, vit.embed_dim)
        unfilled = encode(vit, images, layout, TokenFill(nothing, vector, nothing, vector))
    assert found.final.shape == (2, layout.num_tokens, vit.embed_dim)
    assert found.taps == {}
    torch.testing.assert_close(found.final, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(unfilled.final, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_timm_with_the_exported_arguments_loads_the_weights_and_gives_the_same(variant: str) -> None:
    import timm

    config, registers = VARIANTS[variant]
    vit, layout = build(config, registers)
    stock = timm.create_model(
        config.name, pretrained=False, num_classes=0, **model_args(config, len(registers))
    )
    stock.load_state_dict(vit.state_dict())
    images = images_for(config)
    with torch.no_grad():
        torch.testing.assert_close(
            encode(vit, images, layout).final, stock.eval().forward_features(images), rtol=1e-6, atol=1e-6
        )


def test_taps_are_the_outputs_of_the_blocks_asked_for_before_the_final_norm() -> None:
    vit, layout = build(BASE, REGISTERS)
    outputs: list[Tensor] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        tokens = encode(vit, images_for(BASE), layout, taps=(0, 2))
    assert len(tokens.taps) == 2
    for level, tapped in tokens.taps.items():
        assert tapped.shape == (2, 24, 4, 4)
        assert torch.equal(tapped.flatten(2).mT, layout.patches(outputs[level]))
    assert tuple(tokens.taps) == (0, 2)
    assert torch.equal(vit.norm(outputs[2]), tokens.final)


def gradients(
    vit: VisionTransformer, layout: TokenLayout, images: Tensor, recompute: bool
) -> dict[str, Tensor]:
    vit.zero_grad()
    torch.manual_seed(5)  # of drop path
    encode(vit, images, layout, recompute=recompute).final.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in vit.named_parameters()}


def test_recomputing_blocks_gives_the_same_gradients_and_runs_each_block_twice() -> None:
    config = BASE.model_copy(update={"drop_path_ratio": 0.5})
    vit, layout = build(config, REGISTERS)
    vit.train()
    images = images_for(config, count=4)
    calls = 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += 1

    for block in vit.blocks:
        block.register_forward_pre_hook(count)
    expected = gradients(vit, layout, images, recompute=False)
    assert calls == 3
    found = gradients(vit, layout, images, recompute=True)
    assert calls == 3 + 6
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert expected["cls_token"].any()


def test_the_mask_token_stands_for_exactly_the_marked_patches() -> None:
    vit, layout = build(BASE, REGISTERS)
    images = images_for(BASE)
    mask = marked(layout, [0, 5], [6, 15])
    nothing = torch.zeros_like(mask)
    token = torch.randn(1, 1, vit.embed_dim)
    with torch.no_grad():
        found = encode(vit, images, layout, TokenFill(mask, token, nothing, None)).final
        # by hand: timm's own steps, with the embeddings replaced
        embedded = vit.patch_embed(images)
        embedded[mask] = token[0, 0]
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(embedded)))
        torch.testing.assert_close(found, vit.norm(vit.blocks(x)), rtol=1e-6, atol=1e-6)


def test_pixels_under_the_mask_change_nothing_and_all_others_do() -> None:
    vit, layout = build(BASE, REGISTERS)
    images = images_for(BASE)
    mask = marked(layout, [0, 5], [6, 15])
    fill = TokenFill(mask, torch.randn(1, 1, vit.embed_dim), torch.zeros_like(mask), None)
    images.requires_grad_(True)
    tokens = encode(vit, images, layout, fill).final
    (gradient,) = torch.autograd.grad((tokens * torch.randn(tokens.shape)).sum(), images)
    of_patch = (
        gradient.abs().amax(dim=1).unflatten(1, (4, 4)).unflatten(3, (4, 4)).amax(dim=(2, 4)).flatten(1)
    )
    assert torch.equal(of_patch == 0, mask)
    with torch.no_grad():
        changed = images.detach().clone()
        changed[0, :, :4, :4] = 99.0  # patch 0 of the first image
        assert torch.equal(encode(vit, changed, layout, fill).final, tokens)
        changed[1, :, :4, :4] = 99.0  # not hidden in the second
        other = encode(vit, changed, layout, fill).final
    assert torch.equal(other[0], tokens[0])
    assert not torch.equal(other[1], tokens[1])


def test_patches_without_a_place_share_one_vector_and_their_positions_get_no_gradient() -> None:
    vit, layout = build(BASE, REGISTERS)
    images = images_for(BASE)
    unplaced = marked(layout, [3, 7], [3, 12])  # patch 3 has no place in any image
    vector = torch.randn(1, 1, vit.embed_dim, requires_grad=True)
    fill = TokenFill(torch.zeros_like(unplaced), None, unplaced, vector)
    tokens = encode(vit, images, layout, fill).final
    (tokens * torch.randn(tokens.shape)).sum().backward()
    of_position = vit.pos_embed.grad[0, layout.num_prefix :].abs().amax(dim=1)
    assert of_position[3] == 0.0
    assert (of_position[torch.arange(16) != 3] > 0).all()
    assert vit.pos_embed.grad[0, : layout.num_prefix].abs().amax(dim=1).all()
    assert vector.grad is not None
    assert vector.grad.any()
    with torch.no_grad():  # what stood there before does not matter at all
        vit.pos_embed[0, layout.num_prefix + 3] = 1e3
        assert torch.equal(encode(vit, images, layout, fill).final, tokens)


def test_swapping_the_content_of_two_patches_without_a_place_swaps_their_tokens_only() -> None:
    """So their relative position cannot be read from their positional embeddings."""
    vit, layout = build(BASE, REGISTERS)
    images = images_for(BASE, count=1)
    swapped = images.clone()
    swapped[..., 0:4, 4:8], swapped[..., 8:12, 0:4] = images[..., 8:12, 0:4], images[..., 0:4, 4:8]
    unplaced = marked(layout, [1, 8])
    fill = TokenFill(torch.zeros_like(unplaced), None, unplaced, torch.randn(1, 1, vit.embed_dim))
    with torch.no_grad():
        first, second = (layout.patches(encode(vit, x, layout, fill).final)[0] for x in (images, swapped))
    order = torch.arange(16)
    order[[1, 8]] = torch.tensor([8, 1])
    torch.testing.assert_close(second, first[order], rtol=1e-4, atol=1e-5)


def test_a_fill_of_another_precision_keeps_the_precision_of_the_tokens() -> None:
    vit, layout = build(BASE, REGISTERS)
    images = images_for(BASE)
    mask = marked(layout, [0], [1])
    fill = TokenFill(mask, torch.randn(1, 1, vit.embed_dim), mask, torch.randn(1, 1, vit.embed_dim))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = encode(vit, images, layout, fill).final
        plain = encode(vit, images, layout).final
        stock = vit.forward_features(images)
    assert tokens.dtype == plain.dtype == stock.dtype
    torch.testing.assert_close(plain.float(), stock.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, r"^model.name: .*did you mean 'vit_tiny_patch16_224'\?"),
        ({"name": "zzz"}, "^model.name: timm has no architecture 'zzz'"),
        ({"img_px": 30}, "^model.img_px: 30 px are not whole 4 px patches; use 28 or 32$"),
        ({"img_px": 3}, "^model.img_px: 3 px .*; use 4$"),
        ({"args": {"dephth": 3}}, "^model.args: timm refuses them .*'dephth'"),
        (
            {"name": "swin_tiny_patch4_window7_224", "args": {}},
            "^model.img_px: 16 px .* 32 px patches; use 32",
        ),
        ({**SWIN_NAME, "pos_embed": "none"}, "^model.pos_embed: does not apply to a Swin"),
        ({"name": "resnet18", "args": {}}, "^model"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_backbone(BASE.model_copy(update=changes))
    assert "\n" not in str(caught.value)


def test_registers_and_class_token_follow_the_settings() -> None:
    for config, registers in VARIANTS.values():
        vit, layout = build(config, registers)
        assert vit.num_prefix_tokens == layout.num_prefix
        assert vit.patch_embed.num_patches == layout.num_patches
        assert (vit.pos_embed is None) == (config.pos_embed == "none")
        assert isinstance(vit.head, torch.nn.Identity)


# --- another size, fewer patches, other families


def test_kept_patches_go_on_with_their_own_places_and_dropped_pixels_change_nothing() -> None:
    """T-MAE-4 and T-MAE-5."""
    vit, layout = build(BASE, REGISTERS)
    images = images_for(BASE)
    kept = torch.tensor([[0, 5, 9], [2, 3, 15]])
    with torch.no_grad():
        tokens = encode(vit, images, layout, kept=kept).final
        assert tokens.shape == (2, layout.num_prefix + 3, 24)
        # by hand: timm's own embedding of everything, then a choice
        embedded = vit._pos_embed(vit.patch_embed(images))
        chosen = torch.stack(
            [layout.patches(row[None])[0, index] for row, index in zip(embedded, kept, strict=True)]
        )
        x = torch.cat([layout.prefix(embedded), chosen], dim=1)
        torch.testing.assert_close(tokens, vit.norm(vit.blocks(x)), rtol=1e-6, atol=1e-6)
        changed = images.clone()
        changed[0, :, 0:4, 4:8] = 99.0  # patch 1 of the first image
        assert torch.equal(encode(vit, changed, layout, kept=kept).final, tokens)


def test_views_of_another_size_get_interpolated_positions_for_patches_only() -> None:
    vit, _ = build(BASE, REGISTERS)
    accept_any_size(vit)
    layout = layout_of(BASE, REGISTERS, size_px=8)
    assert layout.grid == (2, 2)
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        tokens = encode(vit, images, layout).final
        before, of_patches = vit.pos_embed[:, : layout.num_prefix], vit.pos_embed[:, layout.num_prefix :]
        small = torch.nn.functional.interpolate(
            of_patches.mT.unflatten(2, (4, 4)), size=(2, 2), mode="bicubic", align_corners=False
        )
        x = vit.patch_embed(images) + small.flatten(2).mT
        prefix = torch.cat([vit.cls_token, vit.reg_token], dim=1) + before
        x = vit.norm(vit.blocks(torch.cat([prefix.expand(3, -1, -1), x], dim=1)))
    assert tokens.shape == (3, 3 + 4, 24)
    torch.testing.assert_close(tokens, x, rtol=1e-5, atol=1e-5)


SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    img_px=64,
    patch_px=4,
    args={"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "window_size": 4},
)


def test_a_swin_gives_stock_timms_features_and_taps_each_stage_before_merging() -> None:
    torch.manual_seed(0)
    swin = create_backbone(SWIN).eval()
    layout = layout_of(SWIN, ())
    assert (layout.grid, layout.num_prefix, num_features(swin)) == ((2, 2), 0, 96)
    assert levels_of(swin) == (Level(12, 4), Level(24, 8), Level(48, 16), Level(96, 32))
    images = torch.randn(2, 3, 64, 64)
    outputs: list[Tensor] = []
    for stage in swin.layers:
        stage.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        tokens = encode(swin, images, layout, taps=(0, 1, 2, 3))
        torch.testing.assert_close(tokens.final, swin.forward_features(images).flatten(1, 2))
        torch.testing.assert_close(layout.image_feature(tokens.final), swin(images))
    assert [tuple(tap.shape) for tap in tokens.taps.values()] == [
        (2, 12, 16, 16), (2, 24, 8, 8), (2, 48, 4, 4), (2, 96, 2, 2),
    ]  # fmt: skip
    for level, tap in tokens.taps.items():
        assert torch.equal(tap.permute(0, 2, 3, 1), outputs[level])


def test_recomputing_the_stages_of_a_swin_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    swin, layout, images = create_backbone(SWIN), layout_of(SWIN, ()), torch.randn(2, 3, 64, 64)
    found = []
    for recompute in (False, True):
        swin.zero_grad()
        encode(swin, images, layout, recompute=recompute).final.square().mean().backward()
        found.append([parameter.grad.clone() for parameter in swin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_swin_has_no_place_for_registers() -> None:
    with pytest.raises(ConfigError, match="no place for the register tokens"):
        create_backbone(SWIN, 1)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "t2t_vit_14"])
def test_frozen_parts_take_no_gradient_and_the_rest_does(name: str) -> None:
    """T-M3-3 and T-MAE-6: the patch embedding of MoCo v3 and fixed positions."""
    small = BackboneConfig(
        name="vit_tiny_patch16_224",
        img_px=16,
        patch_px=4,
        pos_embed="sincos_moco",
        init="moco",
        freeze_patch_embed=True,
        args=SMALL,
    )
    config = small if name != "t2t_vit_14" else BackboneConfig(name=name, img_px=32, args=SMALL)
    torch.manual_seed(0)
    vit = create_backbone(config, 1)
    layout = layout_of(config, ("rotation",))
    encode(vit, images_for(config), layout).final.sin().mean().backward()
    fixed = {name for name, parameter in vit.named_parameters() if parameter.grad is None}
    expected = {"patch_embed.proj.weight", "patch_embed.proj.bias"} if name != "t2t_vit_14" else set()
    assert fixed == {"pos_embed"} | expected


def test_a_t2t_vit_gives_its_own_forward_features() -> None:
    config = BackboneConfig(name="t2t_vit_14", img_px=32, args={"depth": 2, "embed_dim": 24, "num_heads": 2})
    torch.manual_seed(0)
    vit = create_backbone(config, 1).eval()
    layout = layout_of(config, ("rotation",))
    images = images_for(config)
    with torch.no_grad():
        torch.testing.assert_close(encode(vit, images, layout).final, vit.forward_features(images))
