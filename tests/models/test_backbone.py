from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.models.backbone import BackboneConfig, TokenFill, create_backbone, encode, layout_of, model_args
from pretrain.tokens import TokenLayout

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 24, "num_heads": 2}
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
    assert found.taps == ()
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
    assert torch.equal(tokens.taps[0], outputs[0])
    assert torch.equal(tokens.taps[1], outputs[2])
    assert torch.equal(vit.norm(tokens.taps[1]), tokens.final)


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
        ({"name": "swin_tiny_patch4_window7_224", "args": {}}, "^model"),
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
