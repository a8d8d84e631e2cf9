"""The DeepSpeed engine: ZeRO stages 0 to 3, fp32 weights with bf16 autocast.

The only file that imports deepspeed. The optimizer's state is read and written in the layout of the whole
model, by parameter name. DeepSpeed's own checkpoint is a set of pickles tied to the number of ranks and the
ZeRO stage; another layout needs an offline conversion that unpickles them. This form is safe to read, and any
stage, any number of ranks and the local engine continue from it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.engine.engine import (
    BufferGuard,
    EngineConfig,
    GradientAudit,
    OptimizerState,
    StepResult,
    Tally,
    buffer_dtypes,
    check_buffer_dtypes,
    check_weights,
    gather_values,
    shapes_of,
    sum_of_squares,
    tell_optimizer,
)
from pretrain.engine.host_memory import HostMemory
from pretrain.errors import ConfigError, nearest
from pretrain.optim import (
    Knobs,
    OptimConfig,
    ParameterRule,
    build_optimizer,
    check_optimizer_stage,
    set_knobs,
)
from pretrain.peers import Peers
from pretrain.tasks.multitask import MultiTask
from pretrain.views.prepare import Inputs

# settings of the DeepSpeed JSON that follow from ours, and where to set them instead
OWNED = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.global_size",
    "gradient_accumulation_steps": "batch.accumulation_steps",
    "gradient_clipping": "optim.clip_norm",
    "torch_autocast": "engine.precision",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "optimizer": "optim",
    "scheduler": "schedule",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
}


# our optimizers are libraries' with a switch; skipped steps are counted and told by the loop
SILENCED = ("untested optimizer", "OVERFLOW! Skipping step")
# what may stand in the DeepSpeed JSON besides
PASSED_THROUGH = (
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "csv_monitor", "comet", "comms_logger", "flops_profiler", "wall_clock_breakdown",
    "steps_per_print", "dump_state",
)  # fmt: skip
ZERO_SETTINGS = (
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "round_robin_gradients",
    "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "use_multi_rank_bucket_allreduce",
    "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
)  # fmt: skip
BF16_REDUCED = ["torch.nn.Linear", "torch.nn.Conv2d"]
BUCKET_UNIT = 1024  # DeepSpeed wants buckets aligned


def zero_stage(config: EngineConfig) -> int:
    section: Any = config.deepspeed.get("zero_optimization", {})
    stage = section.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"engine.deepspeed.zero_optimization.stage: {stage!r} is not one of 0, 1, 2, 3")
    return int(stage)


def check_deepspeed_config(config: EngineConfig) -> None:
    """DeepSpeed ignores what it does not know, so a misspelt section would silently mean its default."""
    for key in config.deepspeed:
        if key in OWNED:
            raise ConfigError(
                f"engine.deepspeed.{key}: follows from '{OWNED[key]}'; remove it here and set that"
            )
        if key not in PASSED_THROUGH:
            raise ConfigError(
                f"engine.deepspeed.{key}: not a section used here; {nearest(key, PASSED_THROUGH)}"
            )
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f'engine.deepspeed.zero_optimization: {zero!r} is no mapping; write {{"stage": 1}}')
    for key in zero:
        if key not in ZERO_SETTINGS:
            raise ConfigError(
                f"engine.deepspeed.zero_optimization.{key}: not used here; {nearest(key, ZERO_SETTINGS)}"
            )
    zero_stage(config)


def resolve(config: EngineConfig, sizes: tuple[int, int, int], num_parameters: int) -> dict[str, Any]:
    """The complete DeepSpeed settings, every default that matters written out.

    sizes: (global batch, accumulation steps, world size). Buckets given as "auto" become an eighth of the
    model, so that several are in flight while the backward pass runs.
    """
    global_batch, accumulation, world_size = sizes
    zero: dict[str, Any] = {
        "stage": 0,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "allgather_partitions": True,
        "use_multi_rank_bucket_allreduce": True,
        "reduce_bucket_size": "auto",
        "allgather_bucket_size": "auto",
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        **dict(config.deepspeed.get("zero_optimization", {})),  # type: ignore[call-overload]
    }
    bucket = max(1_000_000, num_parameters // 8)
    for key, value in (
        ("reduce_bucket_size", bucket),
        ("allgather_bucket_size", max(bucket, num_parameters)),
    ):
        if zero[key] == "auto":
            zero[key] = -(-value // BUCKET_UNIT) * BUCKET_UNIT
    # parameters without a gradient are told by the audit of the first step
    zero["ignore_unused_parameters"] = True
    # the norm is in the step's one collective; DeepSpeed would take it again, with one for each group
    zero["compute_grad_norm"] = zero["stage"] not in (1, 2)
    return {
        "steps_per_print": 1 << 40,
        "wall_clock_breakdown": False,
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "managed_gradient_accumulation": True,
        "zero_allow_untested_optimizer": True,  # ours are libraries' with a switch
        "zero_force_ds_cpu_optimizer": False,
        **config.deepspeed,
        "zero_optimization": zero,
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": global_batch // accumulation // world_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # done here, with that norm
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            # DeepSpeed would round the gradients of these modules to bf16 and sum them so over ranks
            "lower_precision_safe_modules": BF16_REDUCED if config.gradient_reduction == "bf16" else [],
        },
        "bf16": {"enabled": False, "check_grad_overflow": False},  # a step is skipped here, on all ranks
        "fp16": {"enabled": False},
        # its clock would wait for the device twice in every step
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }


def _import_deepspeed() -> Any:
    """DeepSpeed says a lot on import and start; only its warnings and errors are let through."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(lambda record: not any(text in record.getMessage() for text in SILENCED))
    # torch renamed collectives that DeepSpeed calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # an inference-only collective that would be compiled for half a minute at the first start on a CPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine:
    """Trains on every rank of a process group that is already connected."""

    def __init__(
        self,
        module: MultiTask,
        config: EngineConfig,
        optim: OptimConfig,
        peers: Peers,
        global_batch: int,
        accumulation: int,
        rules: Sequence[ParameterRule] = (),
    ) -> None:
        self.stage = zero_stage(config)
        check_optimizer_stage(optim, self.stage)
        deepspeed = _import_deepspeed()
        self.deepspeed = deepspeed
        self.module = module.train()
        self.peers = peers
        self.accumulation_steps = accumulation
        self.optim = optim
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.all_shapes = shapes_of(module)  # ZeRO-3 empties the parameters
        self.shapes = {name: self.all_shapes[name] for name in self.parameters}
        self.audit = GradientAudit(self.parameters)
        self.optimizer = build_optimizer(module, optim, rules)
        num_parameters = sum(p.numel() for p in self.parameters.values())
        dtypes = buffer_dtypes(module)
        self.settings = resolve(config, (global_batch, accumulation, peers.world_size), num_parameters)
        fields = deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields
        if "compute_grad_norm" not in fields:  # older versions always compute it, and refuse the setting
            del self.settings["zero_optimization"]["compute_grad_norm"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=self.settings, dist_init_required=False
            )
        check_buffer_dtypes(module, dtypes)
        if self.stage == 3:
            # tokens and positions are parameters of the backbone itself, read outside its own forward
            for parameter in (*module.backbone.parameters(recurse=False), *module.parameters(recurse=False)):
                deepspeed.zero.register_external_parameter(module, parameter)
        self._link_optimizer_state()
        self.buffers = BufferGuard(module)
        self._num_steps = torch.zeros((), dtype=torch.int64, device=self.engine.device)

    def _flats(self) -> list[Tensor]:
        """What the optimizer steps: the parameters themselves, or this rank's flat partitions of them."""
        if self.stage == 0:
            return list(self.parameters.values())
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _link_optimizer_state(self) -> None:
        """Make the state now, not in the first step, so that it can be read and set at any time."""
        for flat in self._flats():
            self.optimizer.state_for(flat)
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _gradients(self) -> list[Tensor]:
        """This rank's share of the reduced gradients, between backward and step."""
        if self.stage == 0:
            return [p.grad for p in self.parameters.values() if p.grad is not None]
        partitions = self.engine.optimizer.averaged_gradients.values()
        return [gradient for partition in partitions if partition is not None for gradient in partition]

    def train_step(self, micro_inputs: Iterator[Inputs], knobs: Knobs, tally: Tally) -> StepResult:
        outputs = []
        self.buffers.keep()
        for micro_step in range(self.accumulation_steps):
            output = self.engine(next(micro_inputs))
            self.engine.backward(output["total"])
            outputs.append({name: value.detach() for name, value in output.items()})
            if micro_step < self.accumulation_steps - 1:
                self.engine.step()  # not a boundary: only counts the micro step
        self.audit.finish()
        extra = tally()
        gradients = self._gradients()
        squares = sum_of_squares(gradients, extra.device)
        if self.stage == 0:
            squares = squares / self.peers.world_size  # every rank holds all of it
        with torch.no_grad():
            result = gather_values(outputs, squares, extra, self.peers.sum, self.peers.world_size)
        tell_optimizer(self.optimizer, self.optim, gradients, result)
        set_knobs(self.optimizer, knobs)
        del gradients  # DeepSpeed frees them before it steps
        self.engine.step()
        self._num_steps += ~result.skipped
        self.module.finish_step()
        self.buffers.restore(result.skipped)
        return result

    def student(self, of: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in of.named_parameters():
            with self.deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                yield name, parameter.detach()
        yield from of.named_buffers()

    def weights(self, host: HostMemory | None = None) -> dict[str, Tensor]:
        host = host or HostMemory()
        return {
            name: host.copy(name, value)
            for name, value in self.student(self.module)
            if self.peers.rank == 0 and name in self.all_shapes
        }

    def optimizer_state(self, host: HostMemory | None = None) -> OptimizerState:
        host = host or HostMemory()
        tensors = {}
        for name, parameter in self.parameters.items():
            for key in self.optimizer.state_keys:
                value = self._full_state(parameter, key)
                if self.peers.rank == 0:
                    tensors[f"{key}.{name}"] = host.copy(f"{key}.{name}", value)
        return OptimizerState(int(self._num_steps), tensors)

    def _full_state(self, parameter: Any, key: str) -> Tensor:
        """Like the parameter, fp32."""
        if self.stage == 0:
            return self.optimizer.state_for(parameter)[key]
        if self.stage < 3 and self.peers.world_size == 1:  # all of it is here: no collective, no copy
            whole: Tensor = parameter._hp_mapping.get_hp_fragment(key)
            return whole.view(parameter.shape)
        gathered: Tensor = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        return gathered.float()

    def without_gradient(self) -> list[str]:
        return self.audit.without_gradient(self.peers.sum)

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._set_parameter(self.parameters[name], value)

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        check_weights(state, self.all_shapes)
        for name, parameter in self.module.named_parameters():
            self._set_parameter(parameter, state[name])
        for name, buffer in self.module.named_buffers():
            if name in state:  # those made anew with the module are in no state dict
                buffer.copy_(state[name])

    def _set_parameter(self, parameter: Any, value: Tensor) -> None:
        """Everywhere a parameter, trained or frozen, is kept: as the model reads it, and as it is stepped."""
        value = value.to(parameter.device, torch.float32)
        if self.stage < 3:
            parameter.copy_(value)
            if self.stage and parameter.requires_grad:
                self.deepspeed.utils.safe_set_full_fp32_param(parameter, value)
            return
        own = self._own_part(parameter, value)
        parameter.ds_tensor.data.copy_(own)
        if parameter.requires_grad:
            self.deepspeed.utils.safe_set_local_fp32_param(parameter, own)
        if parameter.shape == value.shape:  # a small one, kept whole between steps
            parameter.copy_(value)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        state.check(self.optimizer.state_keys, self.shapes)
        self._num_steps.fill_(state.num_steps)
        for flat in self._flats():
            own = self.optimizer.state_for(flat)
            if "step" in own:
                own["step"].fill_(state.num_steps)
        for name, parameter in self.parameters.items():
            for key in self.optimizer.state_keys:
                self._set_state(parameter, key, state.tensors[f"{key}.{name}"].to(parameter.device))

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor at ZeRO-3, whose own call fails on an uneven division."""
        length = parameter.ds_tensor.ds_numel
        padded = F.pad(value.flatten(), (0, length * self.peers.world_size - value.numel()))
        return padded.narrow(0, length * self.peers.rank, length)

    def _set_state(self, parameter: Any, key: str, value: Tensor) -> None:
        if self.stage == 0:
            self.optimizer.state_for(parameter)[key].copy_(value)
        elif self.stage == 3:
            own = self._own_part(parameter, value)
            self.deepspeed.utils.safe_set_local_optimizer_state(parameter, own, key)
        else:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)
