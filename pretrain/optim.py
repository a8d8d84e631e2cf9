"""The optimizer: which parameters are stepped how, and optimizers that can let one step pass."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import timm.optim
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from pretrain.errors import ConfigError

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Decay = Literal["matrices", "all", "no_tokens"]


class OptimConfig(BaseModel):
    """The optimizer and its gradient clipping. AdamW uses `betas`; SGD and LARS use `momentum`.

    `decay` says what the weight decay acts on. "matrices": everything but biases, norms and what else has one
    dimension; class, register and mask tokens and positions are decayed (MAE, DINO). "no_tokens": those
    neither (SiT). "all": biases and norms too (MoCo v3, RelViT). Log-variances of the loss balance never are.
    LARS adapts the rate of exactly the tensors that `decay` names, also with a weight decay of 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    base_lr: Positive = 5e-4  # for a global batch of `lr_batch`; scales linearly with the batch
    lr_batch: Annotated[int, Field(gt=0)] | None = 256  # none: the rate is `base_lr` at every batch
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8  # of AdamW's and of LARS's denominators
    momentum: Beta = 0.9
    nesterov: bool = False
    trust_coefficient: Positive = 1e-3  # of LARS: a step's length as a share of the tensor's, at rate 1
    weight_decay: NotNegative = 0.05  # decoupled in AdamW; in SGD and LARS a part of the gradient
    final_weight_decay: NotNegative | None = None  # reached along half a cosine at the end of the run
    decay: Decay = "matrices"
    clip_norm: NotNegative = 3.0  # largest gradient norm; 0 switches clipping off
    clip: Literal["global", "tensor"] = "global"  # the norm over everything, or (DINO) of each tensor alone

    @model_validator(mode="after")
    def _nesterov_looks_along_a_momentum(self) -> OptimConfig:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov needs a momentum above 0; set momentum, or nesterov to false")
        return self

    def scaled_lr(self, global_batch: int) -> float:
        return self.base_lr if self.lr_batch is None else self.base_lr * global_batch / self.lr_batch


@dataclass(frozen=True)
class ParameterRule:
    """How the parameters below a name are stepped; of several that fit, the longest prefix holds."""

    prefix: str  # of names in the MultiTask module, such as "tasks.dino.head.last."
    constant_lr: bool = False  # keeps the peak rate all along (SimSiam's predictor)
    # rate and weight decay are 0 while the epoch is below (DINO's last layer); the optimizer's averages of
    # the gradients go on meanwhile
    frozen_epochs: float = 0.0


@dataclass(frozen=True)
class Knobs:
    """What changes from step to step."""

    lr: float
    peak_lr: float  # of parameters with a constant rate
    weight_decay: float
    epoch: float


def check_optimizer_stage(optim: OptimConfig, stage: int) -> None:
    """Refuse what needs whole tensors where DeepSpeed gives the optimizer flat pieces of many tensors.

    At ZeRO stage 1 and above a norm would silently be that of this rank's share of all tensors together.
    """
    if stage == 0:
        return
    where = f"does not work at ZeRO stage {stage}, which flattens tensors and divides them over the ranks"
    remedy = "set engine.deepspeed.zero_optimization.stage=0"
    if optim.name == "lars":
        raise ConfigError(f"optim.name: 'lars' scales each tensor by its norm and {where}; {remedy}")
    if optim.clip == "tensor" and optim.clip_norm:
        raise ConfigError(f"optim.clip: 'tensor' {where}; {remedy}, or optim.clip=global")


class Optimizer(torch.optim.Optimizer):
    """An optimizer that can be told, by numbers that only its device knows, to pass a step or to shorten it.

    A step whose gradients are not finite on any rank leaves weights and state as they are, at every ZeRO
    stage, so that DeepSpeed keeps its own books (it skips such a step by itself at some stages and takes it
    at others). Stands before the library's class among the bases.
    """

    # names and meaning are torch's, whose fused kernels read them without waiting for the device
    found_inf: Tensor | None = None  # float32 (), 1 to pass this step
    grad_scale: Tensor | None = None  # float32 (), what the gradients are divided by first

    @property
    @abstractmethod
    def state_keys(self) -> tuple[str, ...]:
        """Of the state: the tensors shaped like the parameter. A checkpoint holds these."""

    def state_for(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, made now (all zero) if the parameter was never stepped."""
        state: dict[str, Any] = self.state[parameter]
        for key in self.state_keys:
            if key not in state:
                state[key] = torch.zeros_like(parameter)
        return state


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's AdamW; its state also counts the steps under `step`, for the bias correction."""

    @property
    def state_keys(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def state_for(self, parameter: Tensor) -> dict[str, Tensor]:
        state = super().state_for(parameter)
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)  # the fused kernel counts on the device
        return state


class _Momentum(Optimizer):
    """One buffer of averaged gradients, or nothing. A buffer of zeros is as good as none in both classes."""

    @property
    def state_keys(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.defaults["momentum"] else ()


class SGD(_Momentum, torch.optim.SGD):
    """torch's SGD. Its state must exist before a step is passed (`state_for`)."""


class Lars(_Momentum, timm.optim.Lars):  # type: ignore[misc]
    """timm's LARS (You et al., 2017, arXiv:1708.03888, eq. 6): SGD that scales each tensor's gradient first.

    update = (g + wd * w) * trust, trust = coefficient * |w| / (|g| + wd * |w| + eps), or 1 where |w| or |g|
    is 0; the rate is applied after the momentum, as in torch's SGD. Not LARC: the trust ratio is not clipped.
    The releases of SimCLR and BYOL divide by |g + wd * w| instead, which is never more; the two agree where
    wd * |w| is far below |g|. A group is adapted if `always_adapt` is set or it has a weight decay, which
    `build_optimizer` and `set_knobs` give to the same groups. It has no fused kernel: every step waits for
    the device.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.found_inf is not None and self.found_inf.item():
            return None
        if self.grad_scale is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(gradients, self.grad_scale)
        loss: float | None = super().step(closure)
        return loss


def parameter_groups(
    model: nn.Module, decay: Decay = "matrices", rules: Sequence[ParameterRule] = ()
) -> list[dict[str, Any]]:
    """Parameters that are stepped alike, each group with its name; frozen ones are in none.

    Groups and their parameters are ordered by name, so the layout is the same on all ranks and for every
    order of the tasks. Beside torch's own keys a group has `decayed`, `constant_lr` and `frozen_epochs`.
    """
    prefixes = [rule.prefix for rule in rules]
    assert len(set(prefixes)) == len(prefixes), f"two rules for one prefix: {prefixes}"
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in names), f"no parameter is below '{prefix}'"
    everything = ParameterRule("")
    members: dict[tuple[str, bool], list[Tensor]] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: _in_order(pair[0])):
        if parameter.requires_grad:
            fitting = [rule.prefix for rule in rules if name.startswith(rule.prefix)]
            key = (max(fitting, key=len, default=""), _is_decayed(name, parameter, decay))
            members.setdefault(key, []).append(parameter)
    rule_of = {"": everything, **{rule.prefix: rule for rule in rules}}
    return [
        {
            "params": members[prefix, decayed],
            "name": f"{prefix}{':' if prefix else ''}{'decayed' if decayed else 'exempt'}",
            "decayed": decayed,
            "constant_lr": rule_of[prefix].constant_lr,
            "frozen_epochs": rule_of[prefix].frozen_epochs,
        }
        for prefix, decayed in sorted(members, key=lambda key: (key[0], not key[1]))
    ]


def _in_order(name: str) -> list[str | int]:
    """A key that sorts blocks.2 before blocks.10, close to the order of the backward pass."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _is_decayed(name: str, parameter: Tensor, decay: Decay) -> bool:
    if "log_variances" in name.split("."):
        return False
    if decay == "all":
        return True
    if name.endswith("relative_position_bias_table"):  # of Swin, whose recipes name it beside the biases
        return False
    is_token = parameter.ndim == 3 and parameter.shape[0] == 1  # tokens and positions are (1, n, D)
    return parameter.ndim > 1 and not (decay == "no_tokens" and is_token)


def build_optimizer(model: nn.Module, config: OptimConfig, rules: Sequence[ParameterRule] = ()) -> Optimizer:
    """Rate and weight decay are set before every step (`set_knobs`), so they start at zero."""
    groups = parameter_groups(model, config.decay, rules)
    if config.name == "adamw":
        return AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)
    settings: dict[str, Any] = {"lr": 0.0, "momentum": config.momentum, "nesterov": config.nesterov}
    if config.name == "sgd":
        return SGD(groups, fused=True, **settings)
    for group in groups:
        # biases and norms are excluded from adaptation (Grill et al., 2020, arXiv:2006.07733, section 3.3)
        group["always_adapt"] = group["decayed"]
    settings |= {"trust_coeff": config.trust_coefficient, "eps": config.eps, "trust_clip": False}
    return Lars(groups, **settings)


def set_knobs(optimizer: Optimizer, knobs: Knobs) -> None:
    """Give every group its rate and weight decay for the next step."""
    for group in optimizer.param_groups:
        frozen = knobs.epoch < group["frozen_epochs"]
        lr = knobs.peak_lr if group["constant_lr"] else knobs.lr
        group["lr"] = 0.0 if frozen else lr
        group["weight_decay"] = knobs.weight_decay if group["decayed"] and not frozen else 0.0
