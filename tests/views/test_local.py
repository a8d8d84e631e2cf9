"""SiT's local corruptions: confined to their rectangles, as large as planned, and never in the target."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from pydantic import ValidationError
from torch import Tensor

from pretrain.randomness import bits, uniform
from pretrain.views.local import (
    SIT_V1,
    SIT_V2,
    SIT_V3,
    LocalConfig,
    LocalPlan,
    apply_local,
    covered,
    draw_local,
    num_rectangles,
    standard_normal,
)
from pretrain.views.pixels import color_jitter, normalize
from pretrain.views.plan import JitterPlan

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ALIGNED = LocalConfig(kind="blocks", aligned=True)
CONFIGS = {
    "v1": SIT_V1,
    "v1 with colours": LocalConfig(color=True),
    "v2": SIT_V2,
    "v3": SIT_V3,
    "aligned": ALIGNED,
}


def _draw(ids: Tensor, num_views: int = 1) -> Callable[[int], Tensor]:
    return lambda n: torch.cat([uniform(1, 0, ids, 17 + 64 * v, n) for v in range(num_views)])


def _plan(config: LocalConfig, num_images: int, num_views: int = 1, side_px: int = 64) -> LocalPlan:
    draw = _draw(torch.arange(num_images), num_views)
    return draw_local(config, num_images, num_views, side_px, 8, draw)


def _clean(num_images: int, side_px: int = 64) -> Tensor:
    unit = torch.rand(num_images, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    return normalize(unit, MEAN, STD)


def _noise(like: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


def _area(rectangles: Tensor) -> Tensor:
    return rectangles[..., 2] * rectangles[..., 3]


# --- what is planned


def test_presets_have_the_published_numbers() -> None:
    assert (SIT_V1.kind, SIT_V1.gray, SIT_V1.blur, SIT_V1.color) == ("rectangles", True, True, False)
    assert SIT_V1.drop_ratio == SIT_V1.replace_ratio == (0.0, 0.3)
    assert SIT_V1.fill == SIT_V2.fill == "noise"
    assert (SIT_V2.kind, SIT_V2.gray, SIT_V2.blur) == ("blocks", False, False)
    assert (SIT_V2.drop_ratio, SIT_V2.replace_ratio) == ((0.5, 0.7), (0.35, 0.35))
    assert (SIT_V3.kind, SIT_V3.fill) == ("blocks", "zeros")
    assert (SIT_V3.drop_ratio, SIT_V3.replace_ratio) == ((0.5, 0.5), (0.3, 0.3))
    for config in CONFIGS.values():
        assert LocalConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"drop_ratio": [0.4, 0.3]}, "'drop_ratio' is a range from low to high"),
        ({"replace_ratio": [0.0, 0.9]}, "less than or equal to 0.8"),
        ({"aligned": True}, "'aligned' is of kind 'blocks'"),
        ({"kind": "circles"}, "'rectangles' or 'blocks'"),
        ({"grey": True}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match="1 validation error") as error:
        LocalConfig.model_validate(settings)
    assert told in str(error.value)


@pytest.mark.parametrize("side_px", [64, 224])
def test_drops_cover_15_percent_and_with_replacements_27(side_px: int) -> None:
    """What the authors' code was measured to cover; the error of these means is 0.003."""
    plan = _plan(SIT_V1, 128000 // side_px, side_px=side_px)
    drop, swapped = covered(plan.drop, side_px), covered(plan.replace, side_px)
    assert abs(drop.float().mean() - 0.15) < 0.01
    assert abs((drop | swapped).float().mean() - 0.27) < 0.012


def test_rectangles_end_with_the_one_that_reaches_the_area() -> None:
    plan = _plan(LocalConfig(drop_ratio=(0.25, 0.25), replace_ratio=(0.1, 0.3)), 500)
    for areas, low, high in ((_area(plan.drop), 0.25, 0.25), (_area(plan.replace), 0.1, 0.3)):
        num = (areas > 0).sum(dim=1)
        assert (areas.cumsum(dim=1)[torch.arange(500), num - 1] == areas.sum(dim=1)).all()  # no gaps
        last = areas[torch.arange(500), num - 1]
        assert (areas.sum(dim=1) >= low * 64**2).all()
        assert (areas.sum(dim=1) - last < high * 64**2).all()
    mean = (_area(plan.replace).sum(dim=1) / 64**2).mean()
    assert abs(mean - 0.215) < 0.02  # 0.2, and half a rectangle's way beyond


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("kind", ["rectangles", "blocks"])
def test_there_are_enough_rectangles_for_all_but_one_in_a_thousand(kind: str, ratio: float) -> None:
    """At 39 px, where sides of whole px make the smallest rectangles."""
    side_px = 39
    config = LocalConfig(kind=kind, drop_ratio=(ratio, ratio), replace_ratio=(ratio, ratio))
    plan = _plan(config, 1000, side_px=side_px)
    assert (plan.drop.shape[1], plan.replace.shape[1]) == num_rectangles(config)
    if kind == "rectangles":
        reached = _area(plan.drop).sum(dim=1) / side_px**2
    else:
        reached = covered(plan.drop + plan.replace, side_px).float().mean(dim=(1, 2, 3))
    assert (reached < ratio - 1e-6).sum() <= 1


@pytest.mark.parametrize("side_px", [16, 32, 64, 224])
def test_rectangles_have_the_sides_of_the_paper(side_px: int) -> None:
    plan = _plan(LocalConfig(color=True), 400, side_px=side_px)
    least = max(1, int(0.05 * side_px))
    for rectangles, most in (
        *((part, side_px) for part in (plan.color, plan.gray, plan.blur)),
        *((part, int(0.25 * side_px)) for part in (plan.drop, plan.replace)),
    ):
        used = rectangles[_area(rectangles) > 0]
        assert used[:, 2:].amin() == least
        assert 0.9 * most <= used[:, 2:].amax() <= most
        assert used[:, :2].min() == 0
        assert (used[:, :2] + used[:, 2:]).max() == side_px
    blocks = _plan(SIT_V2, 100, side_px=side_px)
    used = torch.cat([blocks.drop, blocks.replace])[:, :, 2:]
    assert used.max() == max(1, int(0.3 * side_px))
    assert plan.blur_radius_px.unique().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert 0.1 <= plan.blur_sigma_px.min() < 0.2
    assert 5.0 < plan.blur_sigma_px.max() <= 5.1


@pytest.mark.parametrize("side_px", [32, 64])
@pytest.mark.parametrize("config", [SIT_V2, SIT_V3, ALIGNED])
def test_blocks_cover_their_ratio_and_less_than_one_block_more(config: LocalConfig, side_px: int) -> None:
    """T-SIT-4"""
    plan = _plan(config, 600, side_px=side_px)
    drops, swaps = _area(plan.drop).sum(dim=1) > 0, _area(plan.replace).sum(dim=1) > 0
    assert torch.equal(drops, ~swaps)  # each image one or the other
    assert abs(drops.float().mean() - 0.5) < 0.1
    block = max(0.09, 64 / side_px**2)  # a single patch is more at 32 px
    for chosen, rectangles, (low, high) in (
        (drops, plan.drop, config.drop_ratio),
        (swaps, plan.replace, config.replace_ratio),
    ):
        ratio = covered(rectangles, side_px).float().mean(dim=(1, 2, 3))[chosen]
        assert ratio.min() >= low
        assert ratio.max() < high + block
        if high > low and not config.aligned:
            assert abs(ratio.mean() - (low + high) / 2) < 0.02


def test_no_block_is_superfluous() -> None:
    """The number of blocks is that of a loop which stops as soon as enough pixels are covered."""
    plan = _plan(SIT_V2, 12, side_px=32)
    for i in range(12):
        rectangles = (plan.drop + plan.replace)[i].tolist()
        used = [rectangle for rectangle in rectangles if rectangle[2]]
        assert rectangles[: len(used)] == used
        seen: set[tuple[int, int]] = set()
        ratios = []
        for top, left, height, width in used:
            seen |= {(y, x) for y in range(top, top + height) for x in range(left, left + width)}
            ratios.append(len(seen) / 32**2)
        draw = float(_draw(torch.tensor([i]))(24)[0, 23])
        wanted = 0.5 + 0.2 * draw if _area(plan.drop[i]).any() else 0.35
        assert ratios[-1] >= wanted - 1e-6
        assert ratios[-2] < wanted


def test_aligned_blocks_are_whole_patches() -> None:
    plan = _plan(ALIGNED, 50)
    assert not (plan.drop % 8).any()
    assert not (plan.replace % 8).any()
    assert (plan.drop[..., 2].max(), plan.drop[..., 3].max()) == (16, 16)  # 30 % of 8 patches


def test_a_donor_is_the_same_view_of_another_image() -> None:
    plan = _plan(SIT_V1, 5, num_views=3)
    row = torch.arange(15)
    assert torch.equal(plan.donor // 5, row // 5)
    many = _plan(SIT_V1, 5, num_views=400, side_px=16).donor.view(400, 5) % 5
    for i in range(5):
        counts = many[:, i].bincount(minlength=5)
        assert counts[i] == 0
        assert (counts[torch.arange(5) != i] - 100).abs().max() < 43  # 5 standard deviations


def test_a_single_image_has_no_donor() -> None:
    for config in (SIT_V1, SIT_V2):
        plan = _plan(config, 1, num_views=2)
        assert plan.replace.shape == (2, 0, 4)
    assert (covered(plan.drop, 64).float().mean(dim=(1, 2, 3)) >= 0.5).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    """T-A-2: but for the donor"""
    whole = _plan(CONFIGS[name], 9, num_views=2)
    rows = torch.tensor([4, 7, 1])
    part = draw_local(CONFIGS[name], 3, 2, 64, 8, _draw(rows, 2))
    for field in fields(LocalPlan):
        if field.name != "donor":
            mine, full = getattr(part, field.name), getattr(whole, field.name)
            assert torch.equal(mine, full[torch.cat([rows, rows + 9])])


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_drawn_once(name: str) -> None:
    calls = []

    def draw(n: int) -> Tensor:
        calls.append(n)
        return _draw(torch.arange(4))(n)

    draw_local(CONFIGS[name], 4, 1, 64, 8, draw)
    assert len(calls) == 1


# --- what is done to pixels


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_outside_the_rectangles_and_the_target_stay_bit_identical(name: str) -> None:
    """T-SIT-3"""
    clean, plan = _clean(6), _plan(CONFIGS[name], 6)
    target = clean.clone()
    shown, changed = apply_local(clean, plan, MEAN, STD, _noise(clean))
    assert torch.equal(clean, target)
    assert changed.shape == (6, 1, 64, 64)
    inside = torch.zeros(6, 64, 64, dtype=torch.bool)
    for part in (plan.color, plan.gray, plan.blur, plan.drop, plan.replace):
        for i, rectangles in enumerate(part.tolist()):
            for top, left, height, width in rectangles:
                inside[i, top : top + height, left : left + width] = True
    assert torch.equal(changed[:, 0], inside)
    different = (shown != clean).any(dim=1)
    assert not (different & ~inside).any()
    assert (different == inside).float().mean() > 0.9  # a weak blur changes little


def _everywhere(plan: LocalPlan, *names: str) -> LocalPlan:
    """The corruptions `names` with one rectangle that is the whole view, and no others."""
    full, none = torch.tensor([0, 0, 64, 64]).expand(len(plan.donor), 1, 4), plan.drop[:, :0]
    parts = ("color", "gray", "blur", "drop", "replace")
    return replace(plan, **{name: full if name in names else none for name in parts})


def _slow_blur(images: Tensor, plan: LocalPlan) -> Tensor:
    return torch.stack(
        [
            reference.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)
            for image, radius, sigma in zip(
                images, plan.blur_radius_px.tolist(), plan.blur_sigma_px.tolist(), strict=True
            )
        ]
    )


def test_the_blur_is_torchvisions() -> None:
    clean, plan = _clean(8), _plan(SIT_V1, 8)
    shown, _ = apply_local(clean, _everywhere(plan, "blur"), MEAN, STD, None)
    torch.testing.assert_close(shown, _slow_blur(clean, plan), rtol=0, atol=1e-5)
    assert ((shown - clean).abs().amax(dim=(1, 2, 3)) > 1).sum() >= 6  # a sigma near 0.1 changes little


def test_corruptions_come_in_the_order_grey_blur_drop_replace() -> None:
    clean, plan = _clean(4), _plan(SIT_V1, 4)
    noise = _noise(clean)
    gray = clean.mean(dim=1, keepdim=True).expand_as(clean)  # the release's: of normalised channels
    expected = {
        ("gray",): gray,
        ("gray", "blur"): _slow_blur(gray, plan),
        ("gray", "blur", "drop"): noise(),
        ("gray", "blur", "drop", "replace"): clean[plan.donor],
    }
    for names, images in expected.items():
        shown, changed = apply_local(clean, _everywhere(plan, *names), MEAN, STD, noise)
        torch.testing.assert_close(shown, images, rtol=0, atol=1e-5)
        assert changed.all()


def test_another_image_is_shown_as_it_was_before_its_own_corruption() -> None:
    clean = _clean(4)
    plan = replace(_everywhere(_plan(SIT_V1, 4), "gray", "drop"), replace=_plan(SIT_V1, 4).replace)
    shown, _ = apply_local(clean, plan, MEAN, STD, None)
    place = covered(plan.replace, 64).expand_as(clean)
    assert place.any()
    assert torch.equal(shown[place], clean[plan.donor][place])
    assert (shown[~place] == 0).all()


def test_colours_are_jittered_in_the_space_of_pixels_and_before_the_rest() -> None:
    clean, plan = _clean(4), _plan(LocalConfig(color=True), 4)
    unit = clean * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert unit.min() > -1e-6
    jitter = JitterPlan(torch.ones(4, dtype=torch.bool), plan.color_factors, plan.color_order)
    colored = normalize(color_jitter(unit.clamp(0, 1), jitter), MEAN, STD)
    shown, _ = apply_local(clean, _everywhere(plan, "color"), MEAN, STD, None)
    torch.testing.assert_close(shown, colored)
    assert (shown - clean).abs().amax(dim=(1, 2, 3)).min() > 0.05
    both, _ = apply_local(clean, _everywhere(plan, "color", "gray"), MEAN, STD, None)
    torch.testing.assert_close(both, colored.mean(dim=1, keepdim=True).expand_as(clean))
    many = _plan(LocalConfig(color=True), 2000, side_px=16)
    low, high = many.color_factors.amin(dim=0), many.color_factors.amax(dim=0)
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), rtol=0, atol=0.005)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), rtol=0, atol=0.005)
    assert len({tuple(row) for row in many.color_order.tolist()}) == 24


def test_noise_is_asked_for_only_where_there_is_a_drop() -> None:
    def noise() -> Tensor:
        raise AssertionError("nobody needs noise")

    clean, plan = _clean(4), _plan(SIT_V3, 4)
    without = LocalConfig(drop_ratio=(0.0, 0.0))
    shown, _ = apply_local(clean, _plan(without, 4), MEAN, STD, noise)
    assert (shown != clean).any()
    zeros, _ = apply_local(clean, plan, MEAN, STD, None)
    assert (zeros[covered(plan.drop, 64).expand_as(zeros)] == 0).all()
    with pytest.raises(AssertionError, match="nobody"):
        apply_local(clean, plan, MEAN, STD, noise)


# --- noise


def test_noise_is_normal() -> None:
    ids = torch.arange(20)
    noise = standard_normal(0, torch.zeros_like(ids), ids, 18, (3, 60, 60))
    assert noise.shape == (20, 3, 60, 60)
    assert noise.dtype == torch.float32
    values = noise.flatten().double().sort().values
    cumulative = 0.5 * (1 + torch.erf(values / math.sqrt(2)))
    observed = (torch.arange(len(values)) + 0.5) / len(values)
    assert (cumulative - observed).abs().max() < 1.63 / math.sqrt(len(values))  # Kolmogorov, at 1 %
    assert 4 < noise.abs().max() < 5.8
    neighbors = noise.flatten()
    half = neighbors.view(20, -1)  # the two of a pair are half a sample apart
    for first, second in (
        (neighbors[:-1], neighbors[1:]),
        (half[:, :5400], half[:, 5400:]),
        (noise[0], noise[1]),
    ):
        assert abs((first * second).mean()) < 5 / math.sqrt(first.numel())
        assert abs((first.square() * second.square()).mean() - 1) < 20 / math.sqrt(first.numel())


def test_noise_belongs_to_a_sample_and_its_stream() -> None:
    """T-A-2"""
    ids, epochs = torch.tensor([5, 9, 2**40]), torch.tensor([0, 3, 3])
    streams = torch.tensor([18, 82, 18])
    noise = standard_normal(7, epochs, ids, streams, (3, 5, 5))  # 75 numbers: an odd count
    for i in range(3):
        alone = standard_normal(7, epochs[i : i + 1], ids[i : i + 1], int(streams[i]), (3, 5, 5))
        assert torch.equal(alone[0], noise[i])
    others = [
        standard_normal(8, epochs, ids, streams, (3, 5, 5)),
        standard_normal(7, epochs + 1, ids, streams, (3, 5, 5)),
        standard_normal(7, epochs, ids + 1, streams, (3, 5, 5)),
        standard_normal(7, epochs, ids, streams + 1, (3, 5, 5)),
    ]
    for other in others:
        assert (other != noise).float().mean() > 0.99


def test_noise_worked_by_hand() -> None:
    number = int(bits(7, torch.tensor([0]), torch.tensor([5]), 18, 1)[0, 0])
    radius = math.sqrt(-2 * math.log(((number >> 40) % 2**24 + 1) / 2**24))
    angle = 2 * math.pi * (number % 2**24) / 2**24
    noise = standard_normal(7, torch.tensor([0]), torch.tensor([5]), 18, (2,))
    torch.testing.assert_close(noise, torch.tensor([[radius * math.cos(angle), radius * math.sin(angle)]]))
