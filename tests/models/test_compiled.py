"""Blocks that are compiled compute what they did, keep their names, and are compiled once.

Most tests leave out the last stage, which makes C++ of the graphs: tracing, guards, autograd and hooks are
those of a real run, in a tenth of the time. The slow ones are of the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from method_configs import METHODS, reduced_config
from timm.layers import DropPath
from torch import Tensor

from pretrain import build
from pretrain.check import find_problems
from pretrain.config import RunConfig
from pretrain.conflict import compare_gradients, shared_parameters
from pretrain.engine.local import LocalEngine
from pretrain.errors import UserError
from pretrain.models.backbone import BackboneConfig, create_backbone
from pretrain.models.compiled import SharedDropPath, compile_blocks
from pretrain.models.teacher import Teacher
from pretrain.peers import ALONE
from pretrain.preflight import check_compiler
from pretrain.views.prepare import Inputs, prepare, with_labels

# torch looks whether tensors have gradients, and hides the warning of that, unless warnings are errors
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

TRACED = "aot_eager"
NUM_SAMPLES = 64


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Graphs of an earlier test would serve this one, and count against its limit."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend: str = TRACED) -> None:
        self.count = 0
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.count += 1
        return self._compile(graph, examples)


class Run:
    """Steps of a method on random crops, with the local engine."""

    def __init__(self, config: RunConfig, compiled: Graphs | None = None) -> None:
        self.config = config
        self.module = build.module(config, ALONE, torch.device("cpu"), NUM_SAMPLES)
        self.teacher: Teacher | None = self.module.make_teacher() if config.teacher else None
        self.engine = build.engine(config, self.module, ALONE, self.teacher)
        assert isinstance(self.engine, LocalEngine)
        if compiled is not None:
            compile_blocks(self.module, dynamic=build.varies_in_length(config), backend=compiled)
            if self.teacher is not None:
                compile_blocks(self.teacher.backbone, backend=compiled)
        self.recipe = build.recipe(config)
        self.timetable = build.timetable(config, NUM_SAMPLES)
        self.lengths: set[int] = set()  # of the sequences that the student got

    def inputs(self, step: int) -> Iterator[Inputs]:
        generator, batch = torch.Generator().manual_seed(step), self.config.batch.global_size
        sizes = [view.size_px for view in self.config.views.values()]
        crops = [
            torch.randint(0, 256, (sizes.count(px), batch, px, px, 3), dtype=torch.uint8, generator=generator)
            for px in dict.fromkeys(sizes)
        ]
        ids, epochs = torch.arange(batch) + step * batch, torch.zeros(batch, dtype=torch.int64)
        made = prepare(self.recipe, self.config.seed, crops, epochs, ids, step)
        made = with_labels(made, torch.zeros_like(ids), self.timetable.moment(step))
        for group in made.groups:
            mask = group.plan.mask
            kept = None if mask is None else mask.kept
            self.lengths.add(group.images.shape[-1] if kept is None else kept.shape[1])
        is_bf16 = self.config.engine.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            yield self.module.consult(self.teacher, made) if self.teacher is not None else made

    def gradients(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Losses and gradients of the first batch."""
        is_bf16 = self.config.engine.precision == "bf16"
        torch.manual_seed(0)
        (inputs,) = self.inputs(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            values = self.module(inputs)
        values["total"].backward()
        found = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}
        self.module.zero_grad()
        return {name: float(value) for name, value in values.items() if name.startswith("loss/")}, found

    def step(self, step: int) -> None:
        torch.manual_seed(step)
        self.engine.train_step(
            self.inputs(step), self.timetable.knobs(step), lambda: torch.ones(1, dtype=torch.float64)
        )
        if self.teacher is not None:
            named = (
                (f"{part}.{name}", value)
                for part in self.teacher.parts
                for name, value in self.engine.student(self.module.get_submodule(part))
            )
            self.teacher.update(named, 0.9)


def method(name: str, *more: str) -> RunConfig:
    """A method of `configs/methods`, with two small blocks; without drop path, whose draws would differ."""
    args = [] if "swin" in name else ["model.args={depth: 2, embed_dim: 24, num_heads: 2}"]
    own = [*args, "model.drop_path_ratio=0", "engine.kind=local", *more]
    return reduced_config(METHODS / f"{name}.yaml", Path("unused"), *own)


CORE = "mae_contrastive_vits4_cifar10"


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far each gradient is from what is expected, in parts of the longest gradient."""
    assert found.keys() == expected.keys()
    longest = max(float(value.norm()) for value in expected.values())
    return {name: float((found[name] - expected[name]).norm()) / longest for name in expected}


def check_same(name: str, precision: str, backend: str, *more: str) -> None:
    # products of bf16 have 8 bits; where one is rounded otherwise, a sum over a batch moves by far less
    tolerance = 1e-5 if precision == "fp32" else 0.02
    config = method(name, f"engine.precision={precision}", *more)
    graphs = Graphs(backend)
    expected_losses, expected = Run(config).gradients()
    losses, gradients = Run(config, graphs).gradients()
    assert graphs.count > 0
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    assert max(differences(gradients, expected).values()) < tolerance


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_traced_blocks_give_the_losses_and_gradients_of_several_tasks(precision: str) -> None:
    check_same(CORE, precision, TRACED)


@pytest.mark.slow
def test_traced_blocks_may_be_recomputed_in_the_backward_pass() -> None:
    check_same(CORE, "fp32", TRACED, "engine.recompute=true")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        CORE,
        "mae_vits4_cifar10",
        "ijepa_vits4_cifar10",
        "dino_vits16",
        "relswin_t_cifar10",
        "relt2t_14_cifar10",
    ],
)
def test_compiled_blocks_give_the_losses_and_gradients_of(name: str, precision: str) -> None:
    check_same(name, precision, "inductor")


def test_nothing_is_compiled_after_the_first_step() -> None:
    """Global and local crops, a teacher, and a probability of drop path for each block."""
    graphs = Graphs()
    blocks = "model.args={depth: 4, embed_dim: 24, num_heads: 2}"
    run = Run(method("dino_vits16", blocks, "model.drop_path_ratio=0.3"), graphs)
    assert len(run.recipe.views) > 2
    run.step(0)
    assert graphs.count == 3  # global crops, local ones, and those of the teacher
    for step in range(1, 4):
        run.step(step)
    assert graphs.count == 3


@pytest.mark.slow
def test_contexts_of_any_length_share_a_graph() -> None:
    graphs = Graphs()
    run = Run(method("ijepa_vits4_cifar10"), graphs)
    for step in range(2):
        run.step(step)
    before, few = graphs.count, set(run.lengths)
    for step in range(2, 12):
        run.step(step)
    assert len(run.lengths) > len(few)  # else nothing was shown
    assert graphs.count == before


def test_a_shape_that_is_new_is_seen_by_these_tests() -> None:
    graphs = Graphs("eager")
    run = Run(method("ijepa_vits4_cifar10"))
    compile_blocks(run.module, dynamic=False, backend=graphs)
    for step in range(2):
        run.step(step)
    before = graphs.count
    for step in range(2, 12):
        run.step(step)
    assert graphs.count > before


def test_more_graphs_than_foreseen_are_an_error() -> None:
    vit = tiny_vit()
    compile_blocks(vit, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        vit(torch.zeros(1, 3, 32, 32))
        vit(torch.zeros(2, 3, 32, 32))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            vit(torch.zeros(3, 3, 32, 32))


def tiny_vit(drop_path: float = 0.0) -> Any:
    args = {"depth": 4, "embed_dim": 24, "num_heads": 2}
    config = BackboneConfig(img_px=32, patch_px=8, drop_path_ratio=drop_path, args=args)
    return create_backbone(config)


def test_a_compiled_network_keeps_its_names_and_its_copy_is_not_compiled() -> None:
    vit = tiny_vit(drop_path=0.2)
    names, buffers = list(vit.state_dict()), dict(vit.named_buffers())
    assert compile_blocks(vit, backend=TRACED) == 4
    assert list(vit.state_dict()) == names
    assert dict(vit.named_buffers()) == buffers
    graphs = Graphs()
    compile_blocks(vit, backend=graphs)
    copied = copy.deepcopy(vit).eval()
    images = torch.randn(2, 3, 32, 32)
    features = copied(images)
    assert graphs.count == 0
    torch.testing.assert_close(features, vit.eval()(images))
    assert graphs.count == 1


def test_a_teacher_has_no_drop_path_left_to_compile() -> None:
    vit = tiny_vit(drop_path=0.2).requires_grad_(False)
    compile_blocks(vit, backend=TRACED)
    assert not any(isinstance(part, DropPath | SharedDropPath) for part in vit.modules())


def test_drop_path_with_a_tensor_drops_as_often_as_told_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = SharedDropPath(0.25, scale_by_keep=True, device=torch.device("cpu"))(torch.ones(20_000, 3, 2))
    per_sample = dropped[:, 0, 0]
    assert torch.equal(dropped, per_sample.view(-1, 1, 1).expand_as(dropped))  # whole branches
    assert sorted(set(per_sample.tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert float((per_sample == 0).float().mean()) == pytest.approx(0.25, abs=0.02)  # six sigma


def test_gradients_of_tasks_can_be_compared_on_a_compiled_module() -> None:
    """Which walks back through one graph several times."""
    config = method(CORE)
    plain, compiled = Run(config), Run(config, Graphs())
    compiled.gradients()  # as after a step
    plain.gradients()
    found = [
        compare_gradients(
            run.module, next(run.inputs(0)), shared_parameters(run.module.backbone, "backbone"), "fp32"
        )
        for run in (compiled, plain)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)


def test_zero_3_is_not_compiled() -> None:
    stage = "engine.deepspeed={zero_optimization: {stage: 3}}"
    deepspeed = [stage, "engine.kind=deepspeed"]
    (problem,) = find_problems(method(CORE, *deepspeed, "engine.compile=on"), 1)["engine"]
    assert str(problem).startswith("engine.compile: 'on' does not go with ZeRO-3")
    assert not build.compiles(method(CORE, *deepspeed), "cuda")
    assert build.compiles(method(CORE), "cuda")
    assert not build.compiles(method(CORE), "cpu")


def test_a_run_without_a_compiler_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`on` and `off` are truth values in YAML."""
    config = method(CORE, "engine.compile=on")
    assert config.engine.compile == "on"
    check_compiler(config, "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    for device in ("cpu", "cuda"):
        with pytest.raises(
            UserError, match=r"^engine\.compile: 'on' needs .*, which .*; install it, or set .*=off$"
        ):
            check_compiler(config, device)
    check_compiler(method(CORE, "engine.compile=off"), "cuda")
