"""What the training loop asks of an engine; it cannot tell the implementations apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import Tensor, nn

from pretrain.engine.host_memory import HostMemory
from pretrain.errors import CheckpointError, ConfigError, TrainingError
from pretrain.optim import Knobs, OptimConfig, Optimizer
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs


@dataclass(frozen=True)
class StepOutput:
    """One optimizer step, averaged over its micro steps and over all ranks."""

    values: dict[str, float]  # `total`, `loss/T`, `weight/T`, `T/<metric>`, and what `extra` gave, summed
    grad_norm: float  # global, before clipping; not finite for a step skipped because of its gradients
    skipped: bool  # a loss or gradient was not finite on some rank, so nothing was changed on any


def _switch(value: Any) -> Any:
    """YAML reads a bare `on` as true and `off` as false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class EngineConfig(BaseModel):
    """How the module is trained: by DeepSpeed, or by plain torch on one process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["deepspeed", "local"] = "deepspeed"
    precision: Literal["bf16", "fp32"] = "bf16"  # of matrix products; weights are fp32 in both
    gradient_reduction: Literal["fp32", "bf16"] = (
        "fp32"  # over ranks, with bf16 precision; bf16 halves the traffic
    )
    recompute: bool = False  # recompute blocks in the backward pass to save memory
    # blocks of backbone and decoders, and the views where they are made on a GPU; auto: all of it on a GPU
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    compile_mode: Literal["default", "max-autotune-no-cudagraphs", "reduce-overhead"] = "default"
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

    def train_step(self, micro_inputs: Iterator[Inputs], knobs: Knobs, tally: Tally) -> StepResult:
        """Take one optimizer step on `accumulation_steps` inputs from the iterator, and tell the tasks.

        A step with a loss or gradient that is not finite on some rank changes no weight, state or buffer.

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


class StepResult:
    """One optimizer step whose numbers are still on the device. Asking for them waits for that step only.

    On a GPU their copy into pinned memory follows the step at once, so to ask a step later, when the device
    has been given the next one to do, costs it no time.
    """

    def __init__(self, names: Sequence[str], summed: Tensor, world_size: int) -> None:
        """names: of the means, which are the last of `summed`. summed: float64 (2 + E + means,) over all
        ranks, of whether something was not finite, squares of the gradients, what the ranks tallied, means.
        """
        self._names = names
        self._world_size = world_size
        self.skipped = summed[0] > 0  # bool (), on the device
        self.grad_norm = summed[1].sqrt()  # float64 (), on the device
        self._numbers = summed.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if summed.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> StepOutput:
        if self._copied is not None:
            self._copied.synchronize()
        numbers = self._numbers.tolist()
        first_mean = len(numbers) - len(self._names)
        values = {f"extra/{i}": value for i, value in enumerate(numbers[2:first_mean])}
        means = zip(self._names, numbers[first_mean:], strict=True)
        values |= {name: value / self._world_size for name, value in means}
        return StepOutput(values, math.sqrt(numbers[1]), numbers[0] > 0)


def gather_values(
    outputs: list[dict[str, Tensor]],
    squares: Tensor,
    extra: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor],
    world_size: int,
) -> StepResult:
    """Average the outputs of the micro steps over micro steps and ranks, and agree on whether to skip.

    squares: float64 (), this rank's share of the squared gradient norm. One collective per step, and nothing
    waits for the device.
    """
    names = list(outputs[0])
    means = torch.stack([torch.stack([output[name].double() for name in names]) for output in outputs]).mean(
        0
    )
    nonfinite = ~(torch.isfinite(squares) & torch.isfinite(means[names.index("total")]))
    head = torch.stack([nonfinite.double(), squares])
    summed = sum_over_ranks(torch.cat([head, extra.to(means.device, torch.float64), means]))
    return StepResult(names, summed, world_size)


def sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    """float64 (), not finite if an element of a gradient is not; stays on the device."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def tell_optimizer(
    optimizer: Optimizer, optim: OptimConfig, gradients: list[Tensor], result: StepResult
) -> None:
    """Have the next step passed where the result says so, and its gradients clipped as the config says.

    Together, as torch's `clip_grad_norm_`, with its 1e-6: the norm is known already, and the optimizer's own
    kernel divides, so no gradient is read twice. gradients: whole tensors where each is clipped by itself.
    """
    optimizer.found_inf, optimizer.grad_scale = result.skipped.float(), None
    if not optim.clip_norm:
        return
    if optim.clip == "tensor":
        clip_each(gradients, optim.clip_norm)
    else:
        optimizer.grad_scale = ((result.grad_norm + 1e-6) / optim.clip_norm).clamp(min=1.0).float()


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
        """All at once: on a GPU one launch instead of one for each of many small tensors."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def restore(self, where: Tensor | None = None) -> None:
        """Always, or if `where`, bool () on the device, says so."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            if where is None:
                buffer.copy_(kept)
            else:
                torch.where(where, kept, buffer, out=buffer)
