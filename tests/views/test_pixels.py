"""Every batched operation against torchvision on single images with the same numbers."""

import itertools
import math

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from pretrain.views import pixels
from pretrain.views.plan import BlurConfig, JitterPlan, ViewConfig, draw_view_plan


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
BOXES = {
    "whole image, shrunk a lot": (0, 0, 203, 301),
    "small crop, enlarged": (10, 20, 30, 40),
    "lower right corner": (103, 201, 100, 100),
    "flat crop": (50, 0, 7, 250),
    "single pixel": (202, 300, 1, 1),
}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_resize_is_torchvisions_resized_crop_within_one_grey_level(
    interpolation: pixels.Interpolation,
) -> None:
    images = _bytes(len(BOXES), 203, 301, 3)
    boxes = torch.tensor(list(BOXES.values()))
    resized = pixels.crop_resize(images, boxes, 48, interpolation)
    assert resized.shape == (len(BOXES), 48, 48, 3)
    assert resized.dtype == torch.uint8
    for image, box, mine in zip(images, BOXES.values(), resized, strict=True):
        expected = reference.resized_crop(
            image.permute(2, 0, 1), *box, [48, 48], MODES[interpolation], antialias=True
        )
        assert (mine.permute(2, 0, 1).int() - expected.int()).abs().max() <= 1


def test_pixels_outside_a_crop_have_no_influence() -> None:
    image = _bytes(1, 40, 40, 3)
    box = torch.tensor([[8, 12, 20, 16]])
    surrounded = torch.full_like(image, 255)
    surrounded[:, 8:28, 12:28] = image[:, 8:28, 12:28]
    first, second = (pixels.crop_resize(x, box, 32, "bicubic") for x in (image, surrounded))
    assert torch.equal(first, second)


def test_a_crop_of_the_whole_image_at_its_own_size_is_the_image() -> None:
    image = _bytes(2, 24, 24, 3)
    box = torch.tensor([[0, 0, 24, 24]] * 2)
    assert torch.equal(pixels.crop_resize(image, box, 24, "bicubic"), image)


def test_tiles_are_cut_and_resized_as_torchvision_does() -> None:
    tiles = _noise(9, 3, 16, 16)
    offsets = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    resized = pixels.crop_resize_tiles(tiles, offsets, 14)
    for tile, (top, left), mine in zip(tiles, offsets.tolist(), resized, strict=True):
        expected = reference.resized_crop(tile, top, left, 14, 14, [16, 16], antialias=True)
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


def test_color_jitter_follows_torchvision_in_all_24_orders() -> None:
    orders = torch.tensor(list(itertools.permutations(range(4))))
    images = _noise(24, 3, 16, 16)
    images[:, :, 0] = images[:, :1, 0]  # some grey pixels: their hue is undefined
    factors = _noise(24, 4, seed=1) * torch.tensor([1.8, 1.8, 1.8, 1.0]) - torch.tensor([0.0, 0.0, 0.0, 0.5])
    jittered = pixels.color_jitter(images, JitterPlan(torch.ones(24, dtype=torch.bool), factors, orders))
    operations = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    for image, order, factor, mine in zip(images, orders.tolist(), factors.tolist(), jittered, strict=True):
        expected = image
        for operation in order:
            expected = operations[operation](expected, factor[operation])
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5)


def test_color_jitter_leaves_images_it_is_not_applied_to() -> None:
    images = _noise(4, 3, 8, 8)
    orders = torch.arange(4).expand(4, 4)
    apply = torch.tensor([True, False, True, False])
    jittered = pixels.color_jitter(images, JitterPlan(apply, torch.full((4, 4), 0.3), orders))
    changed = (jittered != images).flatten(1).any(dim=1)
    assert torch.equal(changed, apply)


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.1, 0.5])
def test_hue_shift_is_torchvisions(turns: float) -> None:
    images = _noise(2, 3, 16, 16)
    shifted = pixels.shift_hue(images, torch.full((2,), turns))
    torch.testing.assert_close(shifted, reference.adjust_hue(images, turns), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size_px", "kernel_px"), [(32, 3), (64, 7), (20, 19)])
def test_blur_is_torchvisions_with_a_sigma_per_image(size_px: int, kernel_px: int) -> None:
    images, sigma = _noise(3, 3, size_px, size_px), torch.tensor([0.1, 0.7, 2.0])
    blurred = pixels.gaussian_blur(images, sigma, kernel_px)
    for image, one, mine in zip(images, sigma.tolist(), blurred, strict=True):
        expected = reference.gaussian_blur(image, [kernel_px, kernel_px], [one, one])
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-6)


def test_a_sigma_of_zero_does_not_touch_the_image() -> None:
    images = _noise(2, 3, 16, 16)
    blurred = pixels.gaussian_blur(images, torch.tensor([0.0, 1.0]), 5)
    assert torch.equal(blurred[0], images[0])
    assert not torch.equal(blurred[1], images[1])


def test_a_kernel_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pixels.gaussian_blur(_noise(1, 3, 4, 4), torch.ones(1), 9)


@pytest.mark.parametrize(("size_px", "expected"), [(8, 3), (32, 3), (64, 7), (96, 9), (224, 23)])
def test_the_blur_kernel_is_odd_and_a_tenth_of_the_side(size_px: int, expected: int) -> None:
    assert pixels.blur_kernel_px(size_px) == expected


def test_solarize_grey_and_flip_are_torchvisions() -> None:
    images, apply = _noise(2, 3, 8, 8), torch.tensor([True, False])
    solarized, flipped = pixels.solarize(images, apply), pixels.flip(images, apply)
    assert torch.equal(solarized[0], reference.solarize(images[0], 0.5))
    assert torch.equal(flipped[0], reference.horizontal_flip(images[0]))
    assert torch.equal(solarized[1], images[1])
    assert torch.equal(flipped[1], images[1])
    gray = reference.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(pixels.to_gray(images), gray, rtol=0, atol=1e-7)


def test_quarter_turns_are_clockwise_and_exact() -> None:
    """T-SIT-1: turning back gives the input."""
    images, turns = _noise(4, 3, 6, 6), torch.arange(4)
    turned = pixels.quarter_turn(images, turns)
    for k in range(4):
        assert torch.equal(turned[k], torch.rot90(images[k], -k, dims=(1, 2)))
    assert torch.equal(pixels.quarter_turn(turned, (4 - turns) % 4), images)


def test_the_top_left_pixel_goes_to_the_top_right_in_one_turn() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[..., 0, 0] = 1
    assert pixels.quarter_turn(image, torch.tensor([1]))[0, 0, 0, 3] == 1


def test_to_float_and_normalize_are_torchvisions() -> None:
    crops = _bytes(2, 5, 5, 3)
    images = pixels.to_float(crops)
    expected = reference.to_dtype(crops.permute(0, 3, 1, 2), torch.float32, scale=True)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-7)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = reference.normalize(images, list(mean), list(std))
    torch.testing.assert_close(pixels.normalize(images, mean, std), expected)


@pytest.mark.parametrize(
    ("rgb", "ab"),
    [
        ((1.0, 0.0, 0.0), (80.09, 67.20)),
        ((0.0, 1.0, 0.0), (-86.18, 83.18)),
        ((0.0, 0.0, 1.0), (79.19, -107.86)),
        ((1.0, 1.0, 1.0), (0.0, 0.0)),
        ((0.0, 0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_lab_colours_are_those_of_the_standard(rgb: tuple[float, ...], ab: tuple[float, float]) -> None:
    colour = pixels.rgb_to_lab_ab(torch.tensor(rgb).view(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(colour, torch.tensor(ab), rtol=0, atol=0.02)


def test_patchify_orders_pixels_as_the_contract_says() -> None:
    """METHODS A1: patchify(x)[b, i, (p P + q) 3 + c] = x[b, c, y P + p, x P + q]."""
    images, side, columns = _noise(2, 3, 8, 12), 4, 3
    patches = pixels.patchify(images, side)
    assert patches.shape == (2, 6, 48)
    for i, p, q, c in itertools.product(range(6), range(side), range(side), range(3)):
        expected = images[:, c, i // columns * side + p, i % columns * side + q]
        assert torch.equal(patches[:, i, (p * side + q) * 3 + c], expected)
    assert torch.equal(pixels.unpatchify(patches, side, columns), images)
    assert torch.equal(pixels.join_patches(pixels.split_patches(images, side), columns), images)


_STILL = ViewConfig(
    size_px=32, flip_prob=0.0, gray_prob=0.0, jitter=ViewConfig().jitter.model_copy(update={"prob": 0.0})
)


def test_a_plan_that_does_nothing_changes_nothing() -> None:
    crops = _bytes(4, 32, 32, 3)
    plan = draw_view_plan([_STILL], None, 0, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert torch.equal(pixels.render(crops, plan), pixels.to_float(crops))


def test_render_applies_the_steps_in_the_order_of_the_method() -> None:
    view = ViewConfig(size_px=32, blur=BlurConfig(prob=0.5), solarize_prob=0.5, gray_prob=0.5, turn=True)
    crops = _bytes(16, 32, 32, 3)
    plan = draw_view_plan([view], None, 3, torch.zeros(16, dtype=torch.int64), torch.arange(16))
    rendered = pixels.render(crops, plan)
    names = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    for i in range(16):
        image = crops[i].permute(2, 0, 1) / 255
        if plan.flip[i]:
            image = reference.horizontal_flip(image)
        if plan.jitter.apply[i]:
            for operation in plan.jitter.order[i].tolist():
                image = names[operation](image, plan.jitter.factors[i, operation].item())
        if plan.gray[i]:
            image = reference.rgb_to_grayscale(image, num_output_channels=3)
        if plan.blur_sigma_px[i] > 0:
            image = reference.gaussian_blur(image, [3, 3], [plan.blur_sigma_px[i].item()] * 2)
        near_threshold = (image - 0.5).abs() < 1e-4  # there rounding decides
        if plan.solarize[i]:
            image = reference.solarize(image, 0.5)
        image, near_threshold = (
            torch.rot90(x, -int(plan.quarter_turns[i]), (1, 2)) for x in (image, near_threshold)
        )
        error = (rendered[i] - image).abs().masked_fill(near_threshold, 0.0)
        assert error.max() < 1e-4, i


def test_autocast_does_not_coarsen_pixels() -> None:
    images, sigma = _noise(1, 3, 32, 32), torch.ones(1)
    exact = pixels.gaussian_blur(images, sigma, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pixels.gaussian_blur(images, sigma, 3), exact)


def test_resample_weights_sum_to_one() -> None:
    start, length = torch.tensor([0, 5, 9]), torch.tensor([10, 3, 1])
    for interpolation in ("bilinear", "bicubic"):
        weights = pixels.resample_matrix(start, length, 10, 7, interpolation)
        torch.testing.assert_close(weights.sum(dim=2), torch.ones(3, 7))
        assert math.isclose(weights[2, :, 9].min().item(), 1.0, abs_tol=1e-6)
