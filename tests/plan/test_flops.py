"""FLOPs that are worked out from a config are those that torch counts on the module that the config makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from method_configs import METHODS, PATHS, reduced_config
from run_pieces import NUM_SAMPLES, inputs_of, pieces_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain import build
from pretrain.config import RunConfig, load_config
from pretrain.plan import recipe
from pretrain.plan.backbone import encoder_of
from pretrain.plan.counted import counted_encoder
from pretrain.plan.flops import StepFlops, train_flops
from pretrain.plan.recipe import BlockSize
from pretrain.views.masks import MaskConfig, draw_mask

CONFIGS = METHODS.parent
CORE = CONFIGS / "imagenet_vitb16_multitask.yaml"
# one of each kind: two-view heads, masks, decoders, queues, crops of two sizes, other backbones
CHOSEN = [
    "dino_vits16",
    "drloc_t2t_14_cifar10",
    "mae_contrastive_vits4_cifar10",
    "maskfeat_vitb16",
    "repre_moby_swin_t",
    "relvit_joint_vits4_cifar10",
    "sit_v3_vits16",
]
OTHERS = [path.stem for path in PATHS if path.stem not in CHOSEN and not path.stem.startswith("ijepa")]


def counted(config: RunConfig, micro_step: int = 0) -> StepFlops:
    """The same numbers, counted while one micro step runs."""
    pieces, size = pieces_of(config, micro_step), build.micro_step_batch(config)
    inputs, module = pieces.inputs, pieces.module

    def count(act: Callable[[], object]) -> tuple[object, float]:
        with FlopCounterMode(display=False) as counter:
            result = act()
        return result, counter.get_total_flops() / size

    with sdpa_kernel(SDPBackend.MATH):  # fused attention multiplies some matrices again when going back
        teacher = 0.0
        if pieces.teacher is not None:
            seen, teacher = count(lambda: module.consult(pieces.teacher, inputs))
            inputs = seen
        module(inputs)  # tables of labels are worked out once
        values, forward = count(lambda: module(inputs))
        _, backward = count(lambda: values["total"].backward())
    return StepFlops(forward, teacher, forward + backward + teacher, {})


def assert_agree(told: StepFlops, found: StepFlops) -> None:
    for name in ("student_forward", "teacher_forward", "train"):
        assert getattr(told, name) == pytest.approx(getattr(found, name), rel=0.002), name
    assert sum(told.by_part.values()) == pytest.approx(told.train)


@pytest.mark.parametrize("name", CHOSEN)
def test_flops_of_a_method_are_those_that_torch_counts(name: str) -> None:
    config = reduced_config(METHODS / f"{name}.yaml", Path("shards"))
    assert_agree(train_flops(config, num_samples=NUM_SAMPLES), counted(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_flops_of_every_other_method_are_those_that_torch_counts(name: str) -> None:
    config = reduced_config(METHODS / f"{name}.yaml", Path("shards"))
    assert_agree(train_flops(config, num_samples=NUM_SAMPLES), counted(config))


@pytest.mark.parametrize(
    "overrides",
    [
        ["tasks.clustering={num_prototypes: 8, hidden_dim: 32, out_dim: 16}", "batch.accumulation_steps=2"],
        ["tasks.jigsaw.mode=permset", "tasks.inpainting=null", "tasks.colorization.target=ab_cls"],
        ["model.class_token=false", "tasks.repre={num_levels: 2, decoder: transformer, dec_dim: 16}"],
        ["model.freeze_patch_embed=true", "tasks.distance={bilinear_full: true, pool: true}"],
        ["model.pos_embed=none", "tasks.relative_position=null", "engine.recompute=true"],
    ],
)
def test_flops_of_the_core_method_and_of_its_variants(overrides: list[str]) -> None:
    config = reduced_config(CORE, Path("shards"), *overrides)
    told = train_flops(config)
    if config.engine.recompute:  # nothing is counted twice, so less than what torch sees happen
        config = reduced_config(CORE, Path("shards"), *overrides, "engine.recompute=false")
    assert_agree(told, counted(config))


def test_flops_of_a_pass_for_each_task() -> None:
    config = reduced_config(CONFIGS / "cifar10_cpu_separate.yaml", Path("shards"))
    assert_agree(train_flops(config), counted(config))


def test_flops_of_a_step_with_blocks_to_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the blocks is drawn for each step; for the size of this step the count is exact."""
    config = reduced_config(METHODS / "ijepa_vits4_cifar10.yaml", Path("shards"))
    mask = inputs_of(config, micro_step=3).groups[0].plan.mask
    assert mask is not None
    assert mask.kept is not None
    size = BlockSize(1.0, mask.targets.shape[2], mask.kept.shape[1])
    monkeypatch.setattr(recipe, "block_sizes", lambda mask, grid: (size,))
    assert_agree(train_flops(config), counted(config, micro_step=3))


def test_mean_size_of_blocks_to_predict_is_that_of_many_steps() -> None:
    mask, grid = MaskConfig(kind="multiblock"), (14, 14)
    sizes = recipe.block_sizes(mask.model_dump(mode="json"), grid)
    assert sum(size.share for size in sizes) == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        draw_mask(mask, grid, lambda n: torch.zeros(1, n), lambda n: torch.rand(n, generator=generator))
        for _ in range(600)
    ]
    for told, found in (
        (sum(size.share * size.target for size in sizes), [plan.targets.shape[2] for plan in drawn]),
        (sum(size.share * size.context for size in sizes), [plan.kept.shape[1] for plan in drawn]),  # type: ignore[union-attr]
        (sum(size.share * size.context**2 for size in sizes), [plan.kept.shape[1] ** 2 for plan in drawn]),  # type: ignore[union-attr]
    ):
        assert told == pytest.approx(sum(found) / len(found), rel=0.03)


@pytest.mark.parametrize(
    ("model", "train_gflop"),
    [
        ("vit_small_patch16_224", 27.5),
        ("vit_base_patch16_224", 105.1),
        ("vit_large_patch16_224", 369.0),
        ("vit_huge_patch14_224", 1003.0),
    ],
)
def test_whole_vits_cost_what_is_known_of_them_and_what_torch_counts(model: str, train_gflop: float) -> None:
    patch_px = 14 if "14" in model else 16
    overrides = [f"model.name={model}", f"model.patch_px={patch_px}", "views={one: {}}"]
    tasks = "tasks={classification: {num_classes: 2}}"
    settings = load_config(CORE, [*overrides, tasks]).model_dump(mode="json")
    encoder = encoder_of(settings)
    assert encoder.cost.train / 1e9 == pytest.approx(train_gflop, rel=0.002)
    module = counted_encoder(settings)
    assert (encoder.cost.forward, encoder.cost.train) == (module.cost.forward, module.cost.train)
    assert (encoder.cost.parameters, encoder.cost.frozen) == (module.cost.parameters, module.cost.frozen)
    assert (encoder.dim, encoder.levels) == (module.dim, module.levels)
    assert encoder.whole == module.whole


def test_a_decoder_of_mae_costs_what_is_known_of_it() -> None:
    told = train_flops(load_config(METHODS / "mae_vitb16.yaml"))
    assert told.train / 1e9 == pytest.approx(58.5, rel=0.005)
    assert told.by_part["task/mae"] > told.by_part["backbone"]
    assert told.teacher_forward == 0.0


def test_the_heads_of_the_core_method_cost_at_most_a_twentieth() -> None:
    told = train_flops(load_config(CORE))
    assert told.by_part["backbone"] / 1e9 == pytest.approx(2 * 105.1, rel=0.02)
    assert told.train <= 1.05 * told.by_part["backbone"]


def test_a_contrastive_task_that_does_not_gather_compares_fewer_images_on_more_ranks() -> None:
    apart = load_config(CORE, ["tasks.contrastive.gather=false"])
    one, many = train_flops(apart), train_flops(apart, world_size=8)
    difference = one.by_part["task/contrastive"] - many.by_part["task/contrastive"]
    assert difference == 3 * 2 * 2 * 128 * 2 * (1024 - 128)  # two operands and the product, 2 views, 128 wide
    gathered = load_config(CORE)
    assert train_flops(gathered).train == train_flops(gathered, world_size=8).train


def test_settings_are_all_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of a config but its plain data, so a plan can be made without the classes."""
    config = load_config(CORE)
    dump = config.model_dump(mode="json")
    assert train_flops(SimpleNamespace(model_dump=lambda mode: dump)) == train_flops(config)  # type: ignore[arg-type]
