"""I-JEPA: what is predicted from what, and how collapse would show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from example_views import LAYOUT, SETTINGS, SITE, example_views, suited
from small_multitask import VIT, repaint, small_inputs, small_multitask
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig
from pretrain.peers import ALONE
from pretrain.tasks import TASKS
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskOutput
from pretrain.tasks.ijepa import (
    IjepaConfig,
    IjepaTask,
    global_std,
    smooth_l1,
    standardize,
    teacher_views,
    unsuited,
)
from pretrain.tokens import take
from pretrain.views.masks import MaskConfig
from pretrain.views.plan import ViewConfig

VIEWS = {"one": ViewConfig(size_px=32, mask=MaskConfig(kind="multiblock"))}
SMALL = {"predictor_dim": 16, "predictor_depth": 1, "num_heads": 2}


class Answer(nn.Module):
    """A predictor that knows a vector for every patch of every image, and notes what it was given."""

    def __init__(self, of_patches: Tensor) -> None:
        super().__init__()
        self.of_patches = of_patches  # (M, N, D)
        self.given: list[Tensor] = []

    def forward(self, context: Tensor, kept: Tensor, targets: Tensor) -> Tensor:
        self.given.append(context)
        return take(self.of_patches, targets.flatten(1)).reshape(*targets.shape, -1)


def teacher_patches(views: EncodedViews) -> Tensor:
    """What the teacher makes of the patches of the same rows: (M, N, D)"""
    assert views.teacher is not None
    return views.layout.patches(views.teacher.tokens)


def answered(views: EncodedViews, of_patches: Tensor, **settings: object) -> TaskOutput:
    task = IjepaTask(IjepaConfig(**(SETTINGS["ijepa"] | settings)), SITE)
    task.predictor = Answer(of_patches)
    output: TaskOutput = task(views, ALONE)
    return output


# --- the target


def test_targets_have_mean_zero_and_variance_one() -> None:
    """T-IJ-4: over the channels of each token, whatever gain and bias it came with; var / (var + 1e-5)."""
    tokens = 3 + 2 * torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    target = standardize(tokens)
    torch.testing.assert_close(target.mean(dim=2), torch.zeros(2, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(target.var(dim=2, correction=0), torch.ones(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(standardize(5 * tokens - 1), target, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert standardize(tokens.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
def test_the_right_answer_costs_nothing(loss: str) -> None:
    """T-IJ-7: for each target patch the teacher's standardised token of the same image and place."""
    views = suited("ijepa", example_views())
    output = answered(views, standardize(teacher_patches(views)), loss=loss)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-12)


def test_answers_must_stand_where_their_targets_stand() -> None:
    """T-IJ-6: tokens of another image, view or patch are wrong answers."""
    views = suited("ijepa", example_views())
    right = standardize(teacher_patches(views))
    for wrong in (right.roll(1, dims=0), right.roll(4, dims=0), right.roll(1, dims=1)):
        assert answered(views, wrong).loss > 0.5


def test_targets_follow_the_names_of_the_views_and_not_the_order_of_the_teacher() -> None:
    views = suited("ijepa", example_views())
    right = standardize(teacher_patches(views))
    assert views.teacher is not None
    turned = replace(views.teacher, names=("second", "first"), tokens=views.teacher.tokens.roll(4, dims=0))
    assert answered(replace(views, teacher=turned), right).loss.item() == pytest.approx(0.0, abs=1e-12)


# --- loss and metrics


def test_smooth_l1_is_a_parabola_up_to_an_error_of_one() -> None:
    error = smooth_l1(torch.tensor([0.0, 0.5, 1.0, -3.0]), torch.zeros(4))
    assert error.tolist() == [0.0, 0.125, 0.5, 2.5]


@pytest.mark.parametrize(("loss", "expected"), [("smooth_l1", 0.425), ("l2", 1.0)])
def test_chance_is_the_cost_of_answering_zero(loss: str, expected: float) -> None:
    """Of Gaussian features; standardised over 48 channels they are nearly so."""
    views = suited("ijepa", example_views(num_images=32))
    output = answered(views, torch.zeros(64, 16, 48), loss=loss)
    assert output.metrics["chance"].item() == pytest.approx(expected, abs=0.01)
    assert torch.equal(output.loss, output.metrics["chance"])


def test_the_monitor_of_collapse_is_the_spread_over_patches_and_images() -> None:
    """Rows 0 and 4 in one channel, 1 and 1 in the other: (2 + 0) / 2."""
    rows = torch.tensor([[0.0, 1.0], [4.0, 1.0]])
    assert global_std(rows, ALONE).item() == 1.0
    views = suited("ijepa", example_views())
    assert views.teacher is not None
    wide = replace(views, teacher=replace(views.teacher, tokens=3 * views.teacher.tokens))
    assert answered(wide, teacher_patches(wide)).metrics["target_std"].item() == pytest.approx(3.0, abs=0.3)
    same = views.teacher.tokens[:1, :1].expand_as(views.teacher.tokens)
    collapsed = replace(views, teacher=replace(views.teacher, tokens=same))
    found = answered(collapsed, standardize(teacher_patches(collapsed)))
    assert found.metrics["target_std"].item() == pytest.approx(0.0, abs=1e-9)
    assert found.loss.item() == pytest.approx(0.0, abs=1e-12)  # which the loss alone would call success


def test_the_predictor_gets_patches_and_no_other_tokens() -> None:
    views = suited("ijepa", example_views())
    task = IjepaTask(IjepaConfig(**SETTINGS["ijepa"]), SITE)
    task.predictor = Answer(teacher_patches(views))
    task(views, ALONE)
    assert torch.equal(task.predictor.given[0], LAYOUT.patches(views.tokens))
    assert task.predictor.given[0].shape == (8, 6, 48)


# --- through a real encoder and its teacher


@pytest.mark.parametrize("has_class_token", [False, True])
def test_predictions_do_not_depend_on_what_is_to_be_predicted_and_targets_do(has_class_token: bool) -> None:
    """T-IJ-3."""
    vit = VIT.model_copy(update={"class_token": has_class_token})
    model, inputs = small_multitask({"ijepa": SMALL}, VIEWS, vit), small_inputs(VIEWS, vit)
    teacher = model.make_teacher()
    mask = inputs.groups[0].plan.mask
    assert mask is not None
    where = torch.zeros_like(mask.hidden).scatter(1, mask.targets.flatten(1), True)
    half = where & (torch.arange(64) % 2 == 0)
    predictions: list[Tensor] = []
    model.tasks["ijepa"].predictor.register_forward_hook(
        lambda module, given, output: predictions.append(output)
    )
    losses = [
        model(model.consult(teacher, one))["loss/ijepa"]
        for one in (inputs, repaint(inputs, half), repaint(inputs, ~mask.hidden))
    ]
    assert torch.equal(predictions[0], predictions[1])
    assert losses[0] != losses[1]
    assert not torch.equal(predictions[0], predictions[2])


def test_the_teacher_gets_no_gradient_and_follows_the_student() -> None:
    """T-IJ-5: after two updates it is m^2 t + m (1 - m) s_1 + (1 - m) s_2."""
    model, inputs = small_multitask({"ijepa": SMALL}, VIEWS), small_inputs(VIEWS)
    teacher = model.make_teacher()
    assert teacher.heads == {}
    seen = model.consult(teacher, inputs)
    assert seen.teacher is not None
    assert not seen.teacher.tokens.requires_grad
    model(seen)["total"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.backbone.parameters())
    assert all(p.grad is not None for p in model.parameters())
    name, momentum = "backbone.blocks.0.attn.qkv.weight", 0.9
    start, students = teacher.state_dict()[name].double(), []
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * (parameter.grad + 0.01)
        students.append(model.state_dict()[name].double())
        teacher.update(model.state_dict().items(), momentum)
    expected = momentum**2 * start + (1 - momentum) * (momentum * students[0] + students[1])
    torch.testing.assert_close(teacher.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_context_and_targets_never_meet() -> None:
    """T-IJ-1, as the task meets them: four blocks of one size and a context of more than ten patches."""
    mask = small_inputs(VIEWS, num_images=8).groups[0].plan.mask
    assert mask is not None
    assert mask.kept is not None
    assert mask.targets.shape[:2] == (8, 4)
    assert mask.kept.shape[1] > 10
    for kept, targets in zip(mask.kept.tolist(), mask.targets.flatten(1).tolist(), strict=True):
        assert set(kept).isdisjoint(targets)


# --- where it fits


def test_the_teacher_sees_the_views_that_the_task_reads() -> None:
    assert teacher_views(IjepaConfig(), ("one", "three")) == ("one", "three")
    assert TASKS["ijepa"].teacher_head is None


def test_it_wants_blocks_to_predict_and_a_predictor_that_divides() -> None:
    around = Surroundings(VIEWS, BackboneConfig(img_px=32, patch_px=4), LAYOUT)
    assert unsuited(IjepaConfig(), around) is None
    told = unsuited(IjepaConfig(num_heads=5), around)
    assert told == "predictor_dim 384 is not a multiple of 4 and of num_heads, 5; use 380 or 400"
    told = unsuited(IjepaConfig(), replace(around, views={"one": ViewConfig(size_px=32, mask=MaskConfig())}))
    assert told is not None
    assert "use mask: {kind: multiblock, how: drop}" in told
