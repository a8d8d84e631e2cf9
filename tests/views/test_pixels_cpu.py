"""Views made for processors: `pixels.render`, one graph over the batch, is the slow reference."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from pretrain.views import pixels, pixels_cpu
from pretrain.views.plan import (
    BlurConfig,
    JitterConfig,
    JitterPlan,
    PatchConfig,
    ViewConfig,
    ViewPlan,
    draw_view_plan,
)
from pretrain.views.prepare import Recipe, prepare

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERYTHING = ViewConfig(
    jitter=JitterConfig(prob=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5),
    gray_prob=0.3,
    blur=BlurConfig(prob=0.6, sigma_px=(0.1, 3.0)),
    solarize_prob=0.3,
    turn=True,
    corrupt=False,
)


def _crops(num_views: int, size_px: int) -> Tensor:
    """Noise, with some grey, black, white and fully saturated pixels in every view."""
    generator = torch.Generator().manual_seed(size_px)
    crops = torch.randint(0, 256, (num_views, size_px, size_px, 3), dtype=torch.uint8, generator=generator)
    crops[:, 0] = crops[:, 0, :, :1]
    crops[:, 1, 0], crops[:, 1, 1] = 0, 255
    crops[:, -1] = torch.where(crops[:, -1] > 127, 255, 0)
    return crops


def _plan(num_views: int, view: ViewConfig = EVERYTHING) -> ViewPlan:
    ids = torch.arange(num_views)
    return draw_view_plan([view], None, 5, torch.zeros_like(ids), ids)


def _still(num_views: int) -> ViewPlan:
    """A plan that asks for nothing, but has numbers for everything."""
    plan = _plan(num_views)
    nowhere = torch.zeros(num_views, dtype=torch.bool)
    return replace(
        plan,
        flip=nowhere,
        jitter=replace(plan.jitter, apply=nowhere),
        gray=nowhere,
        blur_sigma_px=torch.zeros(num_views),
        solarize=nowhere,
        quarter_turns=torch.zeros(num_views, dtype=torch.int64),
    )


def _part(plan: ViewPlan, index: Tensor) -> ViewPlan:
    """The plan of some of the views."""
    jitter = JitterPlan(*(getattr(plan.jitter, field.name)[index] for field in fields(JitterPlan)))
    names = ("flip", "gray", "blur_sigma_px", "solarize", "quarter_turns")
    return replace(plan, jitter=jitter, **{name: getattr(plan, name)[index] for name in names})


def _assert_agrees(crops: Tensor, plan: ViewPlan) -> None:
    expected = pixels.render(crops, plan)
    torch.testing.assert_close(pixels_cpu.render(crops, plan), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_views", "size_px"), [(300, 8), (120, 30), (120, 32), (60, 64), (30, 75), (24, 160), (24, 224)]
)
def test_views_are_those_of_the_graph(num_views: int, size_px: int) -> None:
    _assert_agrees(_crops(num_views, size_px), _plan(num_views))


@pytest.mark.parametrize(
    "name", ["flip", "jitter", "gray", "blur_sigma_px", "solarize", "quarter_turns", "nothing"]
)
def test_each_step_alone_is_that_of_the_graph(name: str) -> None:
    crops, all_steps, plan = _crops(32, 24), _plan(32), _still(32)
    if name != "nothing":
        plan = replace(plan, **{name: getattr(all_steps, name)})
        unchanged = (pixels_cpu.render(crops, plan) == pixels.to_float(crops)).flatten(1).all(dim=1)
        assert 0 < unchanged.sum() < 32
    else:
        assert torch.equal(pixels_cpu.render(crops, plan), pixels.to_float(crops))
    _assert_agrees(crops, plan)


@pytest.mark.parametrize("size_px", [32, 33, 35, 224])
def test_the_bits_of_a_view_depend_on_no_other_view_and_no_thread(size_px: int) -> None:
    num_views = 20 if size_px == 224 else 96
    crops, plan = _crops(num_views, size_px), _plan(num_views)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = pixels_cpu.render(crops, plan)
        normalized = pixels_cpu.normalize(expected, MEAN, STD)
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for index in (
                torch.arange(num_views),
                torch.arange(num_views).flip(0)[:-3],
                *torch.arange(num_views).split(7),
                *torch.arange(num_views).split(1)[:8],
            ):
                views = pixels_cpu.render(crops[index], _part(plan, index))
                assert torch.equal(views, expected[index])
                assert torch.equal(pixels_cpu.normalize(views, MEAN, STD), normalized[index])
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size_px", [20, 96, 100, 224])
@pytest.mark.parametrize("sigma_px", [1e-3, 0.1, 0.5, 2.0, 50.0])
def test_any_sigma_blurs_as_the_graph_does(size_px: int, sigma_px: float) -> None:
    plan = replace(_still(3), blur_sigma_px=torch.tensor([sigma_px, 0.0, sigma_px]))
    plan = replace(plan, gray=torch.tensor([False, False, True]))
    _assert_agrees(_crops(3, size_px), plan)


def test_a_kernel_larger_than_the_view_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pixels_cpu.render(_crops(2, 2)[:, :1, :1], replace(_still(2), blur_sigma_px=torch.ones(2)))


def test_all_hues_of_all_colours_are_those_of_the_graph() -> None:
    """With the sextants' borders, where the largest channel changes."""
    level = torch.tensor([0, 1, 2, 64, 127, 128, 254, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(level, level, level)  # 512 = 16 * 32
    colours = torch.cat([colours, colours.flip(0)]).view(1, 32, 32, 3)
    shifts = torch.tensor([-0.5, -1 / 3, -0.25, -1 / 6, -1e-6, 0.0, 1e-6, 0.1, 1 / 6, 1 / 3, 0.4999, 0.5])
    plan = _still(len(shifts))
    factors = torch.ones(len(shifts), 4)
    factors[:, pixels.HUE] = shifts
    jitter = replace(plan.jitter, apply=torch.ones_like(plan.flip), factors=factors)
    _assert_agrees(colours.expand(len(shifts), -1, -1, -1), replace(plan, jitter=jitter))


def test_factors_of_zero_and_above_one_are_those_of_the_graph() -> None:
    plan = _still(48)
    drawn = torch.randint(3, (48, 4), generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([0.0, 1.0, 2.0])[drawn]
    factors[:, pixels.HUE] = 0.2
    jitter = replace(plan.jitter, apply=torch.ones_like(plan.flip), factors=factors)
    _assert_agrees(_crops(48, 16), replace(plan, jitter=jitter))


def test_autocast_does_not_coarsen_views() -> None:
    crops, plan = _crops(8, 32), _plan(8)
    exact = pixels_cpu.render(crops, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pixels_cpu.render(crops, plan), exact)


def test_normalized_views_are_those_of_the_graph() -> None:
    images = torch.rand(9, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    expected = pixels.normalize(images, MEAN, STD)
    torch.testing.assert_close(pixels_cpu.normalize(images, MEAN, STD), expected, rtol=0, atol=1e-6)


def test_an_empty_batch_stays_empty() -> None:
    assert pixels_cpu.render(_crops(0, 16), _plan(0)).shape == (0, 3, 16, 16)


def test_prepared_images_without_patch_tasks_are_the_normalized_clean_ones() -> None:
    crops = torch.stack([_crops(4, 16), _crops(4, 16).flip(1)])
    recipe = Recipe({"one": EVERYTHING, "two": EVERYTHING}, PatchConfig((2, 2), 8), MEAN, STD)
    ids = torch.arange(4)
    inputs = prepare(recipe, 0, crops, torch.zeros_like(ids), ids)
    (group,) = inputs.groups
    assert torch.equal(group.clean, pixels_cpu.render(crops.flatten(0, 1), group.plan))
    assert torch.equal(group.images, pixels_cpu.normalize(group.clean, MEAN, STD))
