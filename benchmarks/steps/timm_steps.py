"""timm's own supervised training step, as its training script takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from steps.peers import Bench
    from steps.turns import Step


def supervised(bench: Bench) -> Step:
    """Through timm's task where it has tasks, which its script then uses."""
    model = bench.create(num_classes=1000)
    criterion, optimizer = nn.CrossEntropyLoss(), bench.optimizer(model)
    (images,) = bench.views
    task: Any = None
    try:
        from timm.task import ClassificationTask

        task = ClassificationTask(model, criterion, verbose=False).train()
    except ImportError:
        pass

    def step() -> None:
        loss = criterion(model(images), bench.labels) if task is None else task(images, bench.labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step
