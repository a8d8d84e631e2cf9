"""The plain torch engine: one process, no DeepSpeed. For laptops, and the oracle for the other one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pretrain.engine.engine import (
    BufferGuard,
    GradientAudit,
    OptimizerState,
    StepResult,
    Tally,
    check_weights,
    gather_values,
    shapes_of,
    sum_of_squares,
    tell_optimizer,
)
from pretrain.engine.host_memory import HostMemory
from pretrain.optim import Knobs, OptimConfig, ParameterRule, build_optimizer, set_knobs
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs


class LocalEngine:
    """Trains on one process."""

    def __init__(
        self,
        module: MultiTask,
        optim: OptimConfig,
        accumulation_steps: int,
        precision: str,
        rules: Sequence[ParameterRule] = (),
    ) -> None:
        self.module = module.train()
        self.accumulation_steps = accumulation_steps
        self.precision = precision
        self.optim = optim
        self.optimizer = build_optimizer(module, optim, rules)
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():
            self.optimizer.state_for(parameter)
        device = next(module.parameters()).device
        self.device_type = device.type
        self._num_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.buffers = BufferGuard(module)
        self.audit = GradientAudit(self.parameters)

    def train_step(self, micro_inputs: Iterator[Inputs], knobs: Knobs, tally: Tally) -> StepResult:
        outputs = []
        self.buffers.keep()
        for _ in range(self.accumulation_steps):
            inputs = next(micro_inputs)
            with torch.autocast(self.device_type, torch.bfloat16, enabled=self.precision == "bf16"):
                output = self.module(inputs)
            (output["total"] / self.accumulation_steps).backward()
            outputs.append({name: value.detach() for name, value in output.items()})
        self.audit.finish()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        extra = tally()
        squares = sum_of_squares(gradients, extra.device)
        result = gather_values(outputs, squares, extra, lambda vector: vector, world_size=1)
        tell_optimizer(self.optimizer, self.optim, gradients, result)
        set_knobs(self.optimizer, knobs)
        self.optimizer.step()
        self._num_steps += ~result.skipped
        self.module.finish_step()
        self.buffers.restore(result.skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def student(self, of: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in of.named_parameters())
        yield from of.named_buffers()

    def weights(self, host: HostMemory | None = None) -> dict[str, Tensor]:
        host = host or HostMemory()
        return {name: host.copy(name, value) for name, value in self.module.state_dict().items()}

    def optimizer_state(self, host: HostMemory | None = None) -> OptimizerState:
        host = host or HostMemory()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            own = self.optimizer.state_for(parameter)
            for key in self.optimizer.state_keys:
                tensors[f"{key}.{name}"] = host.copy(f"{key}.{name}", own[key])
        return OptimizerState(int(self._num_steps), tensors)

    def without_gradient(self) -> list[str]:
        return self.audit.without_gradient(lambda vector: vector)

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.module.get_parameter(name).copy_(value)

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        check_weights(state, shapes_of(self.module))
        for name, value in self.module.state_dict().items():
            value.copy_(state[name])

    def load_optimizer_state(self, state: OptimizerState) -> None:
        keys = self.optimizer.state_keys
        state.check(keys, {name: parameter.shape for name, parameter in self.parameters.items()})
        self._num_steps.fill_(state.num_steps)
        for name, parameter in self.parameters.items():
            own = self.optimizer.state_for(parameter)
            if "step" in own:
                own["step"].fill_(state.num_steps)
            for key in keys:
                own[key].copy_(state.tensors[f"{key}.{name}"])
