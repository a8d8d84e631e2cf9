"""Nothing in a step waits for the device, whatever the method.

A whole step is taken on torch's `meta` device: everything but the numbers is computed, so reading one, or an
operation whose result's shape follows from numbers, shows. What a GPU does about it: `make gpu-check`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from method_configs import NAMES, PATHS, reduced
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import build
from pretrain.config import RunConfig, load_config
from pretrain.constants import _made
from pretrain.optim import Knobs
from pretrain.peers import ALONE
from pretrain.tasks import color_bins, grid_relations
from pretrain.views import patch_plan
from pretrain.views.pixels import crop_resize
from pretrain.views.plan import ViewConfig, crop_boxes
from pretrain.views.prepare import Moment, prepare, with_labels

DEVICE = torch.device("meta")
KNOBS = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=0.0)
CORE = Path(__file__).parents[2] / "configs" / "demo.yaml"
# of several kinds of tasks and masks
QUICK = {"moco_v2_vits16", "ijepa_vits4_cifar10", "deepcluster_vits4_cifar10", "relvit_vits4_cifar10"}


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for the device, and answers what the device cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name.startswith("_fused_"):
            return None  # in place, and one launch for many tensors
        source = next((value for value in args if isinstance(value, Tensor)), None)
        if name == "_local_scalar_dense" and source is not None and source.device == DEVICE:
            self.found.append("a number is read")
            return 1
        if name == "_to_copy" and source is not None:
            goes_to = kwargs.get("device") or source.device
            if goes_to.type != source.device.type:
                if not kwargs.get("non_blocking"):
                    self.found.append(f"{tuple(source.shape)} goes from {source.device} to {goes_to}")
                if goes_to.type == "cpu":
                    return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if name == "copy_" and isinstance(args[1], Tensor) and args[0].device.type != args[1].device.type:
            self.found.append(f"{tuple(args[1].shape)} is copied from {args[1].device} to {args[0].device}")
            return args[0]
        return function(*args, **kwargs)


class Made(TorchFunctionMode):
    """Notes tensors that are made out of numbers of the host: they go to the device at once."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        makes = function in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        if makes and made.device == DEVICE and not isinstance(args[-1], Tensor):
            self.waits.found.append(f"a tensor is made of {args[-1]}")
        return made


@pytest.fixture
def meta_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What torch itself does not know of this device, and no tables of it for whoever comes later."""
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        module = sys.modules[optimizer.__module__]
        monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    yield
    for kept in (_made, patch_plan.permutation_set_on, color_bins.centers_on, grid_relations.labels_on):
        kept.cache_clear()  # type: ignore[attr-defined]


def waits_of_a_step(config: RunConfig) -> list[str]:
    """What waits in a third step, from crops to the teacher's average."""
    size = config.batch.global_size // config.batch.accumulation_steps
    module = build.module(config, ALONE, torch.device("cpu"), num_samples=64).to(DEVICE)
    engine = build.engine(config, module, ALONE)
    teacher = module.make_teacher() if config.teacher else None
    sides = [view.size_px for view in config.views.values()]
    crops = [
        torch.empty(sides.count(side), size, side, side, 3, dtype=torch.uint8, device=DEVICE)
        for side in dict.fromkeys(sides)
    ]
    ids = torch.zeros(size, dtype=torch.int64, device=DEVICE)
    nothing = torch.zeros(0, dtype=torch.float64, device=DEVICE)
    prepare(build.recipe(config), 0, crops, ids, ids, 0)
    for step in (1, 2):
        with Waits() as waits, Made(waits):
            inputs = prepare(build.recipe(config), 0, crops, ids, ids, step)
            inputs = with_labels(inputs, ids, Moment(step, 10, 0.0))
            if teacher:
                inputs = module.consult(teacher, inputs)
            result = engine.train_step(repeat(inputs), KNOBS, lambda: nothing)
            if teacher:
                student = (
                    (f"{part}.{name}", value)
                    for part in teacher.parts
                    for name, value in engine.student(module.get_submodule(part))
                )
                teacher.update(student, 0.99, result.skipped)
    return waits.found


@pytest.mark.usefixtures("meta_device")
def test_a_step_of_the_core_method_never_waits() -> None:
    overrides = ["engine.kind=local", "batch.global_size=4", "data.lanes=1"]
    assert waits_of_a_step(load_config(CORE, overrides)) == []


@pytest.mark.usefixtures("meta_device")
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow) for path in PATHS],
    ids=NAMES,
)  # fmt: skip
def test_a_step_of_a_method_never_waits(path: Path) -> None:
    config = load_config(path, [*reduced(path, Path("shards"), 4), "engine.kind=local"])
    # timm's LARS has no kernel that reads the decision on the device
    expected = ["a number is read"] if config.optim.name == "lars" else []
    assert waits_of_a_step(config) == expected


@pytest.mark.usefixtures("meta_device")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_cutting_views_out_of_images_on_the_device_never_waits(interpolation: Any) -> None:
    view, images = ViewConfig(size_px=32), torch.empty(4, 40, 48, 3, dtype=torch.uint8, device=DEVICE)
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for _ in range(2):
        with Waits() as waits, Made(waits):
            boxes = crop_boxes(view, 0, ids, ids, 0, torch.full_like(ids, 40), torch.full_like(ids, 48))
            assert crop_resize(images, boxes, 32, interpolation).shape == (4, 32, 32, 3)
    assert waits.found == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.sum().item(),
        lambda values: float(values[0]),
        lambda values: torch.tensor([1.0, 2.0], device=values.device),
        lambda values: torch.as_tensor([1, 2], device=values.device),
        lambda values: values.new_tensor([1.0]),
        lambda values: torch.ones(3).to(values.device),
        lambda values: values.copy_(torch.ones(3)),
        lambda values: values.cpu(),
    ],
)
def test_waiting_is_noticed(wait: Callable[[Tensor], Any]) -> None:
    values = torch.zeros(3, device=DEVICE)
    with Waits() as waits, Made(waits):
        values.cumsum(0).argsort().to("cpu", non_blocking=True)
        assert waits.found == []
        wait(values)
        assert len(waits.found) == 1


@pytest.mark.parametrize("choose", [lambda values: values[values > 0], lambda values: values.nonzero()])
def test_a_shape_that_follows_from_numbers_is_refused(choose: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError), Waits():
        choose(torch.zeros(3, device=DEVICE))
