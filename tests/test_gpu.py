"""What only a GPU can show: engines, both kinds of data, a resume, and steps that wait for nothing, on CUDA.

Run by `make gpu-check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from method_configs import METHODS, reduced
from small_shards import samples, write_shard
from test_train import CONFIG, records, samples_seen, train

from pretrain import build, cluster
from pretrain.cli import main
from pretrain.config import RunConfig, load_config
from pretrain.data.indexing import index_folder
from pretrain.data.loader import DataConfig, open_batches, open_splits
from pretrain.data.transfer import DeviceBatches, _pin
from pretrain.engine.engine import StepResult
from pretrain.optim import Knobs
from pretrain.peers import ALONE
from pretrain.views.plan import ViewConfig
from pretrain.views.prepare import Moment, prepare, with_labels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("resident", ["true", "false"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "engine", ["engine.kind=local", *(f"engine.deepspeed.zero_optimization.stage={n}" for n in range(4))]
)
def test_a_run_trains_resumes_and_exports_on_the_device(
    engine: str, precision: str, resident: str, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "images.tar", samples(0, 60, height=32, width=32))
    index_folder(shards)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("SHARDS", str(shards)))
    settings = [engine, f"engine.precision={precision}", f"data.resident={resident}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config, whole, *settings)
    assert all(math.isfinite(record["total"]) for record in records(whole))
    assert records(whole)[-1]["skipped_steps"] == 0
    last_kept = whole / "checkpoints" / "step-00000008"
    train(config, broken, *settings, "--resume", str(last_kept))
    assert samples_seen(broken) == samples_seen(whole)[8:]
    for found, expected in zip(records(broken), records(whole)[8:], strict=True):
        assert found["total"] == pytest.approx(expected["total"], rel=0.02)
    assert main(["export", str(whole), "--out", str(tmp_path / "exported")]) == 0


def test_streamed_batches_arrive_whole_while_the_device_computes(tmp_path: Path) -> None:
    """What is copied beside the computation is what was written, also when the ring is as small as can be."""
    write_shard(tmp_path / "images.tar", samples(0, 60, height=40, width=48))
    index_folder(tmp_path)
    config = DataConfig(shards=str(tmp_path), lanes=4, shuffle_block=4, prefetch_batches=1)
    views, splits = [ViewConfig(size_px=224)] * 2, open_splits(config)
    on_device, on_host = (
        open_batches(config, splits, views, seed=3, batch_size=32, device=device)
        for device in ("cuda", "cpu")
    )
    assert isinstance(on_device, DeviceBatches)
    assert all(tensor.is_pinned() for tensor in on_device.batches.shared_tensors)
    busy = torch.rand(4096, 4096, device="cuda")
    try:
        for _ in range(20):
            found, expected = next(on_device), next(on_host)
            busy = (busy @ busy).clamp(0, 1)  # the device is behind while the next batch is asked for
            assert torch.equal(found.crops[0].cpu(), expected.crops[0])
            for name in ("sample_ids", "epochs", "labels"):
                assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))
    finally:
        on_device.close()
        on_host.close()


def test_memory_that_cannot_be_pinned_does_not_break_what_follows() -> None:
    tensor = torch.zeros(1 << 20, dtype=torch.uint8)
    device = torch.device("cuda")
    assert _pin(tensor, device)
    assert not _pin(tensor, device)  # a second time CUDA refuses
    assert torch.ones(8, device=device).sum().item() == 8


def stepper(config: RunConfig) -> Callable[[int], StepResult]:
    """Steps of a run, from crops on the device to the teacher's average; gives a step's numbers unread."""
    device, size = torch.device("cuda", 0), config.batch.global_size
    sides = [view.size_px for view in config.views.values()]
    crops = [
        torch.randint(0, 256, (sides.count(side), size, side, side, 3), dtype=torch.uint8, device=device)
        for side in dict.fromkeys(sides)
    ]
    ids = torch.arange(size, device=device)
    module = build.module(config, ALONE, device, num_samples=size)
    teacher = module.make_teacher() if config.teacher else None
    engine = build.engine(config, module, ALONE, teacher)
    recipe = build.recipe(config, device)
    nothing = torch.zeros(0, dtype=torch.float64, device=device)
    knobs = Knobs(lr=1e-4, peak_lr=1e-4, weight_decay=0.05, epoch=2.0)

    def step(number: int) -> StepResult:
        inputs = prepare(recipe, 0, crops, torch.zeros_like(ids), ids, number)
        inputs = with_labels(inputs, ids % 2, Moment(number, 10, 2.0))
        if teacher:
            with torch.autocast("cuda", torch.bfloat16):
                inputs = module.consult(teacher, inputs)
        result = engine.train_step(iter([inputs]), knobs, lambda: nothing)
        if teacher:
            student = (
                (f"{part}.{name}", value)
                for part in teacher.parts
                for name, value in engine.student(module.get_submodule(part))
            )
            teacher.update(student, 0.99, result.skipped)
        return result

    return step


METHODS_WATCHED = ("core", "moco_v3_vits16", "dino_vits16", "mae_vitb16")


def check_that_steps_do_not_wait(method: str, engine: str, compiled: str = "off") -> None:
    """But for the numbers of the step before, which are there when the next is under way."""
    if method == "core":
        path, smaller = METHODS.parent / "demo.yaml", ["batch.global_size=8", "data.lanes=1"]
    else:
        path = METHODS / f"{method}.yaml"
        smaller = reduced(path, Path("shards"), 4)
    chosen = [f"engine.kind={engine}", "engine.precision=bf16", f"engine.compile={compiled}"]
    config = load_config(path, [*smaller, *chosen, "batch.accumulation_steps=1"])
    step = stepper(config)
    before = [step(number) for number in range(2)][-1]  # tables, states and kernels are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 6):
            result = step(number)
            assert math.isfinite(before.read().values["total"]), method
            before = result
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not before.read().skipped, method


@pytest.mark.parametrize("method", METHODS_WATCHED)
def test_nothing_in_a_steady_step_waits_for_the_device(method: str) -> None:
    check_that_steps_do_not_wait(method, "local")


def test_nothing_in_a_steady_compiled_step_does() -> None:
    check_that_steps_do_not_wait("core", "local", compiled="on")


def test_nothing_in_a_steady_step_of_deepspeed_does() -> None:
    """In one test: DeepSpeed cannot meet a second time in one process."""
    with cluster.connected(cluster.Cluster()):
        for method in METHODS_WATCHED:
            check_that_steps_do_not_wait(method, "deepspeed")


def test_a_wait_is_noticed() -> None:
    """What the test above rests on."""
    number = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            number.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
