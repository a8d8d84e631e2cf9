"""A module with all that engines must keep apart: trained, frozen, undecayed and remembered tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses import fp32
from pretrain.optim import Knobs, ParameterRule
from pretrain.peers import ALONE, Peers

DIM = 7  # odd, so that two ranks cannot divide the tensors evenly
GLOBAL_BATCH = 8
ACCUMULATION = 2
FROZEN = {"backbone.embed.weight", "backbone.embed.bias", "backbone.pos_embed"}
BUFFERS = {"memory.queue", "memory.pointer", "memory.centre"}
RULES = (
    ParameterRule("predictor.", constant_lr=True),
    ParameterRule("head.last.", frozen_epochs=1.0),
    ParameterRule("backbone.block.", constant_lr=True, frozen_epochs=0.5),
)


@dataclass(frozen=True)
class Patches:
    """Stands for the inputs of a real module. images: (B, P, 6)."""

    images: Tensor


class Backbone(nn.Module):
    """A frozen embedding, fixed positions, a class token and one block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, DIM).requires_grad_(False)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, DIM), requires_grad=False)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.block = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, images: Tensor) -> Tensor:
        """(B, P, 6) -> (B, D)"""
        patches = self.embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(tokens + F.gelu(self.block(tokens))).mean(dim=1)


class Memory(nn.Module):
    """A queue of what was seen and its running mean, the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(12, DIM))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("centre", torch.zeros(DIM))

    @fp32
    def forward(self, seen: Tensor) -> Tensor:
        """seen: (B, D). A loss () against what is remembered."""
        queue, centre = self.queue.clone(), self.centre.clone()  # both change before the backward pass
        return torch.logsumexp((seen - centre) @ queue.T, dim=1).square().mean()

    @torch.no_grad()
    def remember(self, seen: Tensor, peers: Peers) -> None:
        rows = peers.gather(seen.detach().float())  # (world * B, D)
        places = (self.pointer + torch.arange(len(rows))) % len(self.queue)
        self.queue[places] = rows
        self.pointer.copy_((self.pointer + len(rows)) % len(self.queue))
        self.centre.lerp_(rows.mean(dim=0), 0.1)


class Balance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.ParameterDict({"memory": nn.Parameter(torch.tensor([0.2]))})

    def forward(self, loss: Tensor) -> Tensor:
        log_variance = self.log_variances["memory"].squeeze(0)
        return torch.exp(-log_variance) * loss + log_variance / 2


class SmallModule(nn.Module):
    """Shaped for an engine: takes one argument with `images`, gives a dict with `total`."""

    def __init__(self, peers: Peers) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Sequential()
        self.head.add_module("first", nn.Linear(DIM, 9))
        self.head.add_module("middle", nn.GELU())
        self.head.add_module("last", nn.Linear(9, DIM, bias=False))
        self.predictor = nn.Linear(DIM, DIM)
        self.memory = Memory()
        self.balance = Balance()
        self.peers = peers

    def finish_step(self) -> None:
        """Nothing of it moves on."""

    def forward(self, inputs: Patches) -> dict[str, Tensor]:
        projected = self.head(self.backbone(inputs.images))
        predicted = self.predictor(projected)
        wanted = inputs.images.mean(dim=(1, 2))  # (B,)
        own = (predicted.float().mean(dim=1) - wanted).square().mean()
        remembered = self.memory(projected)
        self.memory.remember(projected, self.peers)
        total = self.balance(own + remembered)
        return {"total": total, "loss/memory": remembered.detach()}


def small_module(peers: Peers = ALONE) -> Any:
    """The same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallModule(peers)


def patches(step: int, peers: Peers = ALONE) -> Iterator[Any]:
    """This rank's share of the two micro steps of a step."""
    share = GLOBAL_BATCH // peers.world_size
    for micro in range(ACCUMULATION):
        generator = torch.Generator().manual_seed(10 * step + micro)
        images = torch.randn(GLOBAL_BATCH, 4, 6, generator=generator)
        yield Patches(images[peers.rank * share : (peers.rank + 1) * share])


def knobs(step: int) -> Knobs:
    """Everything changes with the step; step 2 is the first of epoch 1."""
    return Knobs(lr=0.02 * (step + 1), peak_lr=0.05, weight_decay=0.1 * (step + 1), epoch=step / 2)
