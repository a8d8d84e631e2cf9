"""The pixels of views in one compiled graph: what a GPU gets, tried on a processor.

The plan is drawn outside of the graph, so its numbers are the same by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_configs import METHODS
from torch import Tensor

from pretrain import build
from pretrain.config import load_config
from pretrain.views import prepare as preparing
from pretrain.views.plan import encoder_calls
from pretrain.views.prepare import Finished, Inputs, Recipe, finish_views, prepare

CONFIGS = Path(__file__).parents[2] / "configs"
PATHS = {
    "core": CONFIGS / "demo.yaml",  # colours, turns, and the patches of four tasks
    "local crops": METHODS / "dino_vits16.yaml",  # two sizes, blur, solarize
    "local corruption": METHODS / "sit_vits4_cifar10.yaml",  # noise, other images, and by test also colours
    "every patch": METHODS / "relvit_vits4_cifar10.yaml",
}
BATCH = 4
# of numbers up to about 2.6: sums of products in another order, and products that are fused with sums
TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    preparing._compiled_finish.cache_clear()
    yield
    torch._dynamo.reset()
    preparing._compiled_finish.cache_clear()


def recipe_of(kind: str) -> Recipe:
    colours = ["views.one.local={color: true}"] if kind == "local corruption" else []
    return build.recipe(load_config(PATHS[kind], colours))


def prepared(recipe: Recipe, step: int, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(step)
    sizes = [view.size_px for view in recipe.views.values()]
    crops = [
        torch.randint(0, 256, (sizes.count(px), BATCH, px, px, 3), dtype=torch.uint8, generator=generator).to(
            device
        )
        for px in dict.fromkeys(sizes)
    ]
    ids = torch.arange(BATCH, device=device) + step * BATCH
    return prepare(recipe, 0, crops, torch.zeros_like(ids), ids, step)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a dataclass, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [part for field in fields(value) for part in tensors(getattr(value, field.name))]
    return [part for item in value for part in tensors(item)] if isinstance(value, tuple) else []


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind == "local corruption" else pytest.mark.slow) for kind in PATHS],
)
def test_views_are_one_graph_for_each_shape_whatever_is_drawn(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = 0

    def count(graph: Any, examples: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(finish_views, fullgraph=True, dynamic=False, backend=count)
    recipe = replace(recipe_of(kind), compiled=True)
    written: list[Finished] = []

    def both(*args: Any) -> Finished:
        written.append(finish_views(*args))
        return compiled(*args)

    monkeypatch.setattr(preparing, "_compiled_finish", lambda: both)
    monkeypatch.setattr(both, "cache_clear", lambda: None, raising=False)
    for step in range(3):
        written.clear()
        found = prepared(recipe, step)
        for group, expected in zip(found.groups, written, strict=True):
            assert torch.equal(group.images, expected.images)
            assert torch.equal(group.clean, expected.clean)
    assert graphs == len(encoder_calls(recipe.views))


def check_alike(kind: str, device: str) -> None:
    recipe = recipe_of(kind)
    for step in range(2):
        plain, found = (prepared(replace(recipe, compiled=c), step, device) for c in (False, True))
        for expected, group in zip(plain.groups, found.groups, strict=True):
            pixels = {id(t) for t in (group.images, group.clean, group.whole)}
            for own, other in zip(tensors(group), tensors(expected), strict=True):
                if id(own) in pixels:
                    torch.testing.assert_close(own, other, rtol=0, atol=TOLERANCE)
                else:  # plan and changed pixels
                    assert torch.equal(own, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PATHS)
def test_compiled_views_are_those_of_the_processor(kind: str) -> None:
    check_alike(kind, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", PATHS)
def test_compiled_views_are_those_of_the_same_gpu_uncompiled(kind: str) -> None:
    check_alike(kind, "cuda")
