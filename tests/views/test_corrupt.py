"""Patch corruptions: confined to their sets, and exactly what the plan says."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import Tensor

from pretrain.tokens import take
from pretrain.views.corrupt import corrupt, put, relative_position_label
from pretrain.views.pixels import crop_resize_tiles, render, split_patches, to_gray
from pretrain.views.plan import BlurConfig, PatchConfig, ViewConfig, ViewPlan, draw_view_plan

PATCHES = PatchConfig(grid=(8, 8), patch_px=8, colorization=6, inpainting=10, pairs=4, jigsaw=8)
VIEW = ViewConfig(size_px=64, turn=True, blur=BlurConfig(prob=0.5), solarize_prob=0.2)


def _plan(patches: PatchConfig | None = PATCHES, num_images: int = 4) -> ViewPlan:
    ids = torch.arange(num_images)
    return draw_view_plan([VIEW], patches, 0, torch.zeros_like(ids), ids)


def _images(num_images: int = 4) -> Tensor:
    return torch.rand(num_images, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def _without_tile_augmentation(plan: ViewPlan) -> ViewPlan:
    """The same sets with neither colour changes nor grey in the tiles (they are still cropped)."""
    jitter = replace(plan.tiles.jitter, apply=torch.zeros_like(plan.tiles.jitter.apply))
    return replace(plan, tiles=replace(plan.tiles, jitter=jitter, gray=torch.zeros_like(plan.tiles.gray)))


def test_patches_outside_the_sets_stay_bit_identical() -> None:
    """T-MT-1"""
    clean, plan = _images(), _plan()
    untouched = clean.clone()
    corrupted = corrupt(clean, plan, 8, inpaint_pixels=torch.tensor([0.4, 0.5, 0.6]))
    assert torch.equal(clean, untouched)
    sets = plan.patches
    index = torch.cat([sets.colorization, sets.inpainting, sets.pairs.flatten(1), sets.jigsaw], dim=1)
    same = (split_patches(corrupted, 8) == split_patches(clean, 8)).flatten(2).all(dim=2)  # (M, N)
    expected = torch.ones_like(same).scatter(1, index, False)
    assert torch.equal(same, expected)


def test_no_patch_tasks_change_nothing() -> None:
    clean = _images()
    assert torch.equal(corrupt(clean, _plan(None), 8), clean)
    assert torch.equal(corrupt(clean, _plan(PatchConfig(grid=(8, 8), patch_px=8)), 8), clean)


def test_inpainting_patches_wait_for_the_mask_token_or_take_the_given_colour() -> None:
    clean, plan = _images(), _plan()
    index, colour = plan.patches.inpainting, torch.tensor([0.4, 0.5, 0.6])
    waiting = take(split_patches(corrupt(clean, plan, 8), 8), index)
    assert torch.equal(waiting, take(split_patches(clean, 8), index))
    blank = take(split_patches(corrupt(clean, plan, 8, colour), 8), index)
    assert torch.equal(blank, colour.view(3, 1, 1).expand_as(blank))


def test_colour_beyond_the_grey_value_is_hidden_from_the_network() -> None:
    """T-MT-7"""
    plan = _plan(PatchConfig(grid=(8, 8), patch_px=8, colorization=32))
    clean = 0.3 + 0.4 * _images()
    inside = put(torch.zeros(4, 64, 3, 8, 8), plan.patches.colorization, torch.ones(4, 32, 3, 8, 8))
    inside = inside.view(4, 8, 8, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(clean.shape)
    same_gray = torch.tensor([0.587, -0.2989, 0.0]).view(3, 1, 1) * 0.3  # orthogonal to the grey weights
    other = clean + inside * same_gray
    assert (other - clean).abs().max() > 0.1
    torch.testing.assert_close(corrupt(other, plan, 8), corrupt(clean, plan, 8), rtol=0, atol=1e-6)
    targets = [take(split_patches(view, 8), plan.patches.colorization) for view in (clean, other)]
    assert (targets[0] - targets[1]).abs().amax(dim=(2, 3, 4)).min() > 0.1  # of every patch


def test_colorization_patches_are_the_grey_of_the_clean_ones() -> None:
    clean, plan = _images(), _plan()
    gray = reference.rgb_to_grayscale(clean, num_output_channels=3)
    shown, expected = (
        take(split_patches(x, 8), plan.patches.colorization) for x in (corrupt(clean, plan, 8), gray)
    )
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-6)


def test_tiles_are_augmented_as_torchvision_does_with_the_same_numbers() -> None:
    clean, plan = _images(), _plan()
    shown = take(split_patches(corrupt(clean, plan, 8), 8), plan.tiles.index)
    sets, tiles = plan.patches, plan.tiles
    source = take(split_patches(clean, 8), torch.cat([sets.pairs.flatten(1), sets.jigsaw_source], dim=1))
    operations = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    for m in range(4):
        for t in range(16):
            expected = reference.resized_crop(
                source[m, t], *tiles.offset_px[m, t].tolist(), 7, 7, [8, 8], antialias=True
            )
            row = m * 16 + t
            if tiles.jitter.apply[row]:
                for operation in tiles.jitter.order[row].tolist():
                    expected = operations[operation](expected, tiles.jitter.factors[row, operation].item())
            if tiles.gray[m, t]:
                expected = reference.rgb_to_grayscale(expected, num_output_channels=3)
            torch.testing.assert_close(shown[m, t], expected, rtol=0, atol=1e-4)


def test_a_jigsaw_slot_shows_the_content_of_its_source() -> None:
    """METHODS B1: slot p_a receives the content of patch p_pi(a)."""
    colours = torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
    flat = colours.view(8, 8, 3).permute(2, 0, 1)
    clean = flat.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).expand(4, 3, 64, 64)
    plan = _without_tile_augmentation(_plan())
    shown = take(split_patches(corrupt(clean, plan, 8), 8), plan.patches.jigsaw).mean(dim=(3, 4))
    torch.testing.assert_close(shown, colours[plan.patches.jigsaw_source])


def test_where_sets_overlap_tasks_work_on_what_is_shown_by_then() -> None:
    """A patch that is coloured, paired and moved: grey first, then the pair, and at last the jigsaw."""
    clean = _images(1)
    first, other = torch.tensor([[3]]), torch.tensor([[5]])
    sets = replace(
        _plan(num_images=1).patches,
        colorization=first,
        inpainting=torch.tensor([[9]]),
        pairs=torch.tensor([[[3, 9]]]),
        jigsaw=torch.cat([first, other], dim=1),
        jigsaw_source=torch.cat([other, first], dim=1),
        overlapping=True,
    )
    index = torch.cat([sets.pairs.flatten(1), sets.jigsaw], dim=1)
    plan = _without_tile_augmentation(replace(_plan(num_images=1), patches=sets))
    jitter = replace(
        plan.tiles.jitter,
        **{name: getattr(plan.tiles.jitter, name)[:4] for name in ("apply", "factors", "order")},
    )
    tiles = replace(
        plan.tiles,
        index=index,
        offset_px=torch.zeros(1, 4, 2, dtype=torch.int64),
        jitter=jitter,
        gray=torch.zeros(1, 4, dtype=torch.bool),
    )
    shown = split_patches(corrupt(clean, replace(plan, tiles=tiles), 8, torch.tensor([0.4, 0.5, 0.6])), 8)[0]
    patches = split_patches(clean, 8)[0]

    def cropped(patch: Tensor) -> Tensor:
        return crop_resize_tiles(patch[None], torch.zeros(1, 2, dtype=torch.int64), 7)[0]

    torch.testing.assert_close(shown[3], cropped(patches[5]))  # not grey: the jigsaw came last
    torch.testing.assert_close(shown[5], cropped(to_gray(patches[3][None])[0]))  # moved when it was grey
    torch.testing.assert_close(shown[9], torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1).expand(3, 8, 8))
    others = [place for place in range(64) if place not in (3, 5, 9)]
    assert torch.equal(shown[others], patches[others])


def test_relative_position_reads_like_a_page() -> None:
    """METHODS B1: [LU, U, RU, L, R, LD, D, RD] = 0..7, the second patch as seen from the first."""
    center = torch.full((8,), 5 * 9 + 4)
    second = center + torch.tensor([-10, -9, -8, -1, 1, 8, 9, 10])
    assert relative_position_label(center, second, 9).tolist() == list(range(8))
    far_left_up = relative_position_label(torch.tensor([44]), torch.tensor([2]), 9)
    assert far_left_up.tolist() == [0]


def test_relative_position_is_antisymmetric() -> None:
    """T-MT-4"""
    first, second = torch.cartesian_prod(torch.arange(12), torch.arange(12)).unbind(1)
    first, second = first[first != second], second[first != second]
    label = relative_position_label(first, second, 4)
    assert torch.equal(relative_position_label(second, first, 4), 7 - label)


@pytest.mark.parametrize("mode", ["slot", "permset"])
def test_a_whole_view_compiles_into_one_graph(mode: Literal["slot", "permset"]) -> None:
    patches = replace(PATCHES, jigsaw=9 if mode == "permset" else 8, jigsaw_mode=mode, colorization=4)
    plan = _plan(patches)
    crops = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    blank = torch.tensor([0.4, 0.5, 0.6])

    def view(crops: Tensor, plan: ViewPlan) -> Tensor:
        return corrupt(render(crops, plan), plan, 8, blank)

    compiled = torch.compile(view, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(compiled(crops, plan), view(crops, plan))
