"""Values that follow the step: learning rate, weight decay, teacher momentum, temperature.

Pure functions of the step, so that a resumed run goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(base: float, warmup_steps: int = 0, start: float = 0.0) -> Schedule:
    """Linear from `start` to `base` over the warm-up, then `base`."""

    def value(step: int) -> float:
        return _rising(start, base, step, warmup_steps) if step < warmup_steps else base

    return value


def cosine_with_warmup(
    base: float, final: float, num_steps: int, warmup_steps: int, start: float = 0.0
) -> Schedule:
    """Linear from `start` to `base` over the warm-up, then half a cosine to `final` at step `num_steps`.

    Of MAE, MoCo v3, DINO, SimCLR, BYOL and MaskFeat.
    """

    def value(step: int) -> float:
        if step < warmup_steps:
            return _rising(start, base, step, warmup_steps)
        return _half_cosine(base, final, step - warmup_steps, num_steps - warmup_steps)

    return value


def cosine_over_all(
    base: float, final: float, num_steps: int, warmup_steps: int, start: float = 0.0
) -> Schedule:
    """As `cosine_with_warmup`, but the half cosine began at step 0 and is only entered after the warm-up.

    The rate so falls a little below `base` at the end of the warm-up. Of timm's scheduler, and with it of
    MoBY, DrLoc and SiT v1, whose warm-up starts above zero.
    """

    def value(step: int) -> float:
        if step < warmup_steps:
            return _rising(start, base, step, warmup_steps)
        return _half_cosine(base, final, step, num_steps)

    return value


def quarter_cosine(base: float, final: float, num_steps: int, warmup_steps: int) -> Schedule:
    """Linear from 0 to `base` over the warm-up, then a quarter of a cosine that began at step 0, to `final`.

    Of RelViT's released code, whose warm-up is num_steps // 10: base * cos(pi t / 2 T) +
    final * (1 - cos(pi t / 2 T)). Half way the rate is still 0.707 * base, and at the end of the warm-up it
    drops by 1.2 %.
    """

    def value(step: int) -> float:
        if step < warmup_steps:
            return _rising(0.0, base, step, warmup_steps)
        left = math.cos(math.pi / 2 * min(step, num_steps) / num_steps)
        return final + (base - final) * left

    return value


def cosine_between(first: float, last: float, num_steps: int) -> Schedule:
    """From `first` to `last`, up or down, along half a cosine: the weight decay of DINO and I-JEPA."""

    def value(step: int) -> float:
        return _half_cosine(first, last, step, num_steps)

    return value


def cosine_momentum(base: float, num_steps: int) -> Schedule:
    """Momentum of a teacher, from `base` to 1 along half a cosine (Grill et al., 2020, arXiv:2006.07733)."""

    def value(step: int) -> float:
        return 1.0 - (1.0 - base) * (math.cos(math.pi * min(step, num_steps) / num_steps) + 1) / 2

    return value


def linear_momentum(base: float, num_steps: int) -> Schedule:
    """Momentum of a teacher, from `base` to 1 in a line (I-JEPA; Assran et al., 2023, arXiv:2301.08243)."""

    def value(step: int) -> float:
        return base + (1.0 - base) * min(step, num_steps) / num_steps

    return value


def linear_ramp(start: float, end: float, num_epochs: int) -> Schedule:
    """From `start` in epoch 0 to `end` in epoch `num_epochs` - 1 in a line, then `end`; of the epoch's index.

    Both ends are values of the ramp, as in DINO's release, where the teacher's temperature reaches its end
    in the last epoch of the ramp and not in the one after (Caron et al., 2021, arXiv:2104.14294). A ramp of
    one epoch is all start, one of none all end.
    """

    def value(epoch: int) -> float:
        if epoch >= num_epochs:
            return end
        return start + (end - start) * epoch / max(1, num_epochs - 1)

    return value


def _rising(start: float, base: float, step: int, warmup_steps: int) -> float:
    return start + (base - start) * step / warmup_steps


def _half_cosine(first: float, last: float, step: int, num_steps: int) -> float:
    """`first` at step 0, `last` from step `num_steps` on."""
    progress = min(1.0, step / max(1, num_steps))
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * progress))
