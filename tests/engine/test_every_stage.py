"""At every ZeRO stage, on one rank and on two: going back, parameters without gradient, and one bad element.

Also the switches that must not change what is trained, together: recomputed blocks, four micro steps, an
overlapped reduction, with learned task weights and a teacher that follows the student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from small_module import ACCUMULATION, DIM, FROZEN, GLOBAL_BATCH, RULES, knobs, patches, small_module
from small_run import losses, tally
from torch import Tensor, nn

from pretrain import build, cluster
from pretrain.config import RunConfig, validate
from pretrain.engine.deepspeed_engine import DeepSpeedEngine
from pretrain.engine.engine import Engine, EngineConfig, check_without_gradient
from pretrain.engine.local import LocalEngine
from pretrain.errors import CheckpointError, ConfigError
from pretrain.optim import Knobs, OptimConfig
from pretrain.peers import ALONE, Peers
from pretrain.views.prepare import Inputs, Moment, prepare, with_labels

STAGES = (0, 1, 2, 3)
OPTIMS = {"adamw": OptimConfig(clip_norm=0.5), "sgd": OptimConfig(name="sgd", clip_norm=0.5)}
NUM_STEPS = 2  # before the point that a run goes back to, and after it
# DeepSpeed keeps small parameters whole at stage 3; of these modules' some are kept so and some divided
PERSISTENT_NUMEL = 40


def deepspeed_engine(peers: Peers, module: Any, optim: str, stage: int) -> DeepSpeedEngine:
    zero = {"stage": stage, "stage3_param_persistence_threshold": PERSISTENT_NUMEL}
    settings = EngineConfig(precision="fp32", deepspeed={"zero_optimization": zero})
    size = GLOBAL_BATCH * ACCUMULATION
    return DeepSpeedEngine(module, settings, OPTIMS[optim], peers, size, ACCUMULATION, RULES)


def local_engine(module: Any, optim: str) -> LocalEngine:
    return LocalEngine(module, OPTIMS[optim], ACCUMULATION, "fp32", RULES)


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Copies that nothing writes into; complete on rank 0."""
    optimizer = engine.optimizer_state()
    return {**engine.weights(), **optimizer.tensors, "num_steps": torch.tensor(optimizer.num_steps)}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(found[name], value)]


def train(engine: Engine, peers: Peers, steps: range) -> list[Any]:
    """What each step told."""
    told = []
    for step in steps:
        output = engine.train_step(patches(step, peers), knobs(step), tally).read()
        assert not output.skipped
        told.append((output.values, output.grad_norm))
    return told


# --- going back ---------------------------------------------------------------------------------------------


def go_back(engine: Engine, peers: Peers) -> dict[str, Any]:
    """Train, keep everything, train on, load what was kept, and train the same steps again."""
    train(engine, peers, range(NUM_STEPS))
    weights, optimizer = cluster.from_first((engine.weights(), engine.optimizer_state()))
    later = range(NUM_STEPS, 2 * NUM_STEPS)
    first = {"told": train(engine, peers, later), "left": state_of(engine)}
    engine.load_weights(weights)
    engine.load_optimizer_state(optimizer)
    back = state_of(engine)
    again = {"told": train(engine, peers, later), "left": state_of(engine)}
    kept = {**weights, **optimizer.tensors, "num_steps": torch.tensor(NUM_STEPS)}
    return {"kept": kept, "back": back, "first": first, "again": again}


def load_others(engine: Engine, peers: Peers) -> dict[str, Any]:
    """Load weights that no training led to, also where no step writes, and take a step from them."""
    train(engine, peers, range(1))  # leaves the small parameters of ZeRO-3 whole
    others = other_weights()
    engine.load_weights(others)  # and step at once: reading the weights would make ZeRO-3 gather them anew
    total = engine.train_step(patches(1, peers), knobs(1), tally).read().values["total"]
    engine.load_weights(others)
    found = engine.weights()
    module = small_module(peers)
    module.load_state_dict(others)
    with torch.no_grad():
        own = torch.stack([module(images)["total"] for images in patches(1, peers)]).mean().reshape(1, 1)
        expected = peers.gather(own).mean().item()
    return {"found": found, "total": total, "expected": expected}


def other_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 3
        for name, value in small_module().state_dict().items()
    }


def refuse_other_models(engine: Engine) -> None:
    """Nothing is written of a state that does not fit."""
    before = engine.weights()
    state = small_module().state_dict()
    for damaged, text in (
        ({name: value for name, value in state.items() if name != "memory.queue"}, "1 missing, 0 unexp"),
        ({**state, "backbone.other": torch.zeros(1)}, "0 missing, 1 unexpected"),
        ({**state, "predictor.bias": torch.zeros(8)}, r"1 of another shape, such as 'predictor\.bias'"),
    ):
        with pytest.raises(CheckpointError, match=text):
            engine.load_weights(damaged)
    assert differing(engine.weights(), before) == []


def assert_went_back(record: dict[str, Any]) -> None:
    assert len(differing(record["first"]["left"], record["kept"])) > len(record["kept"]) / 2
    assert differing(record["back"], record["kept"]) == []
    assert record["again"]["told"] == record["first"]["told"]
    assert differing(record["again"]["left"], record["first"]["left"]) == []


def assert_loaded(record: dict[str, Any]) -> None:
    assert differing(record["found"], other_weights()) == []
    assert record["total"] == pytest.approx(record["expected"], rel=1e-5)


# --- parameters without gradient ----------------------------------------------------------------------------


def partly_trained(peers: Peers) -> Any:
    """With a head that nothing calls, one whose loss counts nothing, and one that step 0 does not reach."""
    module = small_module(peers)
    module.unused = nn.Linear(DIM, 3)
    module.weightless = nn.Linear(DIM, 3)
    module.late = nn.Linear(DIM, 3)
    plain = module.forward

    def forward(inputs: Any) -> dict[str, Tensor]:
        named = plain(inputs)
        features = inputs.images.mean(dim=1).new_ones(len(inputs.images), DIM)
        named["total"] = named["total"] + 0.0 * module.weightless(features).sum()
        module.num_calls += 1
        if module.num_calls > ACCUMULATION:
            named["total"] = named["total"] + module.late(features).mean()
        return named

    module.num_calls = 0
    module.forward = forward
    return module


def audit(engine: Engine, peers: Peers) -> dict[str, Any]:
    with pytest.raises(AssertionError):
        engine.without_gradient()
    train(engine, peers, range(1))
    first = engine.without_gradient()
    train(engine, peers, range(1, 2))
    return {"first": first, "second": engine.without_gradient()}


HEADS_WITHOUT = {f"{head}.{kind}" for head in ("unused", "weightless", "late") for kind in ("weight", "bias")}


# --- one bad element ----------------------------------------------------------------------------------------


def spoil_one_element(engine: DeepSpeedEngine, peers: Peers) -> dict[str, bool]:
    """The last rank's gradient has a NaN in one element, so that one rank's share of the sum is not."""
    train(engine, peers, range(1))
    verdicts = {}
    for name in ("backbone.cls_token", "predictor.weight", "head.first.weight"):
        for place in (0, -1):
            before = state_of(engine)
            handle = None
            if peers.rank == peers.world_size - 1:
                handle = engine.parameters[name].register_hook(
                    lambda gradient, at=place: with_nan(gradient, at)
                )
            output = engine.train_step(patches(1, peers), knobs(1), tally).read()
            if handle:
                handle.remove()
            verdicts[f"{name}[{place}]"] = output.skipped and differing(state_of(engine), before) == []
    train(engine, peers, range(1, 2))
    return verdicts


def with_nan(gradient: Tensor, place: int) -> Tensor:
    spoilt = gradient.clone()
    spoilt.view(-1)[place] = float("nan")
    return spoilt


# --- recompute, accumulation, overlap, teacher, learned weights ---------------------------------------------

NUM_IMAGES, MICRO_STEPS = 4, 4
KNOBS = Knobs(lr=0.05, peak_lr=0.05, weight_decay=0.0, epoch=0.0)
CONFIG = """{
  "model": {"name": "vit_tiny_patch16_224", "img_px": 16, "patch_px": 4,
            "args": {"depth": 2, "embed_dim": 12, "num_heads": 2}},
  "data": {"shards": "unused", "lanes": 2},
  "views": {"one": {"size_px": 16, "turn": true}, "two": {"size_px": 16, "turn": true}},
  "tasks": {"dino": {"hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 12, "freeze_last_layer_epochs": 0},
            "rotation": {}, "colorization": {}},
  "balance": {"kind": "uncertainty"},
  "teacher": {"momentum": 0.9},
  "optim": {"name": "sgd", "momentum": 0.0, "clip_norm": 0.1},
  "schedule": {"steps": 10},
  "batch": {"global_size": 16, "accumulation_steps": 4},
  "engine": ENGINE
}"""


def config(engine: str) -> RunConfig:
    return validate(CONFIG.replace("ENGINE", engine), "test")


def engine_settings(stage: int) -> str:
    zero = f'{{"stage": {stage}, "overlap_comm": true}}'
    return f'{{"precision": "fp32", "recompute": true, "deepspeed": {{"zero_optimization": {zero}}}}}'


def micro_inputs(config: RunConfig, micro_step: int, peers: Peers) -> Inputs:
    """This rank's share of the images of a micro step."""
    own = slice(*(NUM_IMAGES * rank // peers.world_size for rank in (peers.rank, peers.rank + 1)))
    generator = torch.Generator().manual_seed(micro_step)
    crops = torch.randint(256, (2, NUM_IMAGES, 16, 16, 3), dtype=torch.uint8, generator=generator)
    ids = torch.arange(NUM_IMAGES)[own] + NUM_IMAGES * micro_step
    prepared = prepare(build.recipe(config), 0, crops[:, own], torch.zeros_like(ids), ids)
    return with_labels(prepared, ids % 3, Moment(micro_step // MICRO_STEPS, 10, 0.0))


def train_with_teacher(config: RunConfig, peers: Peers) -> dict[str, Any]:
    """After each step a teacher of momentum 0 is the student, as the checkpoint holds it, to the last bit."""
    module = build.module(config, peers, torch.device("cpu"))
    teacher, copycat = module.make_teacher(), module.make_teacher()
    engine = build.engine(config, module, peers)
    steps, weights = [], [engine.weights()]
    for step in range(NUM_STEPS):
        inputs = (
            module.consult(teacher, micro_inputs(config, MICRO_STEPS * step + micro, peers))
            for micro in range(MICRO_STEPS)
        )
        output = engine.train_step(inputs, KNOBS, tally).read()
        assert not output.skipped
        module.finish_step()
        for average, momentum in ((teacher, 0.9), (copycat, 0.0)):
            student = (
                (f"{part}.{name}", value)
                for part in average.parts
                for name, value in engine.student(module.get_submodule(part))
            )
            average.update(student, momentum)
        weights.append(engine.weights())
        if peers.rank == 0:
            copied = copycat.state_dict()
            assert differing(copied, {name: weights[-1][name] for name in copied}) == []
            assert len(differing(weights[-1], weights[-2])) > 0.8 * len(weights[-1])
        steps.append({**losses(output), "grad_norm": output.grad_norm})
    return {"steps": steps, "weights": weights, "teacher": teacher.state_dict()}


# --- the settings as DeepSpeed understood them --------------------------------------------------------------


def effective(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Read back from where DeepSpeed looks when it trains."""
    understood = engine.engine._config
    zero = understood.zero_config
    found = {name: getattr(zero, name) for name in (*ZERO_EFFECTIVE, "stage", "compute_grad_norm")}
    found |= {
        "gradient_clipping": understood.gradient_clipping,
        "bf16": understood.bfloat16_config.enabled,
        "check_grad_overflow": understood.bfloat16_config.check_grad_overflow,
        "fp16": understood.float16_config.enabled,
        "autocast": understood.torch_autocast_enabled,
        "rounded modules": understood.torch_autocast_lower_precision_safe_modules,
        "communication": str(engine.engine.communication_data_type),
        "predivided by": understood.gradient_predivide_factor,
        "divided before": understood.prescale_gradients,
        "managed accumulation": understood.managed_gradient_accumulation,
        "accumulated in": str(engine.engine.get_data_types()[1]),
        "batch": (understood.train_batch_size, understood.gradient_accumulation_steps),
    }
    if engine.stage in (1, 2):
        inner = engine.engine.optimizer
        found |= {"inner clip": inner.clip_grad, "inner overflow": inner.check_grad_overflow}
    return found


ZERO_EFFECTIVE = {
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "round_robin_gradients": False,
    "allgather_partitions": True,
    "use_multi_rank_bucket_allreduce": True,
    "reduce_bucket_size": 1_000_448,  # a million, rounded up to DeepSpeed's alignment
    "allgather_bucket_size": 1_000_448,
    "sub_group_size": 1_000_000_000,
    "ignore_unused_parameters": True,
    "offload_optimizer": None,
    "offload_param": None,
    "param_persistence_threshold": PERSISTENT_NUMEL,
    "prefetch_bucket_size": 50_000_000,
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
}
EFFECTIVE = {
    **ZERO_EFFECTIVE,
    "gradient_clipping": 0.0,
    "bf16": False,
    "check_grad_overflow": False,
    "fp16": False,
    "autocast": False,
    "rounded modules": [],
    "communication": "torch.float32",
    "predivided by": 1.0,
    "divided before": False,
    "managed accumulation": True,
    "accumulated in": "torch.float32",
    "batch": (GLOBAL_BATCH * ACCUMULATION, ACCUMULATION),
}


# --- on ranks -----------------------------------------------------------------------------------------------


def on_every_stage(place: cluster.Cluster, folder: Path) -> None:
    peers = cluster.peers(place)
    record: dict[Any, Any] = {}
    for stage in STAGES:
        engine = deepspeed_engine(peers, small_module(peers), "sgd" if stage == 1 else "adamw", stage)
        record["settings", stage] = effective(engine)
        record["back", stage] = go_back(engine, peers)
        record["loaded", stage] = load_others(engine, peers)
        refuse_other_models(engine)
        record["audit", stage] = audit(deepspeed_engine(peers, partly_trained(peers), "sgd", stage), peers)
        record["spoilt", stage] = spoil_one_element(
            deepspeed_engine(peers, small_module(peers), "adamw", stage), peers
        )
        record["teacher", stage] = train_with_teacher(config(engine_settings(stage)), peers)
    torch.save(record, folder / f"rank{place.rank}.pt")


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Of every rank."""
    folder = tmp_path_factory.mktemp("stages")
    run_on_ranks(request.param, on_every_stage, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return train_with_teacher(config('{"kind": "local", "precision": "fp32"}'), ALONE)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_back_bit_for_bit(records: list[dict[Any, Any]], stage: int) -> None:
    assert_went_back(records[0]["back", stage])
    assert_loaded(records[0]["loaded", stage])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_uses_the_settings_that_are_written_out(records: list[dict[Any, Any]], stage: int) -> None:
    """Its own defaults have changed under users: clipping at 1.0, looking for overflow; none is used."""
    inner = {"inner clip": 0.0, "inner overflow": False} if stage in (1, 2) else {}
    norm = {"compute_grad_norm": stage not in (1, 2)}
    for record in records:
        assert record["settings", stage] == {**EFFECTIVE, **norm, **inner, "stage": stage}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_that_the_first_step_does_not_reach_are_named(
    records: list[dict[Any, Any]], stage: int
) -> None:
    """Fault 49: an unused head, a task that counts nothing; frozen parameters are none of these."""
    for record in records:
        for found in record["audit", stage].values():
            assert set(found) == HEADS_WITHOUT
            assert not FROZEN & set(found)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_one_element_that_is_not_finite_on_one_rank_is_seen_by_all(
    records: list[dict[Any, Any]], stage: int
) -> None:
    """Fault 21: wherever the element is, so also in a share of the gradients that only one rank holds."""
    for record in records:
        assert len(record["spoilt", stage]) == 6
        assert [name for name, is_well in record["spoilt", stage].items() if not is_well] == []


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_recompute_accumulation_and_overlap_train_the_same(
    records: list[dict[Any, Any]], plain: dict[str, Any], stage: int
) -> None:
    """T-A-1 with four micro steps, against plain torch without recomputation."""
    found = records[0]["teacher", stage]
    for wanted, step in zip(plain["steps"], found["steps"], strict=True):
        assert step == pytest.approx(wanted, rel=1e-4)
    for name, value in plain["weights"][-1].items():
        torch.testing.assert_close(
            found["weights"][-1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, value in plain["teacher"].items():
        torch.testing.assert_close(
            found["teacher"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    weight = plain["weights"][-1]["balance.log_variances.rotation"]
    assert weight != 0.0, "the weights of the tasks are learned"


# --- the local engine, and the error ------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_local_engine_goes_back_bit_for_bit(optim: str) -> None:
    engine = local_engine(small_module(), optim)
    assert_went_back(go_back(engine, ALONE))
    assert_loaded(load_others(engine, ALONE))
    refuse_other_models(engine)


def test_one_engine_goes_on_in_place_from_the_state_of_another() -> None:
    donor, engine = (local_engine(small_module(), "adamw") for _ in range(2))
    train(donor, ALONE, range(2))
    train(engine, ALONE, range(3))
    engine.load_weights(donor.weights())
    engine.load_optimizer_state(donor.optimizer_state())
    assert train(engine, ALONE, range(2, 3)) == train(donor, ALONE, range(2, 3))


def test_the_local_engine_names_what_its_first_step_did_not_reach() -> None:
    """Fault 49, and nothing is named where everything is trained."""
    found = audit(local_engine(partly_trained(ALONE), "sgd"), ALONE)
    assert set(found["first"]) == set(found["second"]) == HEADS_WITHOUT
    assert audit(local_engine(small_module(), "sgd"), ALONE) == {"first": [], "second": []}


def test_parameters_without_gradient_end_the_run_unless_they_are_allowed() -> None:
    names = ["tasks.a.head.weight", "tasks.a.head.bias", "mask_token"]
    check_without_gradient([], [])
    check_without_gradient(names, ["tasks.a.*", "mask_token"])
    with pytest.raises(ConfigError, match=r"1 trained parameters .* \('mask_token'\); .* engine\.allow_with"):
        check_without_gradient(names, ["tasks.a.*"])
    with pytest.raises(
        ConfigError, match=r"4 trained .* \('tasks\.a\.head\.weight', .*'mask_token', \.\.\.\)"
    ):
        check_without_gradient([*names, "no_position"], ["tasks.b.*", "mask"])
