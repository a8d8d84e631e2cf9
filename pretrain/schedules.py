"""Values that follow the step: learning rate and teacher momentum. Pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def cosine_with_warmup(
    base: float, final: float, num_steps: int, warmup_steps: int, start: float = 0.0
) -> Schedule:
    """Linear from `start` to `base` over the warm-up, then half a cosine to `final` at step `num_steps`."""

    def value(step: int) -> float:
        if step < warmup_steps:
            return start + (base - start) * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))

    return value


def cosine_momentum(base: float, num_steps: int) -> Schedule:
    """Momentum of a teacher, from `base` to 1 along half a cosine (Grill et al., 2020, arXiv:2006.07733)."""

    def value(step: int) -> float:
        return 1.0 - (1.0 - base) * (math.cos(math.pi * min(step, num_steps) / num_steps) + 1) / 2

    return value
