"""How sure an accuracy is: of one test set, and of several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

SIMPSON_INTERVALS = 2000


def wilson_interval(ratio: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a binomial share (Wilson, 1927): stays in 0..1, also at 0 and 1."""
    centre = (ratio + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(ratio * (1 - ratio) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def over_seeds(ratios: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and 95 % interval of the mean; the last two are None for one seed.

    The interval is Student's, mean +- t(n - 1) * std / sqrt(n), cut to 0..1: it says how far other seeds may
    move the mean, not how far another test set may.
    """
    mean = statistics.fmean(ratios)
    if len(ratios) < 2:
        return {"mean": mean, "std": None, "interval_95": None, "num_seeds": len(ratios)}
    std = statistics.stdev(ratios)
    half = student_quantile(len(ratios) - 1) * std / math.sqrt(len(ratios))
    interval = [max(0.0, mean - half), min(1.0, mean + half)]
    return {"mean": mean, "std": std, "interval_95": interval, "num_seeds": len(ratios)}


def accuracy_of(ratios: Sequence[float], num_test: int) -> dict[str, Any]:
    """What a result says of its accuracy: of one run as of one test set, of several as of their seeds."""
    if len(ratios) == 1:
        interval, kind = list(wilson_interval(ratios[0], num_test)), "Wilson, of one test set"
        return {
            "top1_ratio": ratios[0],
            "top1_ratio_std": None,
            "top1_ratio_95": interval,
            "interval": kind,
        }
    found = over_seeds(ratios)
    return {
        "top1_ratio": found["mean"],
        "top1_ratio_std": found["std"],
        "top1_ratio_95": found["interval_95"],
        "interval": f"Student, over {len(ratios)} seeds",
    }


def student_quantile(degrees: int, probability: float = 0.975) -> float:
    """The value that a t variable of so many degrees of freedom stays below with a probability above 0.5."""
    low, high = 0.0, 1.0
    while _student_below(high, degrees) < probability:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_below(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_below(value: float, degrees: int) -> float:
    """P(T < value) for value >= 0: the density integrated by Simpson's rule over the angle atan(t / sqrt(n)).

    With that substitution it is cos(angle) ** (n - 1), smooth and bounded however heavy the tails are.
    """
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)
    step = math.atan(value / math.sqrt(degrees)) / SIMPSON_INTERVALS
    total = sum(
        (1 if place in (0, SIMPSON_INTERVALS) else 4 if place % 2 else 2)
        * math.cos(place * step) ** (degrees - 1)
        for place in range(SIMPSON_INTERVALS + 1)
    )
    return 0.5 + math.exp(log_scale) * total * step / 3
