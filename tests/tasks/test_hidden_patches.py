"""What tasks about hidden patches share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from example_views import LAYOUT

from pretrain.models.backbone import BackboneConfig
from pretrain.peers import ALONE, Peers
from pretrain.tasks.contract import Surroundings
from pretrain.tasks.hidden_patches import hidden_mean, refuse_views, refuse_width, squared_error
from pretrain.views.masks import MaskConfig
from pretrain.views.plan import ViewConfig

MODEL = BackboneConfig(img_px=32, patch_px=4)
RANDOM = ViewConfig(size_px=32, mask=MaskConfig())
TOKEN = ViewConfig(size_px=32, mask=MaskConfig(kind="block"))
WHOLE = ViewConfig(size_px=32)
BLOCKS = ViewConfig(size_px=32, mask=MaskConfig(kind="multiblock"))


def around(view: ViewConfig, model: BackboneConfig = MODEL) -> Surroundings:
    return Surroundings({"one": view}, model, LAYOUT)


def test_the_mean_is_over_hidden_patches_and_not_over_images() -> None:
    """One patch of the first image errs by 4, three of the second by 0: 4 / 4, not (4 + 0) / 2."""
    errors = torch.full((2, 4, 3), 100.0)
    hidden = torch.tensor([[False, True, False, False], [True, True, False, True]])
    errors[hidden] = 0.0
    errors[0, 1] = 4.0
    assert hidden_mean(errors, hidden, ALONE).item() == 1.0


def test_what_is_not_hidden_has_no_influence_even_where_it_is_not_finite() -> None:
    errors = torch.tensor([[[torch.inf], [2.0]]], requires_grad=True)
    mean = hidden_mean(errors, torch.tensor([[False, True]]), ALONE)
    mean.backward()
    assert mean.item() == 2.0
    assert errors.grad is not None
    assert errors.grad.flatten().tolist() == [0.0, 1.0]


def test_ranks_share_one_count() -> None:
    """This rank has 1 hidden patch, the other 3: its share of the mean over 4 is 8 / 4 * 2 ranks."""
    other = Peers(rank=0, world_size=2, sum=lambda local: local + 3)
    errors = torch.full((1, 2, 1), 8.0)
    assert hidden_mean(errors, torch.tensor([[True, False]]), other).item() == 4.0


def test_a_batch_without_hidden_patches_costs_nothing_and_has_a_gradient() -> None:
    errors = torch.ones(1, 2, 3, requires_grad=True)
    mean = hidden_mean(errors, torch.zeros(1, 2, dtype=torch.bool), ALONE)
    mean.backward()
    assert mean.item() == 0.0
    assert errors.grad is not None


def test_squared_errors_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        error = squared_error(torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([1.0]))
    assert error.dtype == torch.float32
    assert error.item() == 4.0


@pytest.mark.parametrize(
    ("view", "how", "kinds", "told"),
    [
        (RANDOM, "drop", (), None),
        (BLOCKS, "drop", (), None),
        (BLOCKS, "drop", ("multiblock",), None),
        (TOKEN, "token", (), None),
        (WHOLE, "drop", (), "give it a mask (mask.how: drop)"),
        (WHOLE, "drop", ("multiblock",), "give it a mask (mask: {kind: multiblock, how: drop})"),
        (TOKEN, "drop", (), "the mask of view 'one' (kind: block, how: token); use mask.how: drop"),
        (RANDOM, "token", (), "(kind: random, how: drop); use mask.how: token"),
        (RANDOM, "drop", ("multiblock",), "use mask: {kind: multiblock, how: drop}"),
        (RANDOM.model_copy(update={"size_px": 16}), "drop", (), "views of 32 px, and view 'one' is of 16"),
        (TOKEN.model_copy(update={"size_px": 16}), "token", (), None),
    ],
)
def test_views_whose_patches_are_not_hidden_as_needed_are_refused(
    view: ViewConfig, how: str, kinds: tuple[str, ...], told: str | None
) -> None:
    reason = refuse_views(around(view), how, kinds)
    assert reason is None if told is None else told in (reason or "")


def test_a_swin_is_refused() -> None:
    swin = replace(around(RANDOM), model=BackboneConfig(name="swin_tiny_patch4_window7_224", patch_px=4))
    assert "use a ViT" in (refuse_views(swin, "drop") or "")


@pytest.mark.parametrize(
    ("dim", "num_heads", "told"),
    [
        (192, 3, None),
        (512, 16, None),
        (100, 3, "width 100 is not a multiple of 4 and of heads, 3; use 96 or 108"),
        (6, 2, "use 4 or 8"),
        (10, 3, "use 12"),
    ],
)
def test_a_width_must_divide_into_heads_and_positions(dim: int, num_heads: int, told: str | None) -> None:
    reason = refuse_width("width", dim, "heads", num_heads)
    assert reason is None if told is None else told in (reason or "")
