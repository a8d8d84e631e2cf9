"""Steps that take turns, and what their times say of each other.

Every variant takes one step in every round, so that a drift of the machine's speed hits all of them, and
each round begins with another one. What is quoted is the median of the ratios within rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Step = Callable[[], object]
Seconds = dict[str, list[float]]  # of one step, per variant and round

# CPU time of this process: on one thread, other processes add little to it
CPU: Callable[[], float] = time.process_time
WALL: Callable[[], float] = time.perf_counter
CLOCK_NAMES = {CPU: "CPU time of one thread", WALL: "wall clock"}


def take_turns(
    steps: Mapping[str, Step],
    rounds: int,
    clock: Callable[[], float] = CPU,
    before: Callable[[str], object] = lambda name: None,
) -> Seconds:
    """Time one step of each variant in every round; one round before that warms up and is dropped.

    before: called with a variant's name before its step, outside the time taken.
    """
    seconds: Seconds = {name: [] for name in steps}
    names = list(steps)
    gc.freeze()  # what there is now is not looked through again
    try:
        for number in range(rounds + 1):
            gc.collect()
            first = number % len(names)
            for name in names[first:] + names[:first]:
                before(name)
                begin = clock()
                steps[name]()
                seconds[name].append(clock() - begin)
    finally:
        gc.unfreeze()
    return {name: values[1:] for name, values in seconds.items()}


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, quartiles and range."""
    ordered = sorted(values)
    quarters = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    lower, middle, upper = quarters
    found = {"median": middle, "lower": lower, "upper": upper, "low": ordered[0], "high": ordered[-1]}
    return {name: round(value, digits) for name, value in found.items()}


def ratio(seconds: Seconds, name: str, base: str) -> dict[str, float]:
    """Of two variants' times, within rounds."""
    return spread([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])


def row(
    label: str, seconds: Seconds, name: str, base: str, wanted: float | None = None, note: str = ""
) -> dict[str, Any]:
    """A line of a table: how many times as long `name` takes as `base`.

    wanted: what the median should not exceed.
    """
    line: dict[str, Any] = {"label": label, "of": name, "to": base, "ratio": ratio(seconds, name, base)}
    if wanted is not None:
        line["wanted"] = wanted
    return line | ({"note": note} if note else {})


def absent(label: str, reason: str) -> dict[str, Any]:
    """A line that could not be measured."""
    return {"label": label, "absent": reason}


def table(
    what: str, clock: Callable[[], float], seconds: Seconds, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "what": what,
        "clock": CLOCK_NAMES[clock],
        "rounds": max((len(values) for values in seconds.values()), default=0),
        "median_seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "rows": rows,
    }
