"""The comparison of the tasks' gradients: right, the same on any number of ranks, and without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_frameworks_together import FRAMEWORKS, KNOBS, config, inputs

from pretrain import build, cluster
from pretrain.conflict import agreement, compare_gradients, shared_parameters
from pretrain.peers import ALONE, Peers

STAGES = (0, 1, 2)
STEPS = 3


def test_norms_and_cosines_are_those_of_the_vectors() -> None:
    found = agreement(["a", "b", "c"], torch.tensor([[3.0, 4.0], [-8.0, 6.0], [0.0, 0.0]]))
    assert found == {
        "gradient_norm/a": pytest.approx(5.0),
        "gradient_norm/b": pytest.approx(10.0),
        "gradient_norm/c": 0.0,
        "gradient_cosine/a:b": pytest.approx(0.0, abs=1e-6),
    }
    opposed = agreement(["a", "b"], torch.tensor([[1.0, 2.0], [-2.0, -4.0]]))
    assert opposed["gradient_cosine/a:b"] == pytest.approx(-1.0)


def test_what_is_not_finite_is_left_out() -> None:
    found = agreement(["a", "b", "c"], torch.tensor([[torch.nan, 1.0], [1.0, 1.0], [1.0, -1.0]]))
    assert set(found) == {"gradient_norm/b", "gradient_norm/c", "gradient_cosine/b:c"}


@pytest.mark.parametrize("of", ["last_block", "backbone"])
def test_the_parts_add_up_to_the_gradient_of_the_total(of: Any) -> None:
    run = config(0)
    module = build.module(run, ALONE, torch.device("cpu"))
    seen = module.consult(module.make_teacher(), inputs(run, 0, ALONE))
    parameters = shared_parameters(module.backbone, of)
    found = compare_gradients(module, seen, parameters, "fp32")
    module(seen)["total"].backward()
    squared = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
    norms = [found[f"gradient_norm/{name}"] for name in FRAMEWORKS]
    pairs = [
        found[f"gradient_cosine/{first}:{second}"] * norms[i] * norms[i + 1 + j]
        for i, first in enumerate(FRAMEWORKS)
        for j, second in enumerate(FRAMEWORKS[i + 1 :])
    ]
    assert sum(norm**2 for norm in norms) + 2 * sum(pairs) == pytest.approx(squared, rel=1e-3)


def test_a_backbone_has_more_parameters_than_its_last_block() -> None:
    module = build.module(config(0), ALONE, torch.device("cpu"))
    last, whole = (shared_parameters(module.backbone, of) for of in ("last_block", "backbone"))
    assert 0 < len(last) < len(whole)
    assert {id(one) for one in last} < {id(one) for one in whole}


def train(stage: int, peers: Peers, compares: bool) -> dict[str, Any]:
    run = config(stage)
    module = build.module(run, peers, torch.device("cpu"))
    teacher = module.make_teacher()
    engine = build.engine(run, module, peers)
    found = []
    for step in range(STEPS):
        seen = module.consult(teacher, inputs(run, step, peers))
        if compares:
            found.append(
                compare_gradients(module, seen, shared_parameters(module.backbone, "backbone"), "fp32")
            )
        engine.train_step(iter([seen]), KNOBS, lambda: torch.zeros(0, dtype=torch.float64)).read()
        module.finish_step()
    return {"found": found, "left": {**engine.weights(), **engine.optimizer_state().tensors}}


def train_on_rank(place: cluster.Cluster, folder: Path) -> None:
    peers = cluster.peers(place)
    for stage in STAGES:
        records = [train(stage, peers, compares) for compares in (True, False)]
        if place.is_first:
            torch.save(records, folder / f"{stage}.pt")


@pytest.mark.distributed
def test_a_run_with_it_and_one_without_have_the_same_weights(tmp_path: Path) -> None:
    run_on_ranks(2, train_on_rank, tmp_path)
    alone = compare_alone()
    for stage in STAGES:
        with_it, without = torch.load(tmp_path / f"{stage}.pt")
        assert with_it["left"].keys() == without["left"].keys()
        for name, value in without["left"].items():
            assert torch.equal(with_it["left"][name], value), (stage, name)
        assert with_it["found"][0].keys() == alone.keys()
        for name, value in alone.items():
            assert with_it["found"][0][name] == pytest.approx(value, rel=2e-3, abs=2e-3), (stage, name)


def compare_alone() -> dict[str, float]:
    """Before the first step, on one rank."""
    run = config(0)
    module = build.module(run, ALONE, torch.device("cpu"))
    seen = module.consult(module.make_teacher(), inputs(run, 0, ALONE))
    return compare_gradients(module, seen, shared_parameters(module.backbone, "backbone"), "fp32")
