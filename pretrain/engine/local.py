"""The plain torch engine: one process, no DeepSpeed. For laptops, and the oracle for the other one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pretrain.engine.engine import (
    BufferGuard,
    OptimizerState,
    StepOutput,
    Tally,
    gather_values,
    set_lr,
    sum_of_squares,
)
from pretrain.optim import STATE_KEYS, OptimConfig, build_optimizer
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs


class LocalEngine:
    """Trains on one process."""

    def __init__(
        self, module: MultiTask, optim: OptimConfig, accumulation_steps: int, precision: str
    ) -> None:
        self.module = module.train()
        self.accumulation_steps = accumulation_steps
        self.precision = precision
        self.clip_norm = optim.clip_norm
        self.optimizer = build_optimizer(module, optim)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.buffers = BufferGuard(module)

    def train_step(self, micro_inputs: Iterator[Inputs], lr: float, tally: Tally) -> StepOutput:
        outputs = []
        self.buffers.keep()
        for _ in range(self.accumulation_steps):
            inputs = next(micro_inputs)
            with torch.autocast(inputs.images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                output = self.module(inputs)
            (output["total"] / self.accumulation_steps).backward()
            outputs.append({name: value.detach() for name, value in output.items()})
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        extra = tally()
        squares = sum_of_squares(gradients, extra.device)
        values, grad_norm, skipped = gather_values(
            outputs, squares, extra, lambda vector: vector, world_size=1
        )
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        set_lr(self.optimizer, lr)
        if skipped:
            self.buffers.restore()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutput(values, grad_norm, skipped)

    def student(self, of: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in of.named_parameters())
        yield from of.named_buffers()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def optimizer_state(self) -> OptimizerState:
        tensors: dict[str, Tensor] = {}
        num_steps = 0
        for name, parameter in self.module.named_parameters():
            state = self.optimizer.state_for(parameter)
            num_steps = int(state["step"])
            tensors |= {f"{key}.{name}": state[key].cpu().clone() for key in STATE_KEYS}
        return OptimizerState(num_steps, tensors)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for name, parameter in self.module.named_parameters():
            own = self.optimizer.state_for(parameter)
            own["step"].fill_(state.num_steps)
            for key in STATE_KEYS:
                own[key].copy_(state.tensors[f"{key}.{name}"])
