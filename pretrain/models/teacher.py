"""The averaged teacher: a copy of the student's backbone and some heads that follows it slowly, in fp32."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pretrain.models.backbone import encode
from pretrain.tokens import TokenLayout


class Teacher:
    """An exponential moving average of parts of the student, outside the engine and without gradients.

    Kept in fp32: in bf16 an update with momentum 0.996 rounds to nothing (METHODS A3). The backbone is in
    eval mode, without dropout and drop path; heads are in training mode, because their batch norms use the
    statistics of the teacher's own batch and keep running statistics of their own (which nothing reads, and
    which a skipped step moves too).
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module] | None = None) -> None:
        """heads: by the name under which the student has them, such as `tasks.moco_v3.projector`."""
        self.backbone = _copy_of(backbone).eval()
        self.heads = {name: _copy_of(head).train() for name, head in (heads or {}).items()}
        self.num_calls = 0  # encoder passes since the teacher was made

    @torch.no_grad()
    def encode(self, images: Tensor, layout: TokenLayout) -> Tensor:
        """Clean and whole views, normalised, (M, 3, H, W) -> (M, N, D)"""
        self.num_calls += 1
        return encode(self.backbone, images, layout).final

    @torch.no_grad()
    def project(self, head: str, features: Tensor) -> Tensor:
        """What a head makes of the image features of one view, (B, D) -> (B, d)"""
        projected: Tensor = self.heads[head](features)
        return projected

    @torch.no_grad()
    def update(
        self,
        student: Iterable[tuple[str, Tensor]],
        momentum: float,
        unless: Tensor | None = None,
        at_once: bool = True,
    ) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student.

        student: names as in `state_dict`, with full fp32 parameters. Buffers of the backbone are copied;
        those of the heads are the teacher's own. unless: bool () on the device; where it is true, the
        parameters stay as they are. at_once: false where each value of `student` is gone when the next is
        asked for.
        """
        parameters, buffers = self._parameters(), dict(self.backbone.named_buffers(prefix="backbone"))
        targets, values = [], []
        for name, value in student:
            target = parameters.pop(name, None)
            if target is not None:
                if value.shape != target.shape:
                    raise ValueError(f"teacher: '{name}' is {tuple(value.shape)}, not {tuple(target.shape)}")
                targets.append(target)
                values.append(value.detach().to(target.device, torch.float32))
            elif name in buffers:
                buffers[name].copy_(value)
            if not at_once:
                approach(targets, values, 1.0 - momentum, unless)
                targets, values = [], []
        if parameters:
            raise ValueError(f"teacher: the student gave no '{next(iter(parameters))}'")
        approach(targets, values, 1.0 - momentum, unless)

    def _parameters(self) -> dict[str, Tensor]:
        named = dict(self.backbone.named_parameters(prefix="backbone"))
        for name, head in self.heads.items():
            named |= dict(head.named_parameters(prefix=name))
        return named  # type: ignore[return-value]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the student's modules that are averaged."""
        return ("backbone", *self.heads)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names they have in the student."""
        state = dict(self.backbone.state_dict(prefix="backbone."))
        for name, head in self.heads.items():
            state |= head.state_dict(prefix=f"{name}.")
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys():
            example = next(iter(own.keys() ^ state.keys()))
            raise ValueError(f"teacher: the state is another network's, for example in '{example}'")
        for name, value in own.items():
            value.copy_(state[name])


def approach(targets: list[Tensor], values: list[Tensor], share: float, unless: Tensor | None = None) -> None:
    """Move targets, in place, by a share of the way to values, unless a bool () on the device says not to.

    All at once: on a GPU a few launches instead of one for each of many small tensors.
    """
    if not targets:
        return
    if unless is None:
        torch._foreach_lerp_(targets, values, share)
        return
    # a share that only the device knows is none of the weights that the fast path of lerp takes
    weight = torch.where(unless, 0.0, share).to(targets[0].dtype)
    torch._foreach_mul_(targets, 1 - weight)
    torch._foreach_add_(targets, torch._foreach_mul(values, weight))


def _copy_of(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float().requires_grad_(False)
