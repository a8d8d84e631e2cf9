from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.decoders import FusionDecoder, MaskedDecoder, Predictor, TokenFusion, tap_indices
from pretrain.models.positions import sincos_positions


def scatter_weights(module: nn.Module) -> nn.Module:
    """Leave no weight at zero, so that nothing is equal by chance."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return module


def parameters_without_gradient(module: nn.Module, output: Tensor) -> list[str]:
    (output * torch.randn(output.shape)).sum().backward()
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]


def random_subsets(num_images: int, num_patches: int, size: int, seed: int = 0) -> Tensor:
    """int64 (M, size), without repeats, not in order"""
    noise = torch.rand(num_images, num_patches, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(dim=1)[:, :size]


# --- pixels from several levels


@pytest.mark.parametrize(
    ("num_blocks", "num_levels", "expected"),
    [
        (12, 4, (2, 5, 8, 11)),
        (24, 4, (5, 11, 17, 23)),
        (12, 3, (3, 7, 11)),
        (12, 1, (11,)),
        (4, 4, (0, 1, 2, 3)),
        (14, 4, (2, 5, 8, 11)),  # floor(14 / 4) = 3: the last two blocks are not tapped
    ],
)
def test_taps_are_evenly_spaced(num_blocks: int, num_levels: int, expected: tuple[int, ...]) -> None:
    """T-RP-1."""
    assert tap_indices(num_blocks, num_levels) == expected


@pytest.mark.parametrize("num_levels", [0, 5])
def test_more_levels_than_blocks_are_refused(num_levels: int) -> None:
    with pytest.raises(ConfigError, match=rf"^levels: {num_levels} .* use 1 to 4$"):
        tap_indices(4, num_levels)


def vit_maps(dim: int, side: int, num_levels: int = 4, num_images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_images, dim, side, side, generator=generator) for _ in range(num_levels)]


def swin_maps(dims: list[int], side: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, dim, side >> level, side >> level, generator=generator)
        for level, dim in enumerate(dims)
    ]


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_pixels_have_the_shape_of_the_image(kind: Any) -> None:
    """T-RP-2: ViT with patches of 4 and of 16 px, Swin-T at 224 px (narrow: the widths change no shape)."""
    for patch_px, side in ((4, 8), (16, 3)):
        decoder = FusionDecoder([64] * 4, [patch_px] * 4, kind=kind, dec_dim=16)
        assert decoder(*vit_maps(64, side)).shape == (2, 3, side * patch_px, side * patch_px)
    side = 56 if kind == "conv" else 16
    decoder = FusionDecoder([8, 16, 32, 64], [4, 8, 16, 32], num_layers=1, kind=kind)
    assert decoder(*swin_maps([8, 16, 32, 64], side)).shape == (1, 3, side * 4, side * 4)
    wide = [torch.randn(2, 8, 2, 5) for _ in range(2)]
    assert FusionDecoder([8, 8], [16, 16], kind=kind)(*wide).shape == (2, 3, 32, 80)


def test_a_full_width_decoder_for_vit_small_has_the_parameters_counted_by_hand() -> None:
    """Three fusions of 9 (768 * 384 + 384 * 384) weights: 11.9 M; at half width a quarter of that."""
    fusion = 9 * (768 * 384 + 384 * 384) + 2 * 384
    last = 384 * 768 + 768
    norms = 4 * 2 * 384
    count = sum(p.numel() for p in FusionDecoder([384] * 4, [16] * 4).parameters())
    assert count == 3 * fusion + last + norms
    half = 3 * (9 * (384 * 192 + 192 * 192) + 2 * 192) + 192 * 768 + 768 + norms + 4 * (384 * 192 + 192)
    assert sum(p.numel() for p in FusionDecoder([384] * 4, [16] * 4, dec_dim=192).parameters()) == half


@pytest.mark.parametrize("tap_norm", ["own", "none"])
@pytest.mark.parametrize("dec_dim", [None, 6])
def test_levels_are_fused_deep_to_shallow_as_the_paper_says(tap_norm: Any, dec_dim: int | None) -> None:
    """The same steps written out, for a hierarchical backbone of three levels."""
    torch.manual_seed(0)
    decoder = FusionDecoder([4, 8, 12], [4, 8, 16], num_layers=2, dec_dim=dec_dim, tap_norm=tap_norm)
    scatter_weights(decoder)
    shallow, middle, deep = maps = swin_maps([4, 8, 12], 8)

    def prepared(index: int, level: Tensor) -> Tensor:
        if tap_norm == "own":
            norm = decoder.norms[index]
            mean = level.mean(dim=1, keepdim=True)
            scaled = (level - mean) / (level.var(dim=1, keepdim=True, unbiased=False) + 1e-6).sqrt()
            level = scaled * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        if dec_dim is not None:
            lateral = decoder.laterals[index]
            level = F.conv2d(level, lateral.weight, lateral.bias)
        return level

    shallow, middle, u = prepared(0, shallow), prepared(1, middle), prepared(2, deep)
    for index, level in ((1, middle), (0, shallow)):
        u = F.interpolate(u, size=level.shape[2:], mode="bilinear", align_corners=False)
        u = torch.cat([u, level], dim=1)
        for layer in (0, 2):
            conv = decoder.fusions[index][layer]
            u = F.conv2d(u, conv.weight, conv.bias, padding=1).relu()
        assert u.shape[1] == (dec_dim or (4, 8)[index])
    out = F.conv2d(u, decoder.to_pixels.weight, decoder.to_pixels.bias)  # (1, 3 * 16, 8, 8)
    expected = out.reshape(1, 3, 4, 4, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(1, 3, 32, 32)
    torch.testing.assert_close(decoder(*maps), expected, rtol=1e-4, atol=1e-4)


def test_one_level_is_read_by_the_last_convolution_alone() -> None:
    """T-RP-7: each place of the map gives the pixels of its own patch, by one linear map."""
    decoder = FusionDecoder([8], [4], tap_norm="none")
    assert [name for name, _ in decoder.named_parameters()] == ["to_pixels.weight", "to_pixels.bias"]
    (deepest,) = vit_maps(8, 3, num_levels=1)
    pixels = decoder(deepest)
    linear = F.linear(deepest.permute(0, 2, 3, 1), decoder.to_pixels.weight[:, :, 0, 0])  # bias is zero
    patch = linear[0, 1, 2].reshape(3, 4, 4)  # row 1, column 2
    torch.testing.assert_close(pixels[0, :, 4:8, 8:12], patch, rtol=1e-4, atol=1e-5)
    with_norm = FusionDecoder([8], [4])
    assert parameters_without_gradient(with_norm, with_norm(deepest)) == []
    with pytest.raises(ValueError, match="argument"):
        decoder(deepest, deepest)


@pytest.mark.parametrize("kind", ["conv", "transformer"])
@pytest.mark.parametrize("dec_dim", [None, 8])
def test_every_parameter_and_every_level_gets_a_gradient(kind: Any, dec_dim: int | None) -> None:
    torch.manual_seed(0)
    decoder = FusionDecoder([8, 16, 16], [4, 8, 8], kind=kind, dec_dim=dec_dim)
    maps = [torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2), torch.randn(2, 16, 2, 2)]
    for level in maps:
        level.requires_grad_(True)
    without = parameters_without_gradient(decoder, decoder(*maps))
    assert without == []
    assert all(level.grad is not None and level.grad.any() for level in maps)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_the_number_of_layers_says_how_far_a_place_reaches(num_layers: int) -> None:
    """Each 3 x 3 convolution sees one place further; with transformer layers every place sees all."""
    torch.manual_seed(0)
    for kind in ("conv", "transformer"):
        decoder = FusionDecoder([8, 8], [1, 1], num_layers=num_layers, kind=kind, tap_norm="none")  # type: ignore[arg-type]
        deep = torch.randn(1, 8, 15, 15, requires_grad=True)
        decoder(torch.randn(1, 8, 15, 15), deep)[0, :, 7, 7].sum().backward()
        assert deep.grad is not None
        reached = deep.grad.abs().sum(dim=(0, 1)) > 0
        side = 15 if kind == "transformer" else 2 * num_layers + 1
        expected = torch.zeros(15, 15, dtype=torch.bool)
        start = (15 - side) // 2
        expected[start : start + side, start : start + side] = True
        assert not (reached & ~expected).any()
        edges = reached.any(dim=1)
        assert edges[start]
        assert edges[start + side - 1]


def test_transformer_fusion_keeps_every_place_where_it_is() -> None:
    """The same layers over a list of places; moving the places of the map moves the result with them."""
    torch.manual_seed(0)
    fusion = TokenFusion(6, 4, num_layers=2, num_heads=2)
    joined = torch.randn(1, 6, 2, 3)
    found = fusion(joined)
    weight, bias = fusion.reduce.weight[:, :, 0, 0], fusion.reduce.bias
    places = [weight @ joined[0, :, row, column] + bias for row in range(2) for column in range(3)]
    expected = fusion.blocks(torch.stack(places).unsqueeze(0))[0]  # (6, 4)
    assert found.shape == (1, 4, 2, 3)
    torch.testing.assert_close(found[0, :, 1, 2], expected[5])
    torch.testing.assert_close(found[0, :, 0, 1], expected[1])
    torch.testing.assert_close(fusion(joined.flip(3)), found.flip(3))


def test_first_weights_are_kaiming_and_the_last_small() -> None:
    """Kaiming keeps the scale through ReLU: variance 2 / fan in."""
    torch.manual_seed(0)
    decoder = FusionDecoder([32, 32], [8, 8])
    first = decoder.fusions[0][0]
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert decoder.to_pixels.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(p.any() for name, p in decoder.named_parameters() if name.endswith("bias"))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^decoder: a width of 8 .* 3 attention heads") as caught:
        FusionDecoder([8, 8], [4, 4], kind="transformer", num_heads=3)
    assert "\n" not in str(caught.value)


# --- what hidden patches held

GRID = (3, 4)
SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "num_heads": 4}


def masked_decoder(num_prefix: int) -> MaskedDecoder:
    torch.manual_seed(0)
    decoder = MaskedDecoder(10, GRID, out_dim=7, num_prefix=num_prefix, **SMALL)
    scatter_weights(decoder)
    return decoder


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_the_masked_decoder_equals_its_steps_done_image_by_image(num_prefix: int) -> None:
    decoder = masked_decoder(num_prefix)
    tokens, kept = torch.randn(3, num_prefix + 5, 10), random_subsets(3, 12, 5)
    expected = []
    for image in range(3):
        sequence = [decoder.mask_token[0, 0] for _ in range(12)]
        for place, patch in enumerate(kept[image].tolist()):
            sequence[patch] = decoder.embed(tokens[image, num_prefix + place])
        placed = torch.stack(sequence) + sincos_positions(16, GRID, "mae")
        before = decoder.embed(tokens[image, :num_prefix])  # with no position
        hidden = decoder.blocks(torch.cat([before, placed]).unsqueeze(0))
        expected.append(decoder.head(decoder.norm(hidden))[0, num_prefix:])
    found = decoder(tokens, kept)
    assert found.shape == (3, 12, 7)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_order_in_which_patches_were_kept_does_not_matter() -> None:
    decoder = masked_decoder(1)
    tokens, kept = torch.randn(2, 6, 10), random_subsets(2, 12, 5)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(decoder(shuffled, kept[:, order]), decoder(tokens, kept))


def test_every_parameter_of_the_masked_decoder_learns_and_positions_are_no_parameter() -> None:
    """T-MAE-6, its decoder part."""
    decoder = masked_decoder(1)
    names = dict(decoder.named_parameters())
    assert "mask_token" in names
    assert "positions" not in names
    assert "positions" not in decoder.state_dict()
    tokens = torch.randn(2, 6, 10, requires_grad=True)
    assert parameters_without_gradient(decoder, decoder(tokens, random_subsets(2, 12, 5))) == []
    assert tokens.grad is not None
    assert tokens.grad.abs().sum(dim=2).all()


def test_the_masked_decoder_is_drawn_as_in_mae() -> None:
    torch.manual_seed(0)
    decoder = MaskedDecoder(64, (8, 8), out_dim=48, dim=192, depth=1, num_heads=3)
    assert decoder.embed.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 192)), rel=0.01)
    qkv = decoder.blocks[0].attn.qkv  # as one layer
    assert qkv.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (4 * 192)), rel=0.01)
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert not any(p.any() for name, p in decoder.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_run_in_mixed_and_in_half_precision(dtype: torch.dtype) -> None:
    """Under autocast weights are float32; engines may also cast the weights, and then perhaps not buffers."""
    decoder, predictor = masked_decoder(1), Predictor(10, GRID, **SMALL)
    for module in (decoder, predictor):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        assert module.positions.dtype == torch.float32
    tokens, kept = torch.randn(2, 6, 10, dtype=dtype), random_subsets(2, 12, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert decoder(tokens, kept).isfinite().all()
        assert predictor(tokens[:, 1:], kept, kept.unsqueeze(1)).isfinite().all()


def predictor_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Context (3, 4, D), kept (3, 4) and targets (3, 2, 3); no target is in the context of its image."""
    chosen = random_subsets(3, 12, 10, seed=3)
    return torch.randn(3, 4, 10), chosen[:, :4], chosen[:, 4:].unflatten(1, (2, 3))


def small_predictor() -> Predictor:
    torch.manual_seed(0)
    predictor = Predictor(10, GRID, **SMALL)
    scatter_weights(predictor)
    return predictor


def test_predictions_stand_in_the_order_of_their_targets() -> None:
    """T-IJ-6, with the blocks of an image together: (M, T, n, D).

    Every (image, block) predicted alone, by the steps written out, gives its own place of the result; joined
    block by block over all images these are the rows that the authors' code lists mask-major.
    """
    predictor = small_predictor()
    context, kept, targets = predictor_inputs()
    found = predictor(context, kept, targets)
    assert found.shape == (3, 2, 3, 10)
    table = sincos_positions(16, GRID, "mae")
    mask_major = []
    for block in range(2):
        for image in range(3):
            seen = [
                predictor.embed(context[image, i]) + table[patch]
                for i, patch in enumerate(kept[image].tolist())
            ]
            asked = [predictor.mask_token[0, 0, 0] + table[patch] for patch in targets[image, block].tolist()]
            hidden = predictor.norm(predictor.blocks(torch.stack(seen + asked).unsqueeze(0)))[0]
            mask_major.append(predictor.head(hidden[len(seen) :]))
    expected = torch.stack(mask_major)  # (T * M, n, D)
    torch.testing.assert_close(found.transpose(0, 1).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    rows = expected.flatten(0, 1)
    assert torch.pdist(rows).min() > 1e-3  # unique, or the order would show nothing


def test_moving_a_target_moves_its_prediction() -> None:
    """T-IJ-6: the same targets in another order give the same predictions in that order."""
    predictor = small_predictor()
    context, kept, targets = predictor_inputs()
    found = predictor(context, kept, targets)
    within = torch.tensor([2, 0, 1])
    torch.testing.assert_close(predictor(context, kept, targets[:, :, within]), found[:, :, within])
    torch.testing.assert_close(predictor(context, kept, targets.flip(1)), found.flip(1))
    assert not torch.allclose(found, found[:, :, within])


def test_predictions_do_not_depend_on_the_order_of_the_context() -> None:
    """T-IJ-7, second half; telling a patch from another place does change them."""
    predictor = small_predictor()
    context, kept, targets = predictor_inputs()
    found = predictor(context, kept, targets)
    order = torch.tensor([2, 3, 1, 0])
    torch.testing.assert_close(predictor(context[:, order], kept[:, order], targets), found)
    assert not torch.allclose(predictor(context[:, order], kept, targets), found)


def test_a_block_sees_its_own_image_and_no_other_block() -> None:
    predictor = small_predictor()
    context, kept, targets = predictor_inputs()
    context.requires_grad_(True)
    found = predictor(context, kept, targets)
    (gradient,) = torch.autograd.grad(found[1].square().sum(), context)
    assert [bool(image.any()) for image in gradient] == [False, True, False]
    other = targets.clone()
    other[:, 1] = kept[:, :3]
    assert torch.equal(predictor(context, kept, other)[:, 0], found[:, 0])


def test_every_parameter_of_the_predictor_learns_and_positions_are_no_parameter() -> None:
    predictor = small_predictor()
    assert "positions" not in predictor.state_dict()
    assert parameters_without_gradient(predictor, predictor(*predictor_inputs())) == []
    fresh = Predictor(64, (4, 4), dim=96, depth=1, num_heads=3)
    assert fresh.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert fresh.mask_token.std().item() == pytest.approx(0.02, rel=0.25)
