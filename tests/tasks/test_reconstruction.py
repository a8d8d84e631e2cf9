"""Reconstruction: SiT's head, which pixels count, and its three losses together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from example_views import LAYOUT, SITE, example_views, with_patches
from small_multitask import small_inputs, small_multitask
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig
from pretrain.peers import ALONE
from pretrain.tasks import TASKS
from pretrain.tasks.balance import Balance, BalanceConfig
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskOutput
from pretrain.tasks.reconstruction import ReconstructionConfig, ReconstructionTask, guess, unsuited
from pretrain.views.local import SIT_V1, SIT_V2, SIT_V3
from pretrain.views.masks import MaskConfig
from pretrain.views.pixels import patchify
from pretrain.views.plan import ViewConfig

SIT = {
    "contrastive": {"temperature": 0.5, "hidden_dim": 8, "out_dim": 8},
    "rotation": {},
    "reconstruction": {},
}
VIEWS = {name: ViewConfig(size_px=32, turn=True, local=SIT_V1) for name in ("one", "two")}


def task_of(**settings: object) -> ReconstructionTask:
    torch.manual_seed(0)
    return ReconstructionTask(ReconstructionConfig(**settings), SITE).double()


def answered(views: EncodedViews, images: Tensor, **settings: object) -> TaskOutput:
    """With tokens that are the answer and a head that passes them on."""
    task = task_of(**settings)
    task.head = nn.Identity()
    output: TaskOutput = task(with_patches(views, patchify(images, SITE.patch_px)), ALONE)
    return output


def whole_and_changed(views: EncodedViews) -> tuple[Tensor, Tensor]:
    assert views.whole is not None
    assert views.changed is not None
    return views.whole, views.changed


# --- head


def test_the_head_is_the_transposed_convolution_of_the_release() -> None:
    """T-SIT-5: a stride of one patch, and the linear layer's weights in another order."""
    task, views = task_of(), example_views()
    (linear,) = task.head
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([0.1, -0.2, 0.3]).repeat(16))  # one for each channel, as there
    side = SITE.patch_px
    kernel = linear.weight.reshape(side, side, 3, 48).permute(3, 2, 0, 1)  # (D, 3, P, P)
    tokens = views.layout.patches(views.tokens).mT.unflatten(2, views.layout.grid)  # (M, D, h, w)
    expected = F.conv_transpose2d(tokens, kernel, linear.bias[:3], stride=side)
    torch.testing.assert_close(task.images(views), expected)


def test_later_versions_have_hidden_layers_before_it() -> None:
    kinds = [type(layer) for layer in task_of(hidden_layers=2).head]
    assert kinds == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert [layer.out_features for layer in task_of(hidden_layers=2).head[::2]] == [48, 48, 48]


# --- which pixels count


def test_the_right_answer_is_the_normalised_clean_view() -> None:
    views = example_views()
    whole, _ = whole_and_changed(views)
    for where in ("all", "changed"):
        assert answered(views, whole, where=where).loss.item() == 0.0
        assert answered(views, whole - 0.25, where=where).loss.item() == pytest.approx(0.25)


def test_answers_outside_the_damage_count_in_the_first_version_only() -> None:
    """T-SIT-4, second half."""
    views = example_views()
    whole, changed = whole_and_changed(views)
    outside, inside = torch.where(changed, whole, 9.0), torch.where(changed, 9.0, whole)
    assert answered(views, outside, where="changed").loss.item() == 0.0
    assert answered(views, inside, where="changed").loss.item() > 5
    assert answered(views, outside, where="all").loss.item() > 5
    task = task_of(where="changed")
    task.head = nn.Identity()
    answer = patchify(torch.randn_like(whole), SITE.patch_px).requires_grad_()
    task(with_patches(views, answer), ALONE).loss.backward()
    assert answer.grad is not None
    damaged = patchify(changed.expand_as(whole), SITE.patch_px)
    assert torch.equal(answer.grad != 0, damaged)


def test_every_damaged_pixel_counts_as_much_as_any_other() -> None:
    """30 damaged pixels in one view and 10 in another; those of the first err by 0.4: 0.3, not 0.2."""
    views = example_views(1)
    whole, _ = whole_and_changed(views)
    changed = torch.zeros(2, 256, dtype=torch.bool)
    changed[0, :30], changed[1, 100:110] = True, True
    answer = whole.clone()
    answer[0] += 0.4
    views = replace(views, changed=changed.reshape(2, 1, 16, 16))
    assert answered(views, answer, where="changed").loss.item() == pytest.approx(0.3)


def test_views_without_damage_cost_nothing_and_still_give_the_head_a_gradient() -> None:
    views = example_views()
    _, changed = whole_and_changed(views)
    task = task_of(where="changed")
    output = task(replace(views, changed=torch.zeros_like(changed)), ALONE)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in task.parameters())


# --- chance


def test_a_guess_keeps_what_is_known_and_paints_the_rest_in_its_mean_color() -> None:
    """Known pixels 1, 2, 3 of one channel, a damaged one: 2."""
    target = torch.tensor([[1.0, 2.0], [3.0, 50.0]]).expand(1, 3, 2, 2)
    changed = torch.tensor([[False, False], [False, True]]).expand(1, 1, 2, 2)
    assert guess(target, changed)[0, 0].tolist() == [[1.0, 2.0], [3.0, 2.0]]
    assert guess(target, None)[0, 0].tolist() == [[14.0, 14.0], [14.0, 14.0]]
    assert guess(target, torch.ones_like(changed)).abs().max() == 0.0  # the mean colour of the data set


def test_chance_is_the_error_of_that_guess_where_pixels_count() -> None:
    """A quarter of the view is damaged; it holds 2 where the rest holds 1."""
    views = example_views()
    whole, changed = whole_and_changed(views)
    damaged = torch.zeros_like(changed)
    damaged[:, :, :8, :8] = True
    views = replace(views, changed=damaged, whole=torch.where(damaged, 2.0, 1.0).expand_as(whole).double())
    answer = torch.zeros_like(whole)
    assert answered(views, answer, where="changed").metrics["chance"].item() == pytest.approx(1.0)
    assert answered(views, answer, where="all").metrics["chance"].item() == pytest.approx(0.25)


# --- with the other tasks of SiT


def test_each_task_reads_its_own_token() -> None:
    """T-SIT-6: with the tokens of rotation and contrast swapped both answers change, not the pixels."""
    views = example_views()
    register = 1 + LAYOUT.registers.index("rotation")
    order = list(range(LAYOUT.num_tokens))
    order[0], order[register] = register, 0
    swapped = replace(views, tokens=views.tokens[:, order])
    for name, changes in (("contrastive", True), ("rotation", True), ("reconstruction", False)):
        torch.manual_seed(0)
        task = TASKS[name].task(TASKS[name].config(**SIT[name]), SITE).double()
        losses = [task(one, ALONE).loss for one in (views, swapped)]
        assert (losses[0] != losses[1]) == changes, name


@pytest.mark.parametrize("silent", SIT)
def test_a_loss_of_weight_zero_leaves_its_head_without_gradient(silent: str) -> None:
    """T-SIT-6, second half."""
    model = small_multitask(SIT, VIEWS, weights={silent: 0.0})
    model(small_inputs(VIEWS))["total"].backward()
    for name, task in model.tasks.items():
        gradients = [parameter.grad for parameter in task.parameters()]
        assert any(g is not None and g.any() for g in gradients) == (name != silent)


def test_the_three_losses_are_balanced_as_softmax_softmax_and_laplace() -> None:
    """T-SIT-7: from a log variance of 1 the weights are 0.368, 0.368 and 0.607, and the gradients those of
    exp(-s) L + s / 2, or exp(-s / 2) L + s / 2 for pixels."""
    likelihoods = {name: TASKS[name].likelihood_of(TASKS[name].config(**SIT[name])) for name in SIT}
    balance = Balance(likelihoods, dict.fromkeys(SIT, 1.0), BalanceConfig(initial_log_variance=1.0))
    losses = {
        "contrastive": torch.tensor(4.0),
        "rotation": torch.tensor(1.386),
        "reconstruction": torch.tensor(0.8),
    }
    total, weights = balance(losses)
    total.backward()
    slopes = {"contrastive": 1.0, "rotation": 1.0, "reconstruction": 0.5}
    for name, slope in slopes.items():
        assert weights[name].item() == pytest.approx(math.exp(-slope))
        gradient = balance.log_variances[name].grad
        assert gradient is not None
        expected = 0.5 - slope * math.exp(-slope) * losses[name].item()
        assert gradient.item() == pytest.approx(expected, abs=1e-6)
    # at rest: e^s = 2 L for cross-entropies, e^(s / 2) = L for pixels
    with torch.no_grad():
        for name, loss in losses.items():
            balance.log_variances[name].copy_(torch.log(loss**2 if name == "reconstruction" else 2 * loss))
    balance.zero_grad()
    balance(losses)[0].backward()
    for name in SIT:
        gradient = balance.log_variances[name].grad
        assert gradient is not None
        assert gradient.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("local", [SIT_V1, SIT_V2, SIT_V3], ids=["v1", "v2", "v3"])
def test_every_version_runs_on_real_views_and_everything_learns(local: object) -> None:
    views = {name: view.model_copy(update={"local": local}) for name, view in VIEWS.items()}
    settings = {} if local is SIT_V1 else {"where": "changed", "hidden_layers": 2}
    model = small_multitask(SIT | {"reconstruction": settings}, views, balance="uncertainty")
    named = model(small_inputs(views))
    named["total"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert 0 < named["reconstruction/chance"] < 2
    assert named["reconstruction/error"] == named["loss/reconstruction"]


# --- where it fits


def test_it_wants_all_patches_and_damage_where_only_that_counts() -> None:
    model = BackboneConfig(img_px=32, patch_px=4)
    around = Surroundings(VIEWS, model, LAYOUT)
    everywhere, damaged = ReconstructionConfig(), ReconstructionConfig(where="changed")
    assert unsuited(everywhere, around) is None
    assert unsuited(damaged, around) is None
    plain = replace(around, views={"one": ViewConfig(size_px=32)})
    assert unsuited(everywhere, plain) is None
    told = unsuited(damaged, plain)
    assert told == "where: changed counts damaged pixels, and view 'one' has none; give it `local`"
    dropping = replace(around, views={"one": ViewConfig(size_px=32, mask=MaskConfig(how="drop"))})
    assert "drops some" in (unsuited(everywhere, dropping) or "")
    assert (
        unsuited(everywhere, replace(plain, views={"one": ViewConfig(mask=MaskConfig(how="token"))})) is None
    )
