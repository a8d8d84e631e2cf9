"""What a plan says a rank holds is what it holds: counted on real tensors, and measured on real processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from method_configs import METHODS, reduced_config
from ranks import run_on_ranks
from run_pieces import pieces_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain import build, cluster
from pretrain.config import RunConfig, load_config
from pretrain.engine.deepspeed_engine import DeepSpeedEngine, resolve
from pretrain.peers import ALONE
from pretrain.plan import memory
from pretrain.plan.backbone import encoder_of
from pretrain.plan.flops import site_of
from pretrain.plan.memory import Activity, Memory, activity_of, memory_of
from pretrain.plan.parameters import FP32, parameters_of
from pretrain.plan.settings import plan_settings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan_memory

CORE = METHODS.parent / "imagenet_vitb16_multitask.yaml"
WIDE = [  # wide enough that blocks, not heads, hold the most
    "model={name: vit_small_patch16_224, img_px: 64, patch_px: 8, args: {depth: 3}}",
    *("views.one.size_px=64", "views.two.size_px=64", "batch.global_size=8", "data.lanes=2"),
    "engine.precision=fp32",
]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def memory_address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def kept_bytes(config: RunConfig) -> float:
    """What autograd keeps of one image, each memory once; without weights and the inputs themselves."""
    pieces = pieces_of(config)
    inputs, module = pieces.inputs, pieces.module
    if pieces.teacher is not None:
        inputs = module.consult(pieces.teacher, inputs)
    given = [*module.parameters(), *module.buffers(), *tensors_in(inputs)]
    known = {memory_address(tensor) for tensor in given}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if memory_address(tensor) not in known:
            known.add(memory_address(tensor))
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept) / build.micro_step_batch(config)


def planned_activity(config: RunConfig) -> Activity:
    settings = config.model_dump(mode="json")
    encoder = encoder_of(settings)
    return activity_of(settings, encoder, site_of(settings, encoder, 1, 16))


@pytest.mark.parametrize(
    ("path", "overrides"),
    [
        (CORE, WIDE),
        (METHODS / "dino_vits16.yaml", None),
        (METHODS / "mae_vits4_cifar10.yaml", [*WIDE[:1], "views.one.size_px=64", *WIDE[3:]]),
        (METHODS / "repre_moby_swin_t.yaml", None),
    ],
    ids=["core", "dino", "mae", "swin"],
)
def test_what_is_kept_for_the_backward_pass_is_as_planned(path: Path, overrides: list[str] | None) -> None:
    config = reduced_config(path, Path("shards")) if overrides is None else load_config(path, overrides)
    assert planned_activity(config).kept == pytest.approx(kept_bytes(config), rel=0.10)


def test_what_attention_keeps_without_a_fused_kernel_is_as_planned() -> None:
    config = load_config(CORE, WIDE)
    fused = kept_bytes(config)
    with sdpa_kernel(SDPBackend.MATH):
        more = kept_bytes(config) - fused
    assert more > 0.05 * fused
    assert planned_activity(config).unfused == pytest.approx(more, rel=0.10)


def planned(config: RunConfig, *, stage: int, world_size: int = 1, **more: bool) -> Memory:
    settings = config.model_dump(mode="json")
    encoder = encoder_of(settings)
    site = site_of(settings, encoder, world_size, 16)
    return memory_of(
        settings,
        encoder,
        parameters_of(settings, encoder, site),
        activity_of(settings, encoder, site),
        stage=stage,
        world_size=world_size,
        micro_batch=build.micro_step_batch(config) // world_size,
        recompute=more.get("recompute", False),
    )


def check_engines(place: cluster.Cluster) -> None:
    """In a process of its own: DeepSpeed knows one world for each."""
    for stage in (0, 1):
        config = load_config(CORE, [*WIDE, f"engine.deepspeed={{zero_optimization: {{stage: {stage}}}}}"])
        module = build.module(config, ALONE, torch.device("cpu"))
        engine = build.engine(config, module, ALONE)
        assert isinstance(engine, DeepSpeedEngine)
        weights = {memory_address(p): p.untyped_storage().nbytes() for p in module.parameters()}
        held = [*tensors_in(list(engine.optimizer.state.values())), *(engine._flats() if stage else [])]
        optimizer = {memory_address(tensor): tensor.untyped_storage().nbytes() for tensor in held}
        told = planned(config, stage=stage)
        assert told.weights == pytest.approx(sum(weights.values()), rel=0.01)
        assert told.optimizer == pytest.approx(sum(optimizer.values()), rel=0.01)


@pytest.mark.slow
def test_weights_and_optimizer_of_an_engine_are_as_planned() -> None:
    run_on_ranks(1, check_engines)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_are_those_of_the_engine(stage: int) -> None:
    config = load_config(CORE, [f"engine.deepspeed={{zero_optimization: {{stage: {stage}}}}}"])
    settings = config.model_dump(mode="json")
    encoder = encoder_of(settings)
    parameters = parameters_of(settings, encoder, site_of(settings, encoder, 1, 0))
    resolved = resolve(config.engine, (1024, 1, 1), parameters.trained)["zero_optimization"]
    asked = resolved["reduce_bucket_size"]
    assert 0 <= asked - memory.bucket_elements(settings, parameters) < 1024


def test_more_ranks_and_higher_stages_hold_less() -> None:
    config = load_config(CORE, ["data.lanes=64"])
    trained = FP32 * parameters_of_core(config)
    one, many = planned(config, stage=1), planned(config, stage=1, world_size=64)
    assert one.optimizer == 3 * trained  # the two averages, and the copy that is stepped
    assert many.optimizer == pytest.approx(3 * trained / 64)
    assert planned(config, stage=0, world_size=64).optimizer == 2 * trained
    shards = planned(config, stage=3, world_size=64)
    assert shards.weights == pytest.approx(trained / 64)
    assert shards.at_rest < planned(config, stage=2, world_size=64).at_rest
    with_less = planned(config, stage=1, world_size=64, recompute=True)
    assert with_less.activations < many.activations / 4
    assert with_less.peak < many.peak


def parameters_of_core(config: RunConfig) -> int:
    settings = config.model_dump(mode="json")
    encoder = encoder_of(settings)
    return parameters_of(settings, encoder, site_of(settings, encoder, 1, 0)).trained


def test_bf16_keeps_about_half_and_copies_of_the_weights() -> None:
    low, high = (load_config(CORE, [f"engine.precision={name}"]) for name in ("bf16", "fp32"))
    assert 0.5 < planned_activity(low).kept / planned_activity(high).kept < 0.6
    copies = planned(low, stage=0).buffers - planned(high, stage=0).buffers
    assert copies == pytest.approx(2 * 85.5e6, rel=0.12)  # two bytes for each weight of a matrix product


def test_the_benchmark_measures_what_the_plan_command_reads() -> None:
    settings = plan_settings(CORE, plan_memory.overrides_of(1, False, 2))
    assert settings["batch"]["global_size"] == 2 * plan_memory.MICRO_BATCH
    assert plan_memory.predicted(1, True, 2)["peak"] < plan_memory.predicted(1, False, 2)["peak"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "recompute", "world_size"),
    [(0, False, 1), (1, False, 2), (1, True, 1), (2, False, 2), (3, False, 2)],
)
def test_the_memory_of_a_real_rank_is_within_15_percent(stage: int, recompute: bool, world_size: int) -> None:
    case = plan_memory.compared(stage, recompute, world_size)
    assert case["peak_ratio"] == pytest.approx(1.0, abs=plan_memory.LIMIT_RATIO), case
    assert case["rest_ratio"] == pytest.approx(1.0, abs=plan_memory.LIMIT_RATIO), case
