"""What the training loop asks of an engine; it cannot tell the implementations apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pretrain.errors import CheckpointError, TrainingError
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

    def weights(self) -> dict[str, Tensor]:
        """Full fp32 state dict of the module on the CPU; complete on rank 0."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """Complete on rank 0."""
        ...

    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Write full fp32 values, equal on every rank, into trained parameters, by their names."""
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


def clip_each(gradients: list[Tensor], max_norm: float) -> None:
    """Shorten, in place, each gradient that is longer than `max_norm`, whatever the others are.

    As DINO's release, with its 1e-6 (Caron et al., 2021, arXiv:2104.14294).
    """
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))


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
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    def restore(self) -> None:
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)
