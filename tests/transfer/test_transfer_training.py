"""The loop that detectors and segmenters share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from run_folder import tiny_config, write_checkpoint
from torch import Tensor, nn

from pretrain.errors import CheckpointError, TrainingError, UserError
from pretrain.optim import SGD, AdamW
from pretrain.schedules import constant
from pretrain.transfer import backbone
from pretrain.transfer.training import TrainingConfig, parameter_groups, places_of, train

CONFIG = TrainingConfig(num_steps=6, batch_size=4, seed=3, save_every_steps=2, log_every_steps=1)


class Numbers:
    """Ten samples: the features are noisy, the target is the index."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 10

    def load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, float]:
        self.loaded.append(index)
        return torch.tensor(rng.normal(index, 0.1, 3), dtype=torch.float32), float(index)

    def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        features, targets = zip(*samples, strict=True)
        return torch.stack(features), torch.tensor(targets)


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    features, targets = batch
    error = model(features)[:, 0] - targets
    return {"square": error.square().mean(), "half": 0.5 * error.abs().mean()}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def run(folder: Path, stop_at: int = 6, resume: bool = False, kind: Any = AdamW, **changes: Any) -> Any:
    """Train for so many of the six steps; returns the network and what was logged."""
    model, samples = network(), changes.pop("samples", Numbers())
    groups = [{"params": list(model.parameters()), "lr_scale": 2.0}]
    optimizer = kind(groups, lr=0.0, **({"momentum": 0.9} if kind is SGD else {}))
    accelerator, identity = Accelerator(cpu=True), changes.pop("identity", {"data": "numbers"})
    config = TrainingConfig(**(vars(CONFIG) | changes))

    def stop_early(step: int) -> None:
        if step >= stop_at:
            raise KeyboardInterrupt

    try:
        history = train(
            model, samples, losses_of, optimizer, constant(0.01), config, accelerator, folder, identity,
            resume, None if stop_at == 6 else stop_early,
        )  # fmt: skip
    except KeyboardInterrupt:
        history = []
    return model, history


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_what_was_interrupted_goes_on_to_the_same_bits(kind: Any, tmp_path: Path) -> None:
    whole, expected = run(tmp_path / "whole", kind=kind)
    run(tmp_path / "cut", stop_at=2, kind=kind)
    assert [path.name for path in sorted((tmp_path / "cut").glob("step-*"))] == ["step-00002"]
    resumed, history = run(tmp_path / "cut", resume=True, kind=kind)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert [{**row, "seconds": 0} for row in history] == [{**row, "seconds": 0} for row in expected]
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] == pytest.approx(history[-1]["square"] + history[-1]["half"])
    assert [path.name for path in (tmp_path / "cut").glob("step-*")] == ["step-00006"]


def test_workers_change_nothing(tmp_path: Path) -> None:
    alone, _ = run(tmp_path / "alone", num_workers=0)
    helped, _ = run(tmp_path / "helped", num_workers=2)
    for value, other in zip(alone.parameters(), helped.parameters(), strict=True):
        assert torch.equal(value, other)


def test_every_epoch_has_every_sample_once_and_another_order() -> None:
    places = [place for step in range(15) for place in places_of(step, 10, CONFIG)]
    epochs = [[index for epoch, index in places if epoch == number] for number in range(6)]
    assert [epoch for epoch, _ in places] == sorted(epoch for epoch, _ in places)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert places_of(7, 10, CONFIG) == places[28:32]


def test_augmentation_differs_between_epochs(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    class Noted(Numbers):
        def load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, float]:
            seen.append((index, float(rng.random())))
            return torch.zeros(3), 0.0

    run(tmp_path, samples=Noted())
    assert len(seen) == len(set(seen)) == 24


def test_the_learning_rate_of_a_group_is_scaled(tmp_path: Path) -> None:
    """Plain SGD on one weight, by hand: the gradient of mean((w x - t)^2) + 0.5 mean |w x - t|."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    samples = Numbers()
    features, targets = samples.collate([(torch.full((3,), float(i)), float(i)) for i in (1, 2, 3, 4)])
    samples.collate = lambda _: (features, targets)  # type: ignore[method-assign]
    optimizer = SGD([{"params": [model.weight], "lr_scale": 3.0}], lr=0.0)
    config = TrainingConfig(num_steps=1, batch_size=4)
    train(
        model,
        samples,
        losses_of,
        optimizer,
        constant(0.01),
        config,
        Accelerator(cpu=True),
        tmp_path,
        {},
        False,
    )
    gradient = -2 * 7.5 - 0.5 * 2.5  # mean of i * i over 1..4 is 7.5, of i 2.5
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), -0.03 * gradient))


def test_a_folder_with_a_state_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, stop_at=2)
    with pytest.raises(UserError, match=r"continue it with --resume, or remove the folder"):
        run(tmp_path)
    with pytest.raises(CheckpointError, match=r"data: was 'numbers', now 'others'"):
        run(tmp_path, resume=True, identity={"data": "others"})
    with pytest.raises(CheckpointError, match=r"num_steps: was 6, now 8"):
        run(tmp_path, num_steps=8, resume=True)


def test_a_loss_that_is_not_finite_ends_it_and_is_not_saved(tmp_path: Path) -> None:
    class Broken(Numbers):
        def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
            features, targets = super().collate(samples)
            return features, targets * (float("nan") if len(self.loaded) > 12 else 1.0)

    with pytest.raises(TrainingError, match=r"step 4: the loss is nan; lower the learning rate"):
        run(tmp_path, samples=Broken())
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00002"]


def test_a_batch_that_the_processes_cannot_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(UserError, match=r"batch_size 4: does not divide into 3 processes; use 6"):
        run(tmp_path)


def test_parameters_are_grouped_by_layer_and_kind(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), ("rotation",))
    body = backbone(tmp_path, out="map")
    model = nn.ModuleDict({"body": body, "head": nn.Linear(24, 5)})
    groups = parameter_groups(model, body, weight_decay=0.1, layer_decay=0.5, rest_lr_scale=10.0)
    names = {id(value): name for name, value in model.named_parameters()}
    scale = {names[id(value)]: group["lr_scale"] for group in groups for value in group["params"]}
    decay = {names[id(value)]: group["weight_decay"] for group in groups for value in group["params"]}
    assert scale.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    network = "body.network."
    assert scale[f"{network}pos_embed"] == scale[f"{network}patch_embed.proj.weight"] == 0.125
    assert scale[f"{network}blocks.0.attn.qkv.weight"] == 0.25
    assert scale[f"{network}blocks.1.attn.qkv.weight"] == 0.5
    assert scale[f"{network}norm.weight"] == 1.0
    assert scale["head.weight"] == scale["head.bias"] == 10.0
    spared = {f"{network}pos_embed", f"{network}cls_token", f"{network}reg_token"}
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert decay[name] == (0.0 if value.ndim == 1 or name in spared else 0.1), name
    whole = parameter_groups(model, body, weight_decay=0.0)
    assert [(group["lr_scale"], group["weight_decay"]) for group in whole] == [(1.0, 0.0)]
