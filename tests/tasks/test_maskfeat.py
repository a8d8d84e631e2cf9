"""MaskFeat: which patches count, and what the network is shown of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from example_views import LAYOUT, SITE, example_views, suited, with_patches
from small_multitask import VIT, repaint, small_inputs, small_multitask
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig
from pretrain.peers import ALONE
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskOutput
from pretrain.tasks.maskfeat import MaskfeatConfig, MaskfeatTask, unsuited
from pretrain.views.hog import hog
from pretrain.views.masks import MaskConfig
from pretrain.views.plan import ViewConfig

VIEWS = {"one": ViewConfig(size_px=32, mask=MaskConfig(kind="block"))}


def task_of(head: nn.Module | None = None) -> MaskfeatTask:
    torch.manual_seed(0)
    task = MaskfeatTask(MaskfeatConfig(), SITE).double()
    if head is not None:
        task.head = head
    return task


def answered(views: EncodedViews, patches: Tensor) -> TaskOutput:
    """With tokens that are the answer and a head that passes them on."""
    output: TaskOutput = task_of(nn.Identity())(with_patches(views, patches), ALONE)
    return output


def targets_of(views: EncodedViews) -> Tensor:
    assert views.whole is not None
    return hog(views.whole, SITE.patch_px)


def test_the_right_answer_costs_nothing_and_zero_costs_a_ninth() -> None:
    """T-MF-2: nine bins of unit length, and no cell of random pixels is empty."""
    views = suited("maskfeat", example_views())
    right = answered(views, targets_of(views))
    assert right.loss.item() == 0.0
    assert right.metrics["chance"].item() == pytest.approx(1 / 9)
    assert answered(views, torch.zeros(8, 16, 108)).loss.item() == pytest.approx(1 / 9)


def test_only_hidden_patches_count_and_each_as_much_as_any_other() -> None:
    """T-MF-4; rows hide different numbers of patches, and the mean is over all of those."""
    views = suited("maskfeat", example_views())
    assert views.plan.mask is not None
    hidden = views.plan.mask.hidden
    assert len(set(hidden.sum(dim=1).tolist())) > 1
    answer = targets_of(views)
    answer[~hidden] = 9.0
    assert answered(views, answer).loss.item() == 0.0
    row, patch = hidden.nonzero()[0].tolist()
    answer[row, patch] += 1.0
    assert answered(views, answer).loss.item() == pytest.approx(1 / hidden.sum().item())


def test_views_of_one_color_have_a_target_of_zero() -> None:
    views = suited("maskfeat", example_views())
    assert views.whole is not None
    plain = replace(views, whole=torch.full_like(views.whole, 0.3))
    output = answered(plain, torch.zeros(8, 16, 108))
    assert output.loss.item() == output.metrics["chance"].item() == 0.0


def test_the_head_standardises_each_token_before_one_linear_layer() -> None:
    task = task_of()
    tokens = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    linear = task.head[-1]
    centered = tokens - tokens.mean(dim=2, keepdim=True)
    expected = centered / tokens.std(dim=2, correction=0, keepdim=True) @ linear.weight.T + linear.bias
    torch.testing.assert_close(task.head(tokens), expected, rtol=1e-3, atol=1e-5)
    assert linear.weight.shape == (108, 48)


# --- through a real encoder


def test_pixels_under_the_mask_do_not_reach_the_network_but_are_the_target() -> None:
    """T-MF-5."""
    model, inputs = small_multitask({"maskfeat": {}}, VIEWS), small_inputs(VIEWS)
    mask = inputs.groups[0].plan.mask
    assert mask is not None
    half = mask.hidden & (torch.arange(64) % 2 == 0)
    answers: list[Tensor] = []
    model.tasks["maskfeat"].head.register_forward_hook(lambda module, given, output: answers.append(output))
    losses = [
        model(one)["loss/maskfeat"] for one in (inputs, repaint(inputs, half), repaint(inputs, ~mask.hidden))
    ]
    assert torch.equal(answers[0], answers[1])
    assert losses[0] != losses[1]
    assert not torch.equal(answers[0], answers[2])


def test_the_encoder_sees_the_full_sequence_and_everything_learns() -> None:
    model = small_multitask({"maskfeat": {}}, VIEWS)
    lengths: list[int] = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, given, output: lengths.append(output.shape[1]))
    model(small_inputs(VIEWS))["total"].backward()
    assert lengths == [1 + 64] * VIT.args["depth"]
    assert model.mask_token is not None
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_blocks_hide_two_fifths_at_most() -> None:
    """T-MF-1, as the task meets them: 1 to 26 of 64."""
    mask = small_inputs(VIEWS, num_images=16).groups[0].plan.mask
    assert mask is not None
    counts = mask.hidden.sum(dim=1)
    assert counts.min() >= 1
    assert counts.max() == 26


# --- where it fits


def test_it_wants_mask_tokens_and_patches_of_whole_cells() -> None:
    around = Surroundings(VIEWS, BackboneConfig(img_px=32, patch_px=4), LAYOUT)
    assert unsuited(MaskfeatConfig(), around) is None
    told = unsuited(MaskfeatConfig(), replace(around, model=BackboneConfig(img_px=35, patch_px=7)))
    assert told == "needs patches of 2 x 2 cells, and 7 px are odd; use 8 px"
    told = unsuited(MaskfeatConfig(), replace(around, views={"one": ViewConfig(mask=MaskConfig())}))
    assert told is not None
    assert "use mask.how: token" in told
