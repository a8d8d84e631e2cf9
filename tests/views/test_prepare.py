"""Views of several shapes from one batch of crops: what each network input shows, and what goes together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.views import pixels
from pretrain.views.local import LocalConfig
from pretrain.views.masks import MaskConfig
from pretrain.views.plan import (
    JitterConfig,
    PatchConfig,
    ViewConfig,
    crop_boxes,
    draw_view_plan,
    encoder_calls,
    in_places,
    stream_indices,
)
from pretrain.views.prepare import Inputs, Recipe, prepare

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = ViewConfig(size_px=16, flip_prob=0.0, jitter=JitterConfig(prob=0.0), gray_prob=0.0)
NUM_IMAGES = 5


def crops_of(views: dict[str, ViewConfig]) -> list[Tensor]:
    """Random crops; those of one size are equal in all views of it."""
    sizes = list(dict.fromkeys(view.size_px for view in views.values()))
    generator = torch.Generator().manual_seed(0)
    crops = []
    for size in sizes:
        count = sum(view.size_px == size for view in views.values())
        shape = (1, NUM_IMAGES, size, size, 3)
        crops.append(
            torch.randint(256, shape, dtype=torch.uint8, generator=generator).repeat(count, 1, 1, 1, 1)
        )
    return crops


def prepared(views: dict[str, ViewConfig], needs_whole: bool = False, micro_step: int = 0) -> Inputs:
    recipe = Recipe(views, PatchConfig((4, 4), 4), MEAN, STD, needs_whole=needs_whole)
    ids = torch.arange(100, 100 + NUM_IMAGES)
    return prepare(recipe, 0, crops_of(views), torch.zeros_like(ids), ids, micro_step)


def changed(view: ViewConfig, **settings: object) -> ViewConfig:
    return ViewConfig.model_validate({**view.model_dump(exclude_unset=True), **settings})


def test_views_of_one_shape_share_an_encoder_call_in_order_of_mention() -> None:
    views = {
        "global one": PLAIN,
        "local one": changed(PLAIN, size_px=8),
        "global two": changed(PLAIN, flip_prob=1.0),
        "local two": changed(PLAIN, size_px=8),
        "masked": changed(PLAIN, mask=MaskConfig()),
    }
    assert encoder_calls(views) == (("global one", "global two"), ("local one", "local two"), ("masked",))
    inputs = prepared(views)
    assert [group.names for group in inputs.groups] == list(encoder_calls(views))
    assert [tuple(group.images.shape) for group in inputs.groups] == [
        (10, 3, 16, 16), (10, 3, 8, 8), (5, 3, 16, 16),
    ]  # fmt: skip
    first, mirrored = inputs.groups[0].clean.split(NUM_IMAGES)
    assert torch.equal(first, mirrored.flip(3))  # each view got its own crops and its own numbers
    assert torch.equal(inputs.groups[2].clean, first)


def test_a_view_like_another_shows_the_same_whatever_else_is_hidden() -> None:
    colored = changed(PLAIN, jitter=JitterConfig(prob=1.0), flip_prob=0.5, turn=True)
    views = {"one": colored, "two": colored, "masked": changed(colored, like="two", mask=MaskConfig())}
    assert stream_indices(views) == (0, 1, 1)
    together, alone = prepared(views).groups
    one, two = together.clean.split(NUM_IMAGES)
    assert torch.equal(alone.clean, two)
    assert not torch.equal(one, two)
    ids = torch.arange(NUM_IMAGES)
    size = torch.full_like(ids, 50)
    boxes = [
        crop_boxes(view, 3, torch.zeros_like(ids), ids, place, size, size)
        for place, view in enumerate(in_places(views))
    ]
    assert torch.equal(boxes[1], boxes[2])
    assert not torch.equal(boxes[0], boxes[1])


def test_fixed_turns_give_all_four_rotations_of_one_view_and_their_labels() -> None:
    views = {f"turn {k}": changed(PLAIN, like="turn 0", fixed_turn=k) for k in range(4)}
    (group,) = prepared(views).groups
    upright, *turned = group.clean.split(NUM_IMAGES)
    for k, view in enumerate(turned, start=1):
        assert torch.equal(view, torch.rot90(upright, -k, dims=(2, 3)))
    assert group.plan.quarter_turns.tolist() == [k for k in range(4) for _ in range(NUM_IMAGES)]


@pytest.mark.parametrize(("border", "mode"), [("black", "constant"), ("mirror", "reflect")])
def test_a_shifted_view_is_a_random_crop_of_the_padded_image(border: str, mode: str) -> None:
    images = torch.randint(256, (60, 9, 9, 3), dtype=torch.uint8)
    shift = torch.randint(-4, 5, (60, 2))
    shift[:4] = torch.tensor([[4, 4], [-4, -4], [4, -4], [0, 0]])
    found = pixels.shift(images, shift, border)  # type: ignore[arg-type]
    padded = F.pad(images.permute(0, 3, 1, 2).float(), (4, 4, 4, 4), mode=mode)
    for image, (down, right), wide in zip(found, shift.tolist(), padded, strict=True):
        expected = wide[:, 4 - down : 13 - down, 4 - right : 13 - right]
        assert torch.equal(image.permute(2, 0, 1).float(), expected)


def test_shifts_reach_every_offset_equally_often() -> None:
    ids = torch.arange(9000)
    view = changed(PLAIN, shift_px=1)
    plan = draw_view_plan([view], None, 0, torch.zeros_like(ids), ids)
    assert plan.shift_px is not None
    counts = (plan.shift_px + 1).mul(torch.tensor([3, 1])).sum(dim=1).bincount(minlength=9)
    assert (counts - 1000).abs().max() < 150


def test_augmented_patches_stay_in_place_and_each_is_changed_on_its_own() -> None:
    views = {"one": changed(PLAIN, patch_augment=True)}
    (group,) = prepared(views, needs_whole=True).groups
    assert group.whole is not None
    differs = (group.images != group.whole).any(dim=1).unflatten(1, (4, 4)).unflatten(3, (4, 4))
    assert differs.any(dim=(2, 4)).all()  # a crop of 3 of 4 px, resized back, changes any random patch
    assert group.plan.tiles.index.tolist() == [list(range(16))] * NUM_IMAGES
    other = prepared({"one": views["one"], "two": PLAIN}).groups[1]
    torch.testing.assert_close(group.whole, other.images)


def test_jitter_after_normalisation_clamps_jittered_patches_to_one_and_no_others() -> None:
    """T-RV: the release's quirk, by request; without it patches are jittered in [0, 1]."""
    view = changed(PLAIN, patch_augment=True, legacy_jitter_after_norm=True)
    (group,) = prepared({"one": view}).groups
    patches = pixels.split_patches(group.images, 4).flatten(0, 1)
    jittered = group.plan.tiles.jitter.apply & ~group.plan.tiles.gray.flatten()
    assert patches[jittered].min() >= 0
    assert patches[jittered].max() <= 1
    assert patches[~group.plan.tiles.jitter.apply].min() < 0


def test_shuffled_places_show_the_patch_that_the_plan_names() -> None:
    """T-RV-4, the contents."""
    (group,) = prepared({"one": changed(PLAIN, shuffle=True)}, needs_whole=True).groups
    assert group.whole is not None
    order = group.plan.patches.shuffled
    assert order is not None
    assert torch.equal(order.sort(dim=1).values, torch.arange(16).expand(NUM_IMAGES, -1))
    shown, source = (pixels.split_patches(images, 4) for images in (group.images, group.whole))
    for image in range(NUM_IMAGES):
        assert torch.equal(shown[image], source[image, order[image]])
    assert len({tuple(row) for row in order.tolist()}) == NUM_IMAGES


def test_local_corruption_spares_the_target_and_every_pixel_it_does_not_claim() -> None:
    """T-SIT-3."""
    (group,) = prepared({"one": changed(PLAIN, local=LocalConfig())}).groups
    assert group.whole is not None
    assert group.changed is not None
    torch.testing.assert_close(group.whole, pixels.normalize(group.clean, MEAN, STD))
    kept = ~group.changed.expand_as(group.images)
    assert torch.equal(group.images[kept], group.whole[kept])
    assert 0.05 < group.changed.float().mean() < 0.95
    again = prepared({"one": changed(PLAIN, local=LocalConfig())}).groups[0]
    assert torch.equal(group.images, again.images)


def test_masks_follow_the_images_and_shared_sizes_follow_the_micro_step() -> None:
    random = {"one": changed(PLAIN, mask=MaskConfig())}
    first, second = (prepared(random, micro_step=step).groups[0].plan.mask for step in (0, 1))
    assert first is not None
    assert second is not None
    assert torch.equal(first.hidden, second.hidden)
    assert first.kept is not None
    assert first.kept.shape == (NUM_IMAGES, 4)


def test_the_rows_of_a_plan_are_the_plan_of_those_rows() -> None:
    view = changed(PLAIN, turn=True, mask=MaskConfig(), local=LocalConfig(), shift_px=2)
    ids = torch.arange(6)
    patches = PatchConfig((4, 4), 4, colorization=1, pairs=1, jigsaw=2)

    def draw(sample_ids: Tensor) -> object:
        return draw_view_plan([view], patches, 0, torch.zeros_like(sample_ids), sample_ids)

    picked, drawn = draw(ids).rows(torch.tensor([4, 1])), draw(ids[[4, 1]])  # type: ignore[attr-defined]
    for part in ("quarter_turns", "shift_px", "gray"):
        assert torch.equal(getattr(picked, part), getattr(drawn, part))
    for owner, part in (("patches", "jigsaw"), ("patches", "pairs"), ("mask", "kept"), ("local", "drop")):
        assert torch.equal(getattr(getattr(picked, owner), part), getattr(getattr(drawn, owner), part))
    assert torch.equal(picked.tiles.jitter.factors, drawn.tiles.jitter.factors)
    assert picked.patches.shuffled is None


def test_likeness_is_followed_to_its_end_and_a_circle_is_refused() -> None:
    views = {"a": PLAIN, "b": changed(PLAIN, like="a"), "c": changed(PLAIN, like="b"), "d": PLAIN}
    assert stream_indices(views) == (0, 0, 0, 3)
    circle = {"a": changed(PLAIN, like="b"), "b": changed(PLAIN, like="a")}
    with pytest.raises(ValueError, match="a and b are like each other"):
        stream_indices(circle)
    assert stream_indices({"a": changed(PLAIN, like="a")}) == (0,)


def test_views_with_other_borders_are_made_apart() -> None:
    views = {"one": changed(PLAIN, shift_px=4), "two": changed(PLAIN, shift_px=4, shift_border="mirror")}
    recipe = Recipe(views, PatchConfig((4, 4), 4), MEAN, STD)
    white = torch.full((2, 64, 16, 16, 3), 255, dtype=torch.uint8)
    ids = torch.arange(64)
    black, mirrored = prepare(recipe, 0, white, torch.zeros_like(ids), ids).groups
    assert (black.clean == 0).any()
    assert (mirrored.clean == 1).all()
