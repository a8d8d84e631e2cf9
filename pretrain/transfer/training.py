"""The loop that detectors and segmenters share; what is interrupted goes on to the same bits."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pretrain import randomness
from pretrain.errors import TrainingError, UserError
from pretrain.evaluate.augment import STEP_STREAM, seeded
from pretrain.evaluate.classifier import layer_ids
from pretrain.evaluate.finetune_state import read_state, restore, write_state
from pretrain.optim import Optimizer
from pretrain.schedules import Schedule
from pretrain.transfer.hooks import TransferBackbone

ORDER_STREAM, SAMPLE_STREAM = 1 << 20, (1 << 20) + 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how many at a time, and how often it tells and keeps where it is."""

    num_steps: int
    batch_size: int  # over all processes, which it has to divide into
    seed: int = 0
    save_every_steps: int = 1000
    log_every_steps: int = 50
    clip_norm: float = 0.0  # largest gradient norm; 0 switches clipping off
    num_workers: int = 0  # processes of this process that load samples


class Samples(Protocol):
    """A labelled training set."""

    def __len__(self) -> int: ...

    def load(self, index: int, rng: np.random.Generator) -> Any:
        """One augmented sample. `rng` follows from (seed, epoch, index) alone."""

    def collate(self, samples: list[Any]) -> Any:
        """What `losses_of` is given, on the CPU."""


def train(
    model: nn.Module,
    samples: Samples,
    losses_of: Callable[[nn.Module, Any], Mapping[str, Tensor]],
    optimizer: Optimizer,
    lr: Schedule,
    config: TrainingConfig,
    accelerator: Accelerator,
    folder: Path,
    identity: Mapping[str, Any],
    resume: bool,
    after_save: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Minimise the sum of the named losses that `losses_of(model, batch)` returns; returns what was logged.

    A batch is a pure function of (seed, step), and so are the random numbers of the step, so a training that
    was interrupted goes on, with `resume`, from the newest state in `folder` to the same bits on a CPU. Rows
    of the log are means since the row before, of this process; they stand in FOLDER/metrics.jsonl as well.
    Parameter groups may have an `lr_scale`, which multiplies the schedule's rate. identity: what a state has
    to agree on to be continued. after_save: called by all processes with the step.

    Raises UserError for a folder that holds another training, or this one without `resume`; TrainingError for
    a loss that is not finite.
    """
    if config.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size {config.batch_size}: does not divide into {accelerator.num_processes} processes; "
            f"use {math.ceil(config.batch_size / accelerator.num_processes) * accelerator.num_processes}"
        )
    device = accelerator.device
    model.to(device)
    identity = {
        "seed": config.seed,
        "num_steps": config.num_steps,
        "batch_size": config.batch_size,
        **identity,
    }
    state = read_state(folder, identity, resume, unit="step")
    history: list[dict[str, Any]] = []
    first_step = 0
    if state is not None:
        first_step, history = state.epoch, list(state.history)
        restore(state, model, optimizer, first_step)
        logger.info("goes on after step %d of %d", first_step, config.num_steps)
    accelerator.wait_for_everyone()  # none writes a state before all have looked for one
    log = folder / "metrics.jsonl"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(row) + "\n" for row in history))

    parallel = accelerator.prepare_model(model)
    batches = _batches(samples, config, accelerator, first_step)
    sums: dict[str, Tensor] = {}
    num_summed, began = 0, time.perf_counter()
    for step in range(first_step, config.num_steps):
        model.train()
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = lr(step) * group.get("lr_scale", 1.0)
        # one seed a step and process: drop path, dropout and the sampling of proposals draw from it
        with (
            seeded(config.seed, step, accelerator.process_index, STEP_STREAM),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            losses = losses_of(parallel, batch)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        for name, loss in {"loss": total, **losses}.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + loss.detach().float()
        num_summed += 1

        num_done, is_last = step + 1, step + 1 == config.num_steps
        saves = is_last or num_done % config.save_every_steps == 0
        if saves or num_done % config.log_every_steps == 0:
            now = time.perf_counter()
            row = {
                "step": num_done,
                "lr": lr(step),
                **{name: float(value) / num_summed for name, value in sums.items()},
                "seconds": now - began,
            }
            if not math.isfinite(row["loss"]):
                raise TrainingError(
                    f"step {num_done}: the loss is {row['loss']}; lower the learning rate, then start again "
                    "with --resume"
                )
            history.append(row)
            sums, num_summed, began = {}, 0, now
            if accelerator.is_main_process:
                _tell(row, config.num_steps)
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        if saves:
            if accelerator.is_main_process:
                write_state(folder, num_done, history, identity, model, optimizer, unit="step")
            accelerator.wait_for_everyone()
            if after_save is not None:
                after_save(num_done)
    return history


def _tell(row: Mapping[str, Any], num_steps: int) -> None:
    losses = " ".join(
        f"{name} {value:.4f}" for name, value in row.items() if name not in ("step", "lr", "seconds")
    )
    logger.info(
        "step %d of %d: %s, lr %.2e, %.1f s", row["step"], num_steps, losses, row["lr"], row["seconds"]
    )


def places_of(step: int, num_samples: int, config: TrainingConfig) -> list[tuple[int, int]]:
    """(epoch, index) of every sample of a step's batch; shuffled epochs lie end to end, none is cut."""
    begin = step * config.batch_size
    places = [divmod(position, num_samples) for position in range(begin, begin + config.batch_size)]
    return [(epoch, int(_order(config.seed, epoch, num_samples)[place])) for epoch, place in places]


@lru_cache(maxsize=2)  # a batch seldom lies in more
def _order(seed: int, epoch: int, num_samples: int) -> Tensor:
    return randomness.permutation(seed, epoch, 0, ORDER_STREAM, num_samples)


class _Loaded(Dataset[Any]):
    """What a DataLoader reads: the sample of an (epoch, index)."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        key = randomness.bits(self.seed, epoch, index, SAMPLE_STREAM, 1) & ((1 << 63) - 1)
        return self.samples.load(index, np.random.default_rng(int(key)))


class _Steps:
    """The (epoch, index) of this process's share of every batch from a step on."""

    def __init__(
        self, num_samples: int, config: TrainingConfig, rank: int, world_size: int, first: int
    ) -> None:
        self.num_samples, self.config, self.first = num_samples, config, first
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.config.num_steps):
            yield places_of(step, self.num_samples, self.config)[self.rank :: self.world_size]


def _batches(samples: Samples, config: TrainingConfig, accelerator: Accelerator, first: int) -> Iterator[Any]:
    steps = _Steps(len(samples), config, accelerator.process_index, accelerator.num_processes, first)
    return iter(
        DataLoader(
            _Loaded(samples, config.seed),
            batch_sampler=steps,
            collate_fn=samples.collate,
            num_workers=config.num_workers,
            multiprocessing_context="fork" if config.num_workers else None,  # the index is not copied
            pin_memory=accelerator.device.type == "cuda",
        )
    )


def parameter_groups(
    model: nn.Module,
    backbone: TransferBackbone,
    weight_decay: float,
    layer_decay: float = 1.0,
    rest_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of an optimizer with `weight_decay` and `lr_scale`; parameters that learn nothing are in none.

    model: what is trained, `backbone` a part of it. Layer i of the L blocks of the pretrained network has the
    scale layer_decay ** (L + 1 - i), so what follows them has 1; all that is new has `rest_lr_scale`. Biases,
    norms, positions, tokens and relative position biases are not decayed.
    """
    network: Any = backbone.network
    layers = layer_ids(network) if layer_decay < 1 else {}
    top = max(layers.values(), default=0)
    pretrained = {id(value): name for name, value in network.named_parameters()}
    spared: Any = getattr(network, "no_weight_decay", set)()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = pretrained.get(id(parameter))
        is_spared = parameter.ndim <= 1 or (
            name is not None and (name in spared or name.endswith("relative_position_bias_table"))
        )
        scale = rest_lr_scale if name is None else layer_decay ** (top - layers.get(name, top))
        decay = 0.0 if is_spared else weight_decay
        group = groups.setdefault(
            (scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale, "lr": 0.0}
        )
        group["params"].append(parameter)
    return list(groups.values())
