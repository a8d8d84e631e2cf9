"""When one variant is better than another: the rule that stands in the document before its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from scipy import stats

LEVEL_RATIO = 0.95  # of the interval
MARGIN_POINTS = 0.5  # a mean difference below this is of no use, however sure
MIN_SEEDS = 3

Verdict = Literal["wins", "loses", "no difference shown", "too few seeds"]


@dataclass(frozen=True)
class Difference:
    """Of two variants over the seeds that both have, in the unit of the values; one seed has no interval."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> Verdict:
        """Of the first against the second; only for values in points (percent, more is better)."""
        if self.n < MIN_SEEDS or self.low is None or self.high is None:
            return "too few seeds"
        if self.low > 0 and self.mean >= MARGIN_POINTS:
            return "wins"
        if self.high < 0 and self.mean <= -MARGIN_POINTS:
            return "loses"
        return "no difference shown"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """First minus second, paired by seed, with Student's interval of the mean; None without a common seed."""
    pairs = [first[seed] - second[seed] for seed in first if seed in second]
    if not pairs:
        return None
    mean, n = statistics.fmean(pairs), len(pairs)
    if n == 1:
        return Difference(1, mean, None, None)
    quantile = float(stats.t.ppf((1 + LEVEL_RATIO) / 2, n - 1))
    half = quantile * statistics.stdev(pairs) / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half)
