"""The optimizer: parameter groups, and an AdamW that can be told to let one step pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(BaseModel):
    """AdamW and its gradient clipping (METHODS preset `mt_vit`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["adamw"] = "adamw"
    base_lr: Positive = 5e-4  # for a global batch of `lr_batch`; scales linearly with the batch
    lr_batch: Annotated[int, Field(gt=0)] = 256
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.05  # not on biases, norms and other one-dimensional parameters
    clip_norm: NotNegative = 3.0  # global gradient norm; 0 switches clipping off

    def scaled_lr(self, global_batch: int) -> float:
        return self.base_lr * global_batch / self.lr_batch


class AdamW(torch.optim.AdamW):
    """AdamW that leaves weights and state as they are while `skipping` is set.

    A step whose gradients are not finite on any rank is skipped through this flag at every ZeRO stage, so
    that DeepSpeed keeps its own books (it skips such a step by itself at some stages and takes it at others).
    """

    skipping = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.skipping:
            return None
        return super().step(closure)  # type: ignore[no-any-return]

    def state_for(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, made now (all zero) if the parameter was never stepped."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            # torch's fused kernel counts on the device, the others on the CPU
            state["step"] = torch.zeros((), device=parameter.device if self.defaults["fused"] else "cpu")
            for key in STATE_KEYS:
                state[key] = torch.zeros_like(parameter)
        return state


STATE_KEYS = ("exp_avg", "exp_avg_sq")  # of AdamW: tensors shaped like the parameter


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and tokens with weight decay; biases, norms and log-variances without."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    exempt = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """The learning rate is set before every step, so it starts at zero."""
    groups = parameter_groups(model, config.weight_decay)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused or None)
