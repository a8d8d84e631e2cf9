"""Every optimizer, rule and kind of tensor, at every ZeRO stage on two ranks, as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from small_module import (
    ACCUMULATION,
    BUFFERS,
    FROZEN,
    GLOBAL_BATCH,
    RULES,
    knobs,
    patches,
    small_module,
)
from small_run import tally
from torch import Tensor

from pretrain import cluster
from pretrain.engine.deepspeed_engine import DeepSpeedEngine
from pretrain.engine.engine import (
    EngineConfig,
    OptimizerState,
    buffer_dtypes,
    check_buffer_dtypes,
    clip_each,
)
from pretrain.engine.local import LocalEngine
from pretrain.errors import CheckpointError, ConfigError, TrainingError
from pretrain.optim import Knobs, OptimConfig
from pretrain.peers import Peers

STAGES = (0, 1, 2, 3)
# eps is large, so that Adam does not magnify the rounding of gradients near zero
OPTIMS = {
    "adamw": OptimConfig(eps=1e-3, clip_norm=0.5),
    "sgd": OptimConfig(name="sgd", nesterov=True, clip_norm=0.5, decay="all"),
    "plain sgd": OptimConfig(name="sgd", momentum=0.0, clip_norm=0.0),
    "lars": OptimConfig(name="lars", trust_coefficient=0.02, clip="tensor", clip_norm=0.2),
    "each clipped": OptimConfig(eps=1e-3, clip="tensor", clip_norm=0.2, decay="no_tokens"),
}
RUNS = [
    (name, stage)
    for name, optim in OPTIMS.items()
    for stage in STAGES
    if stage == 0 or (optim.clip == "global" and name != "plain sgd") or (name, stage) == ("plain sgd", 1)
]


def local_engine(optim: OptimConfig) -> LocalEngine:
    return LocalEngine(small_module(), optim, ACCUMULATION, "fp32", RULES)


def deepspeed_engine(
    peers: Peers,
    optim: OptimConfig,
    stage: int,
    precision: Any = "fp32",
    weights: dict[str, Tensor] | None = None,
) -> DeepSpeedEngine:
    module = small_module(peers)
    if weights:
        module.load_state_dict(weights)
    settings = EngineConfig(precision=precision, deepspeed={"zero_optimization": {"stage": stage}})
    size = GLOBAL_BATCH * ACCUMULATION
    return DeepSpeedEngine(module, settings, optim, peers, size, ACCUMULATION, RULES)


def train(engine: Any, peers: Peers, steps: range) -> dict[str, Any]:
    """Everything one can ask an engine after these steps."""
    seen = []
    for step in steps:
        output = engine.train_step(patches(step, peers), knobs(step), tally).read()
        assert not output.skipped
        seen.append({"total": output.values["total"], "grad_norm": output.grad_norm})
    state = engine.optimizer_state()
    return {
        "seen": seen,
        "weights": engine.weights(),
        "state": state.tensors,
        "num_steps": state.num_steps,
        "groups": [
            (group["name"], group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups
        ],
    }


def expected(optim: OptimConfig) -> dict[str, Any]:
    """Three steps of the local engine, and what there was after one and after two."""
    engine = local_engine(optim)
    first = train(engine, Peers(), range(1))
    second = train(engine, Peers(), range(1, 2))
    third = train(engine, Peers(), range(2, 3))
    return {"first": first, "second": second, "third": third}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {name: expected(optim) for name, optim in OPTIMS.items()}


def assert_alike_on_all_ranks(engine: DeepSpeedEngine, peers: Peers) -> None:
    for name, buffer in engine.module.named_buffers():
        assert buffer.dtype == (torch.int64 if name == "memory.pointer" else torch.float32), name
        everywhere = peers.gather(buffer.double())
        assert all(torch.equal(part, buffer.double()) for part in everywhere.split(len(buffer))), name


def run_everything(place: cluster.Cluster, folder: Path) -> None:
    peers = cluster.peers(place)
    saved = torch.load(folder / "references.pt")
    record = {}
    for name, stage in RUNS:
        optim = OPTIMS[name]
        engine = deepspeed_engine(peers, optim, stage)
        first = train(engine, peers, range(1))
        third = train(engine, peers, range(1, 3))
        assert_alike_on_all_ranks(engine, peers)
        if optim.name == "adamw":
            assert all(engine.optimizer.state_for(flat)["step"] == 3 for flat in engine._flats())
        # a fresh engine goes on from what the local one had after two steps
        before = saved[name]["second"]
        engine = deepspeed_engine(peers, optim, stage, weights=before["weights"])
        engine.load_optimizer_state(OptimizerState(2, before["state"]))
        given_back = engine.optimizer_state().tensors
        after = train(engine, peers, range(2, 3))
        record[name, stage] = {
            "first": first,
            "third": third,
            "given back": given_back,
            "after resuming": after,
        }
    for stage in STAGES:
        engine = deepspeed_engine(peers, OPTIMS["adamw"], stage, "bf16")
        record["bf16", stage] = train(engine, peers, range(3))
        assert_alike_on_all_ranks(engine, peers)
        skip_one(deepspeed_engine(peers, OPTIMS["sgd"], stage), peers)
    if place.is_first:
        torch.save(record, folder / "record.pt")


def skip_one(engine: DeepSpeedEngine, peers: Peers) -> None:
    """A step with a NaN on the last rank leaves weights, queue and momentum as they are."""
    before = train(engine, peers, range(2))
    batches = list(patches(2, peers))
    if peers.rank == peers.world_size - 1:
        batches[0].images[0] = float("nan")
    assert engine.train_step(iter(batches), knobs(2), tally).read().skipped
    after = train(engine, peers, range(0))
    assert after["num_steps"] == before["num_steps"] == 2
    for part in ("weights", "state"):
        assert all(torch.equal(value, after[part][name]) for name, value in before[part].items()), part
    assert_alike_on_all_ranks(engine, peers)
    train(engine, peers, range(2, 3))


@pytest.fixture(scope="module")
def record(references: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("optimizers")
    torch.save(references, folder / "references.pt")
    run_on_ranks(2, run_everything, folder)
    return dict(torch.load(folder / "record.pt"))


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], where: Any) -> None:
    assert found.keys() == wanted.keys(), where
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-4,
            atol=2e-5,
            msg=lambda text, name=name: f"{where}, {name}: {text}",
        )


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_two_ranks_step_as_one_process(
    record: dict[Any, Any], references: dict[str, Any], name: str, stage: int
) -> None:
    """T-A-1 for every optimizer: the state after a step holds the gradients, and three steps the weights."""
    found, wanted = record[name, stage], references[name]
    for moment in ("first", "third"):
        assert found[moment]["num_steps"] == wanted[moment]["num_steps"]
        assert_close(found[moment]["weights"], wanted[moment]["weights"], moment)
        assert_close(found[moment]["state"], wanted[moment]["state"], moment)
        for seen, value in zip(found[moment]["seen"][-1:], wanted[moment]["seen"], strict=True):
            assert seen == pytest.approx(value, rel=1e-4), moment


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_a_run_goes_on_from_the_state_of_another_engine(
    record: dict[Any, Any], references: dict[str, Any], name: str, stage: int
) -> None:
    found, wanted = record[name, stage], references[name]
    for key, value in wanted["second"]["state"].items():
        assert torch.equal(found["given back"][key], value), key
    assert found["after resuming"]["num_steps"] == 3
    assert_close(found["after resuming"]["weights"], wanted["third"]["weights"], "after resuming")
    assert_close(found["after resuming"]["state"], wanted["third"]["state"], "after resuming")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_groups_keep_their_names_and_rules(
    record: dict[Any, Any], references: dict[str, Any], name: str, stage: int
) -> None:
    for moment, step in (("first", 0), ("third", 2)):
        groups = record[name, stage][moment]["groups"]
        assert groups == references[name][moment]["groups"]
        lr_of = {group: lr for group, lr, _ in groups}
        assert lr_of["predictor.:decayed"] == 0.05
        assert lr_of["head.last.:decayed"] == (0.0 if step == 0 else knobs(2).lr)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "stage"), [*RUNS, *(("bf16", stage) for stage in STAGES)])
def test_frozen_parameters_are_saved_unchanged_and_have_no_state(
    record: dict[Any, Any], name: str, stage: int
) -> None:
    """T-M3-3 and fixed positions through the engines: in the weights, never stepped, without state."""
    start = small_module().state_dict()
    found = record[name, stage] if name == "bf16" else record[name, stage]["third"]
    assert found["weights"].keys() == start.keys() >= FROZEN | BUFFERS
    for frozen in FROZEN:
        assert torch.equal(found["weights"][frozen], start[frozen]), frozen
        assert not any(key.endswith(frozen) for key in found["state"])
    trained = start.keys() - FROZEN - BUFFERS
    assert all(not torch.equal(found["weights"][each], start[each]) for each in trained)
    assert found["weights"]["memory.pointer"].item() == 3 * ACCUMULATION * GLOBAL_BATCH % 12
    assert {value.dtype for key, value in found["weights"].items() if key != "memory.pointer"} == {
        torch.float32
    }


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_the_frozen_last_layer_waits_for_its_epoch(record: dict[Any, Any], stage: int) -> None:
    """T-DI-6 at every ZeRO stage: bit for bit unchanged in epoch 0, trained in epoch 1."""
    start = small_module().state_dict()["head.last.weight"]
    for name in ("adamw", "sgd"):
        assert torch.equal(record[name, stage]["first"]["weights"]["head.last.weight"], start)
        assert not torch.equal(record[name, stage]["third"]["weights"]["head.last.weight"], start)


def test_the_norm_is_told_as_it_was_before_clipping(references: dict[str, Any]) -> None:
    free = expected(OPTIMS["adamw"].model_copy(update={"clip_norm": 0.0}))["first"]["seen"][0]["grad_norm"]
    assert free > 1.0
    for name in ("adamw", "sgd", "lars", "each clipped"):
        assert references[name]["first"]["seen"][0]["grad_norm"] == pytest.approx(free, rel=1e-6)


def test_each_tensor_is_clipped_by_its_own_norm() -> None:
    """F 29; by hand: (3, 4) has norm 5 and is shortened to 2, (0.6, 0.8) is below 2 and stays."""
    long, short, zero = torch.tensor([3.0, 4.0]), torch.tensor([[0.6], [0.8]]), torch.zeros(2)
    clip_each([long, short, zero], 2.0)
    torch.testing.assert_close(long, torch.tensor([1.2, 1.6]))
    assert torch.equal(short, torch.tensor([[0.6], [0.8]]))
    assert torch.equal(zero, torch.zeros(2))
    clip_each([], 2.0)


def test_the_first_step_of_sgd_is_clipped_globally_or_by_tensor() -> None:
    """Without momentum and decay the step is the clipped gradient itself."""
    still = OptimConfig(name="sgd", momentum=0.0, clip_norm=0.3)
    start = small_module().state_dict()
    for clip in ("global", "tensor"):
        engine = LocalEngine(
            small_module(), still.model_copy(update={"clip": clip}), ACCUMULATION, "fp32", ()
        )
        step = Knobs(lr=1.0, peak_lr=1.0, weight_decay=0.0, epoch=0.0)
        engine.train_step(patches(0), step, tally).read()
        lengths = [(start[name] - p).norm().item() for name, p in engine.parameters.items()]
        if clip == "global":
            assert sum(length**2 for length in lengths) ** 0.5 == pytest.approx(0.3, rel=1e-3)
        else:
            assert max(lengths) == pytest.approx(0.3, rel=1e-3)
            assert sum(length > 0.299 for length in lengths) > 1
            assert min(lengths) < 0.25


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_refuses_lars_above_stage_0_before_it_starts(stage: int) -> None:
    with pytest.raises(ConfigError, match=r"optim\.name: 'lars'"):
        deepspeed_engine(Peers(), OPTIMS["lars"], stage)


def test_the_state_of_another_optimizer_is_refused() -> None:
    adamw, sgd, plain = (local_engine(OPTIMS[name]) for name in ("adamw", "sgd", "plain sgd"))
    with pytest.raises(
        CheckpointError, match=r"\(exp_avg and exp_avg_sq; this run's keeps momentum_buffer\)"
    ):
        sgd.load_optimizer_state(adamw.optimizer_state())
    with pytest.raises(
        CheckpointError, match=r"\(momentum_buffer; this run's keeps exp_avg and exp_avg_sq\)"
    ):
        adamw.load_optimizer_state(sgd.optimizer_state())
    with pytest.raises(CheckpointError, match=r"\(nothing; this run's keeps momentum_buffer\)"):
        sgd.load_optimizer_state(plain.optimizer_state())


def test_the_state_of_other_parameters_is_refused() -> None:
    engine = local_engine(OPTIMS["sgd"])
    state = engine.optimizer_state()
    bias = "momentum_buffer.predictor.bias"
    for damaged in (
        {key: value for key, value in state.tensors.items() if key != bias},
        {**state.tensors, bias: torch.zeros(8)},
        {**state.tensors, f"{bias}s": torch.zeros(7)},
    ):
        with pytest.raises(CheckpointError, match=rf"\(1 differ, such as '{bias}s?'\)"):
            engine.load_optimizer_state(OptimizerState(1, damaged))


def test_a_buffer_that_was_cast_is_told() -> None:
    module = small_module()
    dtypes = buffer_dtypes(module)
    check_buffer_dtypes(module, dtypes)
    module.memory.centre = module.memory.centre.bfloat16()
    with pytest.raises(
        TrainingError, match=r"cast 1 buffers \(memory.centre from torch.float32 to torch.bfl"
    ):
        check_buffer_dtypes(module, dtypes)


def test_a_module_without_buffers_is_trained_too() -> None:
    module = small_module()
    module.memory.remember = lambda seen, peers: None
    for name, buffer in list(module.memory.named_buffers()):
        delattr(module.memory, name)
        setattr(module.memory, name, buffer)
    engine = LocalEngine(module, OPTIMS["sgd"], ACCUMULATION, "fp32")
    assert not list(module.buffers())
    batches = list(patches(0))
    batches[0].images[0] = float("nan")
    assert engine.train_step(iter(batches), knobs(0), tally).read().skipped
    assert not engine.train_step(patches(0), knobs(0), tally).read().skipped
