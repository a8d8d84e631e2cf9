"""Where the gradient of each task goes, through a real (tiny) Vision Transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from example_views import LAYOUT, SETTINGS, SITE, example_views
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig, create_backbone, layout_of
from pretrain.peers import ALONE
from pretrain.tasks import TASKS
from pretrain.tasks.balance import Balance, BalanceConfig
from pretrain.tasks.contract import EncodedViews, TaskSite

BACKBONE = BackboneConfig(
    name="vit_tiny_patch16_224", img_px=16, patch_px=4, args={"depth": 2, "embed_dim": 48, "num_heads": 2}
)


def build(names: list[str]) -> tuple[nn.Module, nn.ModuleDict, EncodedViews]:
    """Backbone, the named tasks, and views that have not been encoded."""
    torch.manual_seed(0)
    registers = tuple(name for name in names if TASKS[name].needs_register)
    layout = layout_of(BACKBONE, registers)
    site = TaskSite(layout, SITE.embed_dim, SITE.patch_px)
    tasks = {name: TASKS[name].task(TASKS[name].config(**SETTINGS.get(name, {})), site) for name in names}
    views = example_views()
    views = replace(views, layout=layout, clean=views.clean.float())
    return create_backbone(BACKBONE, len(registers)), nn.ModuleDict(tasks), views


def own_tokens(name: str, views: EncodedViews) -> Tensor:
    """Which tokens a task reads: bool (M, N)."""
    sets = views.plan.patches
    num_prefix = views.layout.num_prefix
    index = {
        "contrastive": torch.zeros(8, 1, dtype=torch.int64),
        **{task: torch.full((8, 1), 1 + place) for place, task in enumerate(views.layout.registers)},
        "colorization": sets.colorization + num_prefix,
        "inpainting": sets.inpainting + num_prefix,
        "relative_position": sets.pairs.flatten(1) + num_prefix,
        "jigsaw": sets.jigsaw + num_prefix,
    }[name]
    return torch.zeros(8, views.layout.num_tokens, dtype=torch.bool).scatter(1, index, True)


@pytest.mark.parametrize("name", TASKS)
def test_a_loss_reaches_its_head_its_tokens_and_the_backbone_and_nothing_else(name: str) -> None:
    """T-MT-6."""
    backbone, tasks, views = build(list(TASKS))
    assert views.layout == LAYOUT
    tokens = backbone.forward_features(views.clean)
    tokens.retain_grad()
    tasks[name](replace(views, tokens=tokens), ALONE).loss.backward()
    for other, task in tasks.items():
        reached = [
            parameter.grad is not None and bool(parameter.grad.any()) for parameter in task.parameters()
        ]
        assert all(reached) if other == name else not any(reached)
    assert torch.equal(tokens.grad.abs().amax(dim=2) > 0, own_tokens(name, views))
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in backbone.blocks.parameters()
    )
    assert backbone.patch_embed.proj.weight.grad.any()
    registers = backbone.reg_token.grad[0].abs().amax(dim=1) > 0
    assert registers.all()  # every token sees the registers through attention


SUBSETS = [*([name] for name in TASKS), ["contrastive", "clustering"], ["rotation", "jigsaw"], list(TASKS)]


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_any_subset_of_tasks_leaves_no_parameter_without_gradient(names: list[str]) -> None:
    """T-MT-9."""
    backbone, tasks, views = build(names)
    balance = Balance(
        {name: TASKS[name].likelihood for name in names}, dict.fromkeys(names, 1.0), BalanceConfig()
    )
    views = replace(views, tokens=backbone.forward_features(views.clean))
    total, _ = balance({name: task(views, ALONE).loss for name, task in tasks.items()})
    total.backward()
    for module in (backbone, tasks, balance):
        assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
