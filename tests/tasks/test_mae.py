"""MAE: which pixels count, what the encoder gets, and what learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from example_views import LAYOUT, SETTINGS, SITE, example_views, suited
from small_multitask import VIT, repaint, small_inputs, small_multitask
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig
from pretrain.peers import ALONE
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskOutput, TaskSite
from pretrain.tasks.hidden_patches import normalize_patches
from pretrain.tasks.mae import MaeConfig, MaeTask, unsuited
from pretrain.tokens import TokenLayout
from pretrain.views.masks import MaskConfig, MaskPlan
from pretrain.views.pixels import patchify, unpatchify
from pretrain.views.plan import ViewConfig

VIEWS = {"one": ViewConfig(size_px=32, mask=MaskConfig(kind="random"))}
SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
NUM_KEPT = 16  # a quarter of 8 x 8


class Answer(nn.Module):
    """A decoder that has its answer already, and notes what it was given."""

    def __init__(self, patches: Tensor) -> None:
        super().__init__()
        self.patches = patches
        self.given: list[Tensor] = []

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        self.given.append(tokens)
        return self.patches


def answered(views: EncodedViews, patches: Tensor, **settings: object) -> TaskOutput:
    task = MaeTask(MaeConfig(**(SETTINGS["mae"] | settings)), SITE)
    task.decoder = Answer(patches)
    output: TaskOutput = task(views, ALONE)
    return output


def hidden_of(views: EncodedViews) -> Tensor:
    assert views.plan.mask is not None
    return views.plan.mask.hidden


@pytest.mark.parametrize("norm_pix", [False, True])
def test_only_hidden_patches_count(norm_pix: bool) -> None:
    """T-MAE-2: answers about visible patches change nothing, answers about hidden ones do."""
    views = suited("mae", example_views())
    hidden = hidden_of(views).unsqueeze(2)
    answer = torch.randn(8, 16, 48, dtype=torch.float64, requires_grad=True)
    output = answered(views, answer, norm_pix=norm_pix)
    (gradient,) = torch.autograd.grad(output.loss, answer)
    assert torch.equal((gradient != 0).any(dim=2, keepdim=True), hidden)
    elsewhere = answered(views, answer + 7.0 * ~hidden, norm_pix=norm_pix)
    assert torch.equal(elsewhere.loss, output.loss)
    assert answered(views, answer + 7.0 * hidden, norm_pix=norm_pix).loss > output.loss + 1


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_right_answer_costs_nothing(norm_pix: bool) -> None:
    """T-MAE-3: the target is the normalised clean view, cut into patches."""
    views = suited("mae", example_views())
    assert views.whole is not None
    patches = patchify(views.whole, SITE.patch_px)
    answer = normalize_patches(patches) if norm_pix else patches
    output = answered(views, answer, norm_pix=norm_pix)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-12)
    assert output.metrics["chance"].item() > 0.1


@pytest.mark.parametrize(("patch_px", "expected"), [(4, 0.97917), (16, 0.99870)])
def test_an_answer_of_zero_costs_n_minus_one_over_n(patch_px: int, expected: float) -> None:
    """T-MAE-3: normalised by the unbiased variance, n values of a patch have a mean square of (n - 1) / n."""
    side_px = 4 * patch_px
    views = example_views()
    clean = torch.rand(8, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    views = suited("mae", replace(views, clean=clean, whole=(clean - 0.45) / 0.25))
    task = MaeTask(MaeConfig(**SETTINGS["mae"]), replace(SITE, patch_px=patch_px))
    task.decoder = Answer(torch.zeros(8, 16, 3 * patch_px**2))
    output = task(views, ALONE)
    assert output.loss.item() == pytest.approx(expected, abs=2e-5)
    assert output.metrics["chance"].item() == pytest.approx(expected, abs=2e-5)


def test_a_patch_of_one_color_has_a_target_of_zero() -> None:
    """var / (var + 1e-6) is 0 there, so nothing is divided by zero."""
    views = suited("mae", example_views())
    assert views.whole is not None
    output = answered(replace(views, whole=torch.full_like(views.whole, 0.7)), torch.zeros(8, 16, 48))
    assert output.loss.item() == pytest.approx(0.0, abs=1e-12)


def test_without_norm_pix_chance_is_the_mean_color_of_what_is_shown() -> None:
    """Hidden patches 0.7, shown ones 0.2: answers of 0 cost 0.49, chance 0.25."""
    views = suited("mae", example_views())
    patches = torch.where(hidden_of(views).unsqueeze(2), 0.7, 0.2).expand(8, 16, 48).double()
    views = replace(views, whole=unpatchify(patches, SITE.patch_px, 4))
    output = answered(views, torch.zeros(8, 16, 48), norm_pix=False)
    assert output.loss.item() == pytest.approx(0.49)
    assert output.metrics["chance"].item() == pytest.approx(0.25)


def test_chance_keeps_the_channels_apart() -> None:
    """Shown patches (0, 1, 2), hidden ones (0, 1, 5): only the third channel errs, by 3; 9 / 3."""
    views = suited("mae", example_views())
    shown, hidden = (torch.tensor(color).repeat(16) for color in ([0.0, 1.0, 2.0], [0.0, 1.0, 5.0]))
    patches = torch.where(hidden_of(views).unsqueeze(2), hidden, shown).double()
    views = replace(views, whole=unpatchify(patches, SITE.patch_px, 4))
    assert answered(views, patches, norm_pix=False).metrics["chance"].item() == pytest.approx(3.0)


@pytest.mark.parametrize("has_class_token", [True, False])
def test_the_decoder_gets_the_class_token_and_the_kept_patches_only(has_class_token: bool) -> None:
    layout = TokenLayout((4, 4), LAYOUT.registers, has_class_token)
    views = suited("mae", example_views(layout=layout))
    task = MaeTask(MaeConfig(**SETTINGS["mae"]), TaskSite(layout, SITE.embed_dim, SITE.patch_px)).double()
    assert task.decoder.num_prefix == int(has_class_token)
    task.decoder = Answer(torch.zeros(8, 16, 48))
    task(views, ALONE)
    (given,) = task.decoder.given
    assert torch.equal(given[:, -6:], layout.patches(views.tokens))
    assert given.shape[1] == 6 + int(has_class_token)
    if has_class_token:
        assert torch.equal(given[:, 0], views.tokens[:, 0])


# --- through a real encoder


def test_the_encoder_gets_the_class_token_and_a_quarter_of_the_patches() -> None:
    """T-MAE-4."""
    model = small_multitask({"mae": SMALL}, VIEWS)
    lengths: list[int] = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, given, output: lengths.append(output.shape[1]))
    model(small_inputs(VIEWS))
    assert lengths == [1 + NUM_KEPT] * 2


def test_what_was_dropped_does_not_reach_the_encoder_but_is_the_target() -> None:
    """T-MAE-5."""
    model, inputs = small_multitask({"mae": SMALL}, VIEWS), small_inputs(VIEWS)
    mask = inputs.groups[0].plan.mask
    assert isinstance(mask, MaskPlan)
    given: list[Tensor] = []
    model.tasks["mae"].decoder.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    where_half_of_each = mask.hidden & (torch.arange(64) % 2 == 0)
    losses = [
        model(one)["loss/mae"]
        for one in (inputs, repaint(inputs, where_half_of_each), repaint(inputs, ~mask.hidden))
    ]
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])
    # with norm_pix a patch that is brighter all over has the same target: another loss shows in raw pixels
    raw = small_multitask({"mae": SMALL | {"norm_pix": False}}, VIEWS)
    assert raw(inputs)["loss/mae"] != raw(repaint(inputs, where_half_of_each))["loss/mae"]
    assert losses[0] == pytest.approx(losses[1])


def test_encoder_decoder_and_mask_token_learn_and_positions_do_not() -> None:
    """T-MAE-6: positions are fixed tables in the encoder and in the decoder."""
    fixed = VIT.model_copy(update={"pos_embed": "sincos", "init": "mae"})
    model = small_multitask({"mae": SMALL}, VIEWS, fixed)
    model(small_inputs(VIEWS))["total"].backward()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in learning.values())
    assert {"backbone.cls_token", "tasks.mae.decoder.mask_token"} <= learning.keys()
    assert "backbone.pos_embed" not in learning
    assert model.mask_token is None  # the encoder needs none


def test_every_sample_and_epoch_is_masked_in_its_own_way() -> None:
    """T-MAE-7 and T-MAE-1, as the task meets them: 48 of 64 patches are hidden, the others kept."""
    masks = [small_inputs(VIEWS, num_images=4, seed=seed).groups[0].plan.mask for seed in (0, 0, 1)]
    first, again, other = masks
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.hidden, again.hidden)
    assert not torch.equal(first.hidden, other.hidden)
    assert len({tuple(row) for row in first.hidden.tolist()}) == 4
    assert first.kept is not None
    kept = torch.zeros(4, 64, dtype=torch.bool).scatter(1, first.kept, True)
    assert torch.equal(kept, ~first.hidden)
    assert first.kept.shape == (4, NUM_KEPT)


# --- where it fits


def test_it_wants_dropped_patches_and_a_decoder_that_divides() -> None:
    model = BackboneConfig(img_px=32, patch_px=4)
    around = Surroundings(VIEWS, model, LAYOUT)
    assert unsuited(MaeConfig(), around) is None
    told = unsuited(MaeConfig(decoder_dim=192, decoder_heads=5), around)
    assert told == "decoder_dim 192 is not a multiple of 4 and of decoder_heads, 5; use 180 or 200"
    whole = {"one": ViewConfig(size_px=32)}
    told = unsuited(MaeConfig(), replace(around, views=whole))
    assert told is not None
    assert "view 'one' shows them all" in told
