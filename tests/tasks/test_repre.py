"""RePre: what is decoded from where, and that the branch leaves the rest of a run as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from example_views import SETTINGS, SITE, example_views, suited
from small_multitask import SWIN, VIT, small_inputs, small_multitask
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.backbone import BackboneConfig, Level
from pretrain.peers import ALONE
from pretrain.tasks.contract import EncodedViews, TaskOutput
from pretrain.tasks.multitask import MultiTask
from pretrain.tasks.repre import RepreConfig, RepreTask, taps
from pretrain.views.masks import MaskConfig
from pretrain.views.plan import ViewConfig

VIEWS = {"one": ViewConfig(size_px=32), "two": ViewConfig(size_px=32)}
DEEP = VIT.model_copy(update={"args": VIT.args | {"depth": 12, "embed_dim": 12}})
MOCO = {"hidden_dim": 16, "out_dim": 8}
SMALL = {"dec_dim": 8}


class Answer(nn.Module):
    """A decoder that has its answer already, and notes what it was given."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.given: list[tuple[Tensor, ...]] = []

    def forward(self, *maps: Tensor) -> Tensor:
        self.given.append(maps)
        return self.images


def answered(views: EncodedViews, images: Tensor) -> TaskOutput:
    task = RepreTask(RepreConfig(**SETTINGS["repre"]), SITE)
    task.decoder = Answer(images)
    output: TaskOutput = task(views, ALONE)
    return output


# --- target, loss, metrics


def test_the_right_answer_is_the_view_before_normalisation() -> None:
    """T-RP-3."""
    views = suited("repre", example_views())
    first = views.of_view(views.clean, "first")
    assert answered(views, first).loss.item() == 0.0
    assert answered(views, first).metrics["error"].item() == 0.0
    half = answered(views, torch.full_like(first, 0.5)).loss.item()
    assert half <= 0.5
    assert half == pytest.approx((first - 0.5).abs().mean().item())


def test_chance_is_the_mean_color_of_each_view() -> None:
    """Half of the pixels 0.2, half 0.8, in one channel; the other two are of one value: 0.3 / 3."""
    views = suited("repre", example_views())
    clean = torch.full_like(views.clean, 0.4)
    clean[:, 1, :8], clean[:, 1, 8:] = 0.2, 0.8
    output = answered(replace(views, clean=clean), clean[:4])
    assert output.metrics["chance"].item() == pytest.approx(0.1)


def test_only_the_first_view_is_decoded() -> None:
    views = suited("repre", example_views())
    task = RepreTask(RepreConfig(**SETTINGS["repre"]), SITE)
    task.decoder = Answer(views.clean[:4])
    other = replace(views, clean=torch.cat([views.clean[:4], torch.zeros_like(views.clean[4:])]))
    assert task(other, ALONE).loss.item() == 0.0
    for level, given in zip((0, 1), task.decoder.given[0], strict=True):
        assert torch.equal(given, views.taps[level][:4])
    turned = views.select(("second", "first"))
    assert answered(turned, views.clean[4:]).loss.item() == 0.0


# --- levels


def test_levels_are_spread_over_the_depth_and_one_level_is_the_last() -> None:
    """T-RP-1 and T-RP-7, and the four stages of a Swin."""
    assert taps(RepreConfig(), 12) == (2, 5, 8, 11)
    assert taps(RepreConfig(num_levels=1), 12) == (11,)
    assert taps(RepreConfig(), 4) == (0, 1, 2, 3)
    assert taps(RepreConfig(num_levels=1), 4) == (3,)


def test_more_levels_than_the_model_has_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"tasks.repre.num_levels: 5 is more than the 4 levels .* use 1 to 4"
    ):
        taps(RepreConfig(num_levels=5), 4)


def test_a_single_level_reads_the_last_block_only() -> None:
    """T-RP-7."""
    site = replace(SITE, levels=(Level(48, 4),) * 12)
    task = RepreTask(RepreConfig(num_levels=1), site)
    last = torch.randn(8, 48, 4, 4, generator=torch.Generator().manual_seed(0))
    views = replace(example_views(), taps={11: last})  # no other is there
    assert task(views, ALONE).loss.isfinite()
    assert len(task.decoder.fusions) == 0


@pytest.mark.parametrize("decoder", ["conv", "transformer"])
@pytest.mark.parametrize("dec_dim", [None, 8])
@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_it_works_on_a_vit_and_on_a_swin(model: BackboneConfig, dec_dim: int | None, decoder: str) -> None:
    """T-RP-2: pixels of the whole view; every parameter of encoder and decoder has a gradient, even with no
    other task to read the encoder's final norm."""
    settings = {"num_levels": 2 if model is VIT else 4, "decoder": decoder, "dec_dim": dec_dim}
    views = {"one": VIEWS["one"]}
    multitask = small_multitask({"repre": settings}, views, model)
    decoded: list[Tensor] = []
    multitask.tasks["repre"].decoder.register_forward_hook(
        lambda module, given, output: decoded.append(output)
    )
    named = multitask(small_inputs(views, model))
    named["total"].backward()
    assert decoded[0].shape == (3, 3, 32, 32)
    assert [name for name, p in multitask.named_parameters() if p.grad is None] == []
    assert named["repre/chance"] > 0.1


# --- next to a contrastive framework


def moco(
    model: BackboneConfig = DEEP,
    repre: dict[str, object] | None = None,
    weights: dict[str, float] | None = None,
) -> MultiTask:
    tasks = {"moco_v3": MOCO} | ({} if repre is None else {"repre": repre})
    return small_multitask(tasks, VIEWS, model, weights=weights)


def trained(model: MultiTask, vit: BackboneConfig = DEEP) -> MultiTask:
    model(model.consult(model.make_teacher(), small_inputs(VIEWS, vit)))["total"].backward()
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_its_gradient_reaches_every_block_and_no_part_of_the_framework(frozen: bool) -> None:
    """T-RP-4: with the framework's loss at weight 0."""
    vit = DEEP.model_copy(update={"freeze_patch_embed": frozen})
    model = trained(moco(vit, SMALL, {"moco_v3": 0.0}), vit)
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for number in range(12):
        assert {name for name in reached if name.startswith(f"backbone.blocks.{number}.")}
    assert ("backbone.patch_embed.proj.weight" in reached) == (not frozen)
    decoder = dict(model.tasks["repre"].decoder.named_parameters(prefix="tasks.repre.decoder"))
    assert decoder.keys() <= reached
    assert sum("norms" in name for name in decoder) == 2 * 4  # gain and bias of each tap's norm
    assert not [name for name in reached if name.startswith(("tasks.moco_v3", "backbone.norm"))]


def test_at_weight_zero_the_framework_trains_as_without_it() -> None:
    """T-RP-5: the same gradients bit for bit."""
    alone = dict(trained(moco()).named_parameters())
    together = dict(trained(moco(repre=SMALL, weights={"repre": 0.0})).named_parameters())
    assert alone.keys() < together.keys()
    for name, parameter in alone.items():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, together[name].grad), name


def test_there_is_one_encoder_call_for_both_views_and_one_of_the_teacher() -> None:
    """T-RP-6: features to decode come from the pass that gives the queries."""
    model = moco(repre=SMALL)
    teacher = model.make_teacher()  # before the hooks, or its copies of the blocks had them too
    rows: list[int] = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    model(model.consult(teacher, small_inputs(VIEWS, DEEP)))
    assert model.taps == [2, 5, 8, 11]
    assert model.num_backbone_calls == 1
    assert rows == [2 * 3] * 12
    assert teacher.num_calls == 1


def test_mask_tokens_may_stand_in_for_patches_of_its_view() -> None:
    """Not as published: then it paints the clean view from one with holes."""
    views = {"one": ViewConfig(size_px=32, mask=MaskConfig(kind="random", how="token", ratio=0.5))}
    model = small_multitask({"repre": {"num_levels": 2}}, views)
    model(small_inputs(views))["total"].backward()
    assert model.mask_token is not None
    assert model.mask_token.grad is not None
    assert model.mask_token.grad.any()
