"""The averaged teacher: a copy of the student's backbone that follows it slowly, always in fp32."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Teacher:
    """An exponential moving average of a student module, outside the engine and without gradients.

    Kept in fp32: in bf16 an update with momentum 0.996 rounds to nothing (METHODS A3).
    """

    def __init__(self, student: nn.Module) -> None:
        self.module = copy.deepcopy(student).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, student: Iterable[tuple[str, Tensor]], momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student.

        student: names as in this module, with full fp32 parameters, and buffers, which are copied.
        """
        own_parameters = dict(self.module.named_parameters())
        own_buffers = dict(self.module.named_buffers())
        for name, value in student:
            target = own_parameters.pop(name, None)
            if target is not None:
                if value.shape != target.shape:
                    raise ValueError(f"teacher: '{name}' is {tuple(value.shape)}, not {tuple(target.shape)}")
                target.lerp_(value.detach().to(target.device, torch.float32), 1.0 - momentum)
            else:
                own_buffers[name].copy_(value)
        if own_parameters:
            raise ValueError(f"teacher: the student gave no '{next(iter(own_parameters))}'")

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(state)
