"""Tasks together, through the real plan and the real backbone: one encoder pass serves any subset."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from method_configs import BATCH, METHODS, reduced
from small_config import small_config
from torch import Tensor

from pretrain import build
from pretrain.check import check
from pretrain.config import RunConfig, load_config
from pretrain.peers import ALONE
from pretrain.tasks import TASKS
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs, prepare

HEADS = {
    "contrastive": "{hidden_dim: 16, out_dim: 8}",
    "rotation": "{}",
    "clustering": "{hidden_dim: 16, out_dim: 8, num_prototypes: 5}",
    "colorization": "{}",
    "inpainting": "{}",
    "relative_position": "{hidden_dim: 16}",
    "jigsaw": "{hidden_dim: 16}",
}
CORE = tuple(HEADS)  # the tasks of the core method, which all share the same two views
SINGLES = [(name,) for name in CORE]
SUBSETS = [*SINGLES, ("contrastive", "inpainting"), ("rotation", "jigsaw"), CORE]
NUM_IMAGES = 4


def config_of(folder: Path, names: tuple[str, ...], *overrides: str) -> RunConfig:
    tasks = ", ".join(f"{name}: {HEADS.get(name, '{}')}" for name in names)
    config = small_config(folder, f"tasks={{{tasks}}}", *overrides)
    check(config, world_size=1)
    return config


def model_of(config: RunConfig) -> MultiTask:
    return build.module(config, ALONE, torch.device("cpu")).train()


def inputs_of(config: RunConfig, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    px = config.model.img_px
    shape = (len(config.views), NUM_IMAGES, px, px, 3)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    ids = torch.arange(NUM_IMAGES) + NUM_IMAGES * seed
    return prepare(build.recipe(config), config.seed, crops, torch.zeros_like(ids), ids)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_any_subset_of_tasks_takes_one_encoder_pass(names: tuple[str, ...], tmp_path: Path) -> None:
    """T-MT-8."""
    config = config_of(tmp_path, names)
    model = model_of(config)
    passes: list[int] = []
    # every block sees all rows of all views, once
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, given, output: passes.append(len(output)))
    model.backbone.patch_embed.register_forward_hook(lambda module, given, output: passes.append(len(output)))
    for count in (1, 2):
        model(inputs_of(config))
        assert model.num_backbone_calls == count
        assert passes == [len(config.views) * NUM_IMAGES] * 3 * count


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("balance", ["fixed", "uncertainty"])
def test_any_subset_runs_and_leaves_no_parameter_without_gradient(
    names: tuple[str, ...], balance: str, tmp_path: Path
) -> None:
    """T-MT-9, with the plan that a run draws."""
    config = config_of(tmp_path, names, f"balance.kind={balance}")
    model = model_of(config)
    named = model(inputs_of(config))
    named["total"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert torch.isfinite(named["total"])
    assert all(value.dim() == 0 and torch.isfinite(value) for value in named.values())
    assert {name.removeprefix("loss/") for name in named if name.startswith("loss/")} == set(names)
    for name in names:
        assert {f"loss/{name}", f"weight/{name}", f"{name}/{TASKS[name].headline}"} <= named.keys()
        assert not named[f"loss/{name}"].requires_grad


@pytest.mark.parametrize(
    "overrides",
    [
        ["tasks.inpainting.fill=zero"],
        ["tasks.relative_position.pos_embed=keep"],
        ["model.pos_embed=none", "tasks.inpainting.fill=zero"],
        ["tasks.jigsaw.mode=permset", "tasks.jigsaw.num_permutations=3", "tasks.inpainting.ratio=0.1"],
        ["tasks.contrastive=null", "model.class_token=false"],
        ["engine.recompute=true"],
        ["tasks.contrastive.views=[two, one]"],
    ],
    ids=" ".join,
)
def test_no_setting_leaves_a_parameter_without_gradient(overrides: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path, CORE, *overrides)
    model = model_of(config)
    model(inputs_of(config))["total"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_with_fixed_weights_the_total_is_the_weighted_sum(tmp_path: Path) -> None:
    config = config_of(tmp_path, ("rotation", "jigsaw"), "balance.kind=fixed", "tasks.jigsaw.weight=0.25")
    named = model_of(config)(inputs_of(config))
    expected = named["loss/rotation"] + 0.25 * named["loss/jigsaw"]
    torch.testing.assert_close(named["total"].detach(), expected)
    assert (named["weight/rotation"], named["weight/jigsaw"]) == (1.0, 0.25)


def losses(model: MultiTask, config: RunConfig) -> dict[str, Tensor]:
    return {name: value for name, value in model(inputs_of(config)).items() if name.startswith("loss/")}


def test_heads_start_from_the_seed_whichever_other_tasks_run(tmp_path: Path) -> None:
    alone, together = (model_of(config_of(tmp_path, names)).state_dict() for names in (("rotation",), CORE))
    for name in alone:
        if name.startswith("tasks."):
            assert torch.equal(alone[name], together[name]), name
    again = model_of(config_of(tmp_path, ("rotation",))).state_dict()
    other = model_of(config_of(tmp_path, ("rotation",), "seed=4")).state_dict()
    assert all(torch.equal(alone[name], again[name]) for name in alone)
    assert not torch.equal(alone["tasks.rotation.head.weight"], other["tasks.rotation.head.weight"])


def test_making_a_module_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path, ("rotation",))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model_of(config)
    assert torch.equal(torch.rand(3), expected)


def test_the_order_of_the_tasks_in_the_file_changes_nothing(tmp_path: Path) -> None:
    forward, backward = (config_of(tmp_path, names) for names in (CORE, tuple(reversed(CORE))))
    first, second = losses(model_of(forward), forward), losses(model_of(backward), backward)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputing_blocks_changes_neither_losses_nor_gradients(tmp_path: Path) -> None:
    found = []
    for recompute in ("false", "true"):
        config = config_of(tmp_path, CORE, f"engine.recompute={recompute}")
        model = model_of(config)
        total = model(inputs_of(config))["total"]
        total.backward()
        found.append((total.detach(), [parameter.grad for parameter in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_tokens_that_no_task_needs_are_not_made(tmp_path: Path) -> None:
    for names in (("rotation",), ("inpainting",), ("relative_position",)):
        model = model_of(config_of(tmp_path, names))
        assert (model.mask_token is not None) == ("inpainting" in names)
        assert (model.no_position is not None) == ("relative_position" in names)
    without = model_of(config_of(tmp_path, ("inpainting",), "tasks.inpainting.fill=zero"))
    assert without.mask_token is None
    keeping = model_of(config_of(tmp_path, ("relative_position",), "tasks.relative_position.pos_embed=keep"))
    assert keeping.no_position is None


def test_the_patch_sets_of_two_tasks_never_meet_and_take_at_most_half(tmp_path: Path) -> None:
    config = config_of(tmp_path, CORE)
    inputs = inputs_of(config)
    (group,) = inputs.groups
    sets = group.plan.patches
    all_sets = (sets.colorization, sets.inpainting, sets.pairs.flatten(1), sets.jigsaw)
    for row in range(len(group.images)):
        chosen = [set(of_task[row].tolist()) for of_task in all_sets]
        assert all(first.isdisjoint(second) for first, second in itertools.combinations(chosen, 2))
        assert sum(map(len, chosen)) <= 32


@pytest.mark.parametrize(("symmetric", "rows"), [("false", BATCH), ("true", 2 * BATCH)])
def test_a_view_that_only_the_teacher_looks_at_is_not_encoded(symmetric: str, rows: int) -> None:
    path = METHODS / "moco_v2_vits16.yaml"
    more = [f"tasks.moco_v2.symmetric={symmetric}", "tasks.moco_v2.queue_length=32"]
    config = load_config(path, [*reduced(path, Path("shards"), 4), *more])
    module = build.module(config, ALONE, torch.device("cpu"))
    ids = torch.arange(BATCH)
    crops = torch.zeros(2, BATCH, 32, 32, 3, dtype=torch.uint8)
    inputs = module.consult(
        module.make_teacher(), prepare(build.recipe(config), 0, crops, torch.zeros_like(ids), ids)
    )
    seen = []
    module.backbone.patch_embed.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    assert torch.isfinite(module(inputs)["total"])
    assert seen == [rows]
