"""What the training loop asks of an engine; it cannot tell the implementations apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pretrain.engine.host_memory import HostMemory
from pretrain.errors import CheckpointError, ConfigError, TrainingError
from pretrain.optim import Knobs
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs


@dataclass(frozen=True)
class StepOutput:
    """One optimizer step, averaged over its micro steps and over all ranks."""

    values: dict[str, float]  # `total`, `loss/T`, `weight/T`, `T/<metric>`, and what `extra` gave, summed
    grad_norm: float  # global, before clipping; not finite for a step skipped because of its gradients
    skipped: bool  # a loss or gradient was not finite on some rank, so nothing was changed on any


class EngineConfig(BaseModel):
    """How the module is trained: by DeepSpeed, or by plain torch on one process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["deepspeed", "local"] = "deepspeed"
    precision: Literal["bf16", "fp32"] = "bf16"  # of matrix products; weights are fp32 in both
    gradient_reduction: Literal["fp32", "bf16"] = (
        "fp32"  # over ranks, with bf16 precision; bf16 halves the traffic
    )
    recompute: bool = False  # recompute blocks in the backward pass to save memory
    # names, with * and ?, of trained parameters that may stay without a gradient in the first step
    allow_without_gradient: tuple[str, ...] = ()
    deepspeed: dict[str, object] = {"zero_optimization": {"stage": 1}}  # or the path of a JSON file


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer's state in the layout of the whole model, whatever the ranks and the ZeRO stage.

    The keys are the optimizer's: `exp_avg` and `exp_avg_sq`, or `momentum_buffer`. What is frozen has none.
    """

    num_steps: int  # steps taken, without the skipped ones
    tensors: dict[str, Tensor]  # "<key>.<parameter name>": shaped like the parameter, fp32, on the CPU

    def check(self, keys: tuple[str, ...], shapes: Mapping[str, torch.Size]) -> None:
        """Refuse the state of another optimizer, or of another set of trained parameters.

        shapes: of the trained parameters, by name.
        """
        found = {name.partition(".")[0] for name in self.tensors}
        if found != set(keys):
            raise CheckpointError(
                f"the checkpoint holds the state of another optimizer ({_listed(found)}; this run's keeps "
                f"{_listed(set(keys))}); restore the settings under 'optim', or start anew with another "
                "--output-dir"
            )
        expected = {f"{key}.{name}": shape for key in keys for name, shape in shapes.items()}
        differing = [
            name
            for name in {**expected, **self.tensors}
            if name not in expected or name not in self.tensors or expected[name] != self.tensors[name].shape
        ]
        if differing:
            raise CheckpointError(
                f"the checkpoint's optimizer state is of other trained parameters ({len(differing)} differ, "
                f"such as '{differing[0]}'); restore the settings of model and tasks, or start anew "
                "with another --output-dir"
            )


Tally = Callable[[], Tensor]


class Engine(Protocol):
    """Trains a MultiTask module. Every method is called on all ranks at the same time."""

    module: MultiTask

    def train_step(self, micro_inputs: Iterator[Inputs], knobs: Knobs, tally: Tally) -> StepOutput:
        """Take one optimizer step on `accumulation_steps` inputs from the iterator.

        knobs: rate and weight decay of this step, and the epoch it is in.
        tally: asked once the inputs are used up; float64 (E,) of this rank, summed over ranks along with
        the metrics and returned as `extra/0` ... in `values`, so that a step needs one small collective only.
        """
        ...

    def student(self, of: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Full fp32 parameters, then buffers, of a part of the module, by their names in it."""
        ...

    def weights(self, host: HostMemory | None = None) -> dict[str, Tensor]:
        """Full fp32 state dict of the module on the CPU; complete on rank 0.

        host: memory to copy into, so that checkpoint after checkpoint needs no new one.
        """
        ...

    def optimizer_state(self, host: HostMemory | None = None) -> OptimizerState:
        """Complete on rank 0."""
        ...

    def without_gradient(self) -> list[str]:
        """Trained parameters whose gradient was absent or all zero, on every rank, in the first step."""
        ...

    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Write full fp32 values, equal on every rank, into trained parameters, by their names."""
        ...

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Write a whole fp32 state dict, complete on every rank, in place: trained, frozen, and buffers.

        Between two steps, as when a run goes back to a checkpoint; CheckpointError if it does not fit.
        """
        ...

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Continue from a state that is complete on every rank; CheckpointError if it does not fit."""
        ...


def gather_values(
    outputs: list[dict[str, Tensor]],
    squares: Tensor,
    extra: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor],
    world_size: int,
) -> tuple[dict[str, float], float, bool]:
    """Average the outputs of the micro steps over micro steps and ranks, and agree on whether to skip.

    squares: float64 (), this rank's share of the squared gradient norm. One collective and one wait for the
    device per step. Returns the named values, the global gradient norm, and whether a loss or a gradient was
    not finite on any rank.
    """
    names = list(outputs[0])
    means = torch.stack([torch.stack([output[name].double() for name in names]) for output in outputs]).mean(
        0
    )
    nonfinite = ~(torch.isfinite(squares) & torch.isfinite(means[names.index("total")]))
    head = torch.stack([nonfinite.double(), squares])
    summed = sum_over_ranks(torch.cat([head, extra.to(means.device, torch.float64), means])).tolist()
    first_mean = 2 + len(extra)
    values = {f"extra/{i}": value for i, value in enumerate(summed[2:first_mean])}
    values |= {name: value / world_size for name, value in zip(names, summed[first_mean:], strict=True)}
    return values, summed[1] ** 0.5, summed[0] > 0


def sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    """float64 (), not finite if an element of a gradient is not; stays on the device."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def clip_together(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Shorten all gradients, in place and by one factor, if their common `norm` is above `max_norm`.

    As torch's `clip_grad_norm_`, with its 1e-6; the norm is known already, so no gradient is read twice.
    """
    factor = max_norm / (norm + 1e-6)
    if gradients and factor < 1.0:
        torch._foreach_mul_(gradients, factor)


def clip_each(gradients: list[Tensor], max_norm: float) -> None:
    """Shorten, in place, each gradient that is longer than `max_norm`, whatever the others are.

    As DINO's release, with its 1e-6 (Caron et al., 2021, arXiv:2104.14294).
    """
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))


def check_weights(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Refuse the weights of another model, before any are written. shapes: of all there should be."""
    missing, unexpected = shapes.keys() - state.keys(), state.keys() - shapes.keys()
    reshaped = [name for name in shapes if name in state and state[name].shape != shapes[name]]
    if missing or unexpected or reshaped:
        example = next(iter([*sorted(missing), *sorted(unexpected), *reshaped]))
        raise CheckpointError(
            f"the checkpoint holds the weights of another model ({len(missing)} missing, {len(unexpected)} "
            f"unexpected, {len(reshaped)} of another shape, such as '{example}'); restore the settings of "
            "model and tasks, or start anew with another --output-dir"
        )


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Of the state dict; to be asked for before ZeRO-3 takes the parameters apart."""
    return {name: value.shape for name, value in module.state_dict().items()}


class GradientAudit:
    """Notes which trained parameters the first step reaches, then gets out of the way.

    A gradient is looked at as autograd hands it over, before DeepSpeed reduces, divides and frees it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names = list(parameters)
        self._reached: dict[str, Tensor] = {}  # bool (), on the device: nothing waits for it here
        self._handles = [
            parameter.register_hook(partial(self._note, name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items()
        ]

    def _note(self, name: str, gradient: Tensor) -> None:
        reached = gradient.detach().any()
        self._reached[name] = self._reached[name] | reached if name in self._reached else reached

    def finish(self) -> None:
        """Called after every step; the first ends the audit."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def without_gradient(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> list[str]:
        assert not self._handles, "asked before the first step was taken"
        if not self._names:
            return []
        nothing = torch.zeros((), dtype=torch.bool, device=_device_of(self._reached))
        reached = torch.stack([self._reached.get(name, nothing) for name in self._names])
        with torch.no_grad():
            counts = sum_over_ranks(reached.double()).tolist()
        return [name for name, count in zip(self._names, counts, strict=True) if not count]


def _device_of(tensors: Mapping[str, Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in tensors.values()), None)


def check_without_gradient(names: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse trained parameters that nothing trains, but for those that the config names."""
    left = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]
    if left:
        shown = ", ".join(f"'{name}'" for name in left[:3]) + (", ..." if len(left) > 3 else "")
        raise ConfigError(
            f"tasks: {len(left)} trained parameters got no gradient in the first step ({shown}); give the "
            "task that trains them a weight above 0 or leave it out, or name them under "
            "engine.allow_without_gradient"
        )


def buffer_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: buffer.dtype for name, buffer in module.named_buffers()}


def check_buffer_dtypes(module: nn.Module, before: Mapping[str, torch.dtype]) -> None:
    """Raise if something has cast a buffer: queues, centres and running statistics must not be rounded."""
    after = buffer_dtypes(module)
    changed = [
        f"{name} from {before[name]} to {dtype}" for name, dtype in after.items() if dtype != before[name]
    ]
    if changed:
        raise TrainingError(
            f"DeepSpeed has cast {len(changed)} buffers ({changed[0]}); remove what casts them (data_types, "
            "bf16, fp16) from engine.deepspeed, or use another version of DeepSpeed"
        )


def _listed(keys: set[str]) -> str:
    return " and ".join(sorted(keys)) or "nothing"


class BufferGuard:
    """Puts back buffers, such as running statistics, that a skipped step has spoilt."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = list(module.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        _copy(self._buffers, self._kept)

    def restore(self) -> None:
        _copy(self._kept, self._buffers)


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    """All at once: on a GPU one launch instead of one for each of many small tensors."""
    if source:
        torch._foreach_copy_(target, source)
