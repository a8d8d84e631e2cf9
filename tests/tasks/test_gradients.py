"""Where the gradient of each task goes, through a real (tiny) Vision Transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from example_views import LAYOUT, SETTINGS, SITE, as_float32, example_views, ready, suited
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig, create_backbone, layout_of
from pretrain.peers import ALONE
from pretrain.tasks import TASKS
from pretrain.tasks.balance import Balance, BalanceConfig
from pretrain.tasks.contract import EncodedViews

BACKBONE = BackboneConfig(
    name="vit_tiny_patch16_224", img_px=16, patch_px=4, args={"depth": 2, "embed_dim": 48, "num_heads": 2}
)


def build(names: list[str]) -> tuple[nn.Module, nn.ModuleDict, EncodedViews]:
    """Backbone, the named tasks, and views that have not been encoded."""
    torch.manual_seed(0)
    registers = tuple(name for name in names if TASKS[name].needs_register)
    layout = layout_of(BACKBONE, registers)
    site = replace(SITE, layout=layout)
    tasks = {
        name: ready(name, TASKS[name].task(TASKS[name].config(**SETTINGS.get(name, {})), site))
        for name in names
    }
    views = as_float32(example_views(layout=layout))
    return create_backbone(BACKBONE, len(registers)), nn.ModuleDict(tasks), views


def own_tokens(name: str, views: EncodedViews) -> Tensor:
    """Which tokens a task reads: bool (M, N)."""
    sets, mask = views.plan.patches, views.plan.mask
    assert mask is not None
    assert mask.kept is not None
    num_prefix = views.layout.num_prefix
    own = torch.zeros(8, views.layout.num_tokens, dtype=torch.bool)
    if name == "maskfeat":
        hidden = suited(name, views).plan.mask
        assert hidden is not None
        own[:, num_prefix:] = hidden.hidden
        return own
    if name == "repre":  # of the first view; here its taps are made of tokens
        own[:4, num_prefix:] = True
        return own
    if name in ("spatial_relation", "distance", "angle", "absolute_position", "drloc"):
        own[:, num_prefix:] = True
        return own
    if name == "classification":  # of the images that have a label
        assert views.labels is not None
        own[:, 0] = views.labels.repeat(2) >= 0
        return own
    if TASKS[name].teacher_head is not None or name == "simsiam":
        own[:, 0] = True
        own[4:] &= name != "moco_v2"  # whose queries are of the first view
        return own
    index = {
        "contrastive": torch.zeros(8, 1, dtype=torch.int64),
        **{task: torch.full((8, 1), 1 + place) for place, task in enumerate(views.layout.registers)},
        "colorization": sets.colorization + num_prefix,
        "inpainting": sets.inpainting + num_prefix,
        "relative_position": sets.pairs.flatten(1) + num_prefix,
        "jigsaw": sets.jigsaw + num_prefix,
        "reconstruction": torch.arange(views.layout.num_patches).expand(8, -1) + num_prefix,
        "exemplar": torch.zeros(8, 1, dtype=torch.int64),
        "cluster_labels": torch.zeros(8, 1, dtype=torch.int64),
        "mae": torch.cat([torch.zeros(8, 1, dtype=torch.int64), mask.kept + num_prefix], dim=1),
        "ijepa": mask.kept + num_prefix,
    }[name]
    return own.scatter(1, index, True)


@pytest.mark.parametrize("name", TASKS)
def test_a_loss_reaches_its_head_its_tokens_and_the_backbone_and_nothing_else(name: str) -> None:
    """T-MT-6."""
    backbone, tasks, views = build(list(TASKS))
    assert views.layout == LAYOUT
    tokens = backbone.forward_features(views.clean)
    tokens.retain_grad()
    tasks[name](suited(name, replace(views, tokens=tokens)), ALONE).loss.backward()
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
        {name: TASKS[name].likelihood_of(TASKS[name].config(**SETTINGS.get(name, {}))) for name in names},
        dict.fromkeys(names, 1.0),
        BalanceConfig(),
    )
    views = replace(views, tokens=backbone.forward_features(views.clean))
    total, _ = balance({name: task(suited(name, views), ALONE).loss for name, task in tasks.items()})
    total.backward()
    for module in (backbone, tasks, balance):
        assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
