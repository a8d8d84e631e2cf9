"""Do the tasks pull the parameters they share the same way? Measured now and then, between two steps.

One more forward pass of a batch that was just trained on, and for each task a backward pass to the shared
parameters alone. Nothing of it stays: gradients go nowhere, and buffers such as queues and running statistics
are put back, so a run has the same weights with it and without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.engine.engine import BufferGuard
from pretrain.models.compiled import uncompiled
from pretrain.settings import Settings
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs


class GradientsConfig(Settings):
    """When the gradients of the tasks are compared; not under ZeRO-3, which has no whole parameters."""

    every_steps: Annotated[int, Field(gt=0)] = 500
    of: Literal["last_block", "backbone"] = "last_block"  # the parameters that are looked at


def shared_parameters(backbone: nn.Module, of: Literal["last_block", "backbone"]) -> list[nn.Parameter]:
    """Trained parameters of the whole backbone, or of its last block (a Swin's last stage)."""
    blocks: Any = getattr(backbone, "blocks", None)
    if blocks is None:
        blocks = backbone.layers
    part = backbone if of == "backbone" else blocks[-1]
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def compare_gradients(
    module: MultiTask, inputs: Inputs, parameters: Sequence[nn.Parameter], precision: str
) -> dict[str, float]:
    """`gradient_norm/T` of each task's weighted loss, and `gradient_cosine/A:B` of every two tasks.

    Of the gradient over all ranks; every rank calls this with its own inputs. A task that does not reach the
    parameters has the norm 0 and no cosines.
    """
    device, peers = parameters[0].device, module.peers
    buffers, num_calls = BufferGuard(module), module.num_backbone_calls
    buffers.keep()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with uncompiled(), autocast:  # compiled graphs free what a second walk back needs
        losses, weights = module.task_losses(inputs)
    flat = []
    for name, loss in losses.items():
        gradients: Sequence[Tensor | None] = (None,) * len(parameters)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        whole = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        with torch.no_grad():
            own = torch.cat([one.detach().float().flatten() for one in whole])
            flat.append(peers.sum(own * (weights[name] / peers.world_size)))
    buffers.restore()
    module.num_backbone_calls = num_calls
    return agreement(list(losses), torch.stack(flat))


def agreement(tasks: Sequence[str], gradients: Tensor) -> dict[str, float]:
    """Norms, and the cosines of all pairs in the order of the tasks. gradients: (T, P)"""
    products = (gradients @ gradients.T).double().tolist()
    norms = [math.sqrt(products[place][place]) for place in range(len(tasks))]
    found = {f"gradient_norm/{name}": norm for name, norm in zip(tasks, norms, strict=True)}
    for first, second in combinations(range(len(tasks)), 2):
        length = norms[first] * norms[second]
        if length > 0 and math.isfinite(length):
            cosine = max(-1.0, min(1.0, products[first][second] / length))
            found[f"gradient_cosine/{tasks[first]}:{tasks[second]}"] = cosine
    return {name: value for name, value in found.items() if math.isfinite(value)}
