"""Figures of a study as SVG, the same bytes for the same records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from study.compare import Verdict, difference
from study.records import Results

# Okabe and Ito's colours, which people tell apart whatever colours they see, without the yellow
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*<>"
WIDTH = 8.0  # inches
NUM_PANELS = 3  # in a row
LEGEND_COLUMNS = 3
FLOPS_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
STYLE = {
    "svg.hashsalt": "study",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
VERDICT_STYLES: Mapping[Verdict, tuple[str, str]] = {"wins": (COLORS[2], "^"), "loses": (COLORS[1], "v")}
ALL = "all"  # the variant with all tasks
CONTRASTIVE = "contrastive"


def columns_of(results: Results) -> list[str]:
    return [name for name, column in results.columns.items() if column.is_of_features and results.has(name)]


def compute(*several: Results) -> Figure | None:
    """Accuracy over the FLOPs of training: the mean of each variant with its spread.

    several: studies with other budgets, whose means of a variant are joined by a line; what only one of them
    has is grey then, so that the lines can be told apart.
    """
    columns = list(dict.fromkeys(column for results in several for column in columns_of(results)))
    if not columns:
        return None
    variants = list(dict.fromkeys(name for results in several for name in results.runs))
    shared = [name for name in variants if all(name in results.runs for results in several)]
    spent = [{name: results.values(name, "train_flops") for name in results.runs} for results in several]
    most = max(max(by_seed.values()) for one in spent for by_seed in one.values())
    unit, flops = next((unit, flops) for unit, flops in FLOPS_UNITS if most >= 2 * flops or flops == 1e9)
    figure, axes = _panels(len(columns), height=2.6, below=0.2 * (len(shared) // LEGEND_COLUMNS + 1))
    for axis, column in zip(axes, columns, strict=True):
        for variant in sorted(variants, key=lambda name: name in shared):
            means = []
            for results, its_flops in zip(several, spent, strict=True):
                values = results.values(variant, column)
                if values:
                    x = statistics.fmean(its_flops[variant][seed] for seed in values) / flops
                    spread = statistics.stdev(values.values()) if len(values) > 1 else 0.0
                    means.append((x, statistics.fmean(values.values()), spread))
            if not means:
                continue
            x, y, spreads = zip(*sorted(means), strict=True)
            if variant in shared:
                place = shared.index(variant)
                style = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
                axis.errorbar(x, y, yerr=spreads, markersize=6, capsize=2, label=variant, **style)
            else:
                axis.plot(
                    x, y, linestyle="", marker="o", markersize=3, color="#bbbbbb", label="other variants"
                )
        untrained = next(filter(None, (results.untrained(column) for results in several)), None)
        if untrained is not None:
            axis.axhline(untrained, color="#777777", linestyle="--", linewidth=1, label="untrained")
        axis.set_title(column)
        axis.set_xlabel(f"training compute ({unit})")
        axis.set_ylabel("%")
        axis.set_xlim(0, 1.08 * most / flops)
    _legend_below(figure, axes)
    return figure


def weights(results: Results, variant: str = ALL) -> Figure | None:
    """What multiplies each task's loss, over training; a line for each seed."""
    return _over_time(
        results, variant, "weight/", lambda name: name, "weight of the loss (no unit)", zero=False
    )


def conflict_over_time(results: Results, variant: str = ALL) -> Figure | None:
    """Cosine between the gradient of the contrastive task and that of each other, over training."""

    def other(pair: str) -> str | None:
        tasks = pair.split(":")
        return next(task for task in tasks if task != CONTRASTIVE) if CONTRASTIVE in tasks else None

    label = "cosine with contrastive (no unit)"
    return _over_time(results, variant, "gradient_cosine/", other, label, zero=True)


def _over_time(
    results: Results, variant: str, prefix: str, name_of: Any, label: str, *, zero: bool
) -> Figure | None:
    """A colour for each name; thin lines are seeds, and markers the mean over seeds."""
    curves: dict[str, list[Mapping[str, list[float]]]] = {}
    for record in results.runs.get(variant, {}).values():
        for key, curve in record["curves"].items():
            name = name_of(key.removeprefix(prefix)) if key.startswith(prefix) else None
            if name is not None:
                curves.setdefault(name, []).append(curve)
    if not curves:
        return None
    figure, (axis,) = _panels(1, height=3.2, below=0.0)
    for place, (name, of_seeds) in enumerate(curves.items()):
        color = COLORS[place % len(COLORS)]
        for curve in of_seeds:
            axis.plot(curve["steps"], curve["values"], color=color, linewidth=0.7, alpha=0.5)
        steps, means = mean_curve(of_seeds)
        every = max(1, len(steps) // 10)
        style = {"color": color, "marker": MARKERS[place % len(MARKERS)], "markevery": every, "markersize": 5}
        axis.plot(steps, means, linewidth=2, label=name, **style)
    if zero:
        axis.axhline(0, color="#777777", linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return figure


def mean_curve(curves: Sequence[Mapping[str, list[float]]]) -> tuple[list[float], list[float]]:
    """At the steps of the longest curve that all reach; of a straight line only the ends are kept."""
    first, last = max(one["steps"][0] for one in curves), min(one["steps"][-1] for one in curves)
    longest = max(curves, key=lambda one: len(one["steps"]))["steps"]
    steps = [step for step in longest if first <= step <= last]
    values = [np.interp(steps, one["steps"], one["values"]) for one in curves]
    return steps, np.mean(values, axis=0).tolist() if steps else []


def cosines(results: Results, variant: str = ALL) -> dict[tuple[str, str], list[float]]:
    """Pair of tasks -> mean cosine of each seed over the second half of its training."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in results.runs.get(variant, {}).values():
        for key, curve in record["curves"].items():
            kind, _, pair = key.partition("/")
            if kind != "gradient_cosine":
                continue
            first, second = pair.split(":")
            late = [
                value
                for step, value in zip(curve["steps"], curve["values"], strict=True)
                if step > record["steps"] / 2
            ]
            if late:
                found.setdefault((first, second), []).append(statistics.fmean(late))
    return found


def conflict(results: Results, variant: str = ALL) -> Figure | None:
    """Mean cosine of every two tasks: below 0 they pull the shared parameters apart."""
    means = {pair: statistics.fmean(values) for pair, values in cosines(results, variant).items()}
    if not means:
        return None
    tasks = list(dict.fromkeys(task for pair in means for task in pair))
    both_ways = {**means, **{(second, first): value for (first, second), value in means.items()}}
    nan = float("nan")
    grid = [[both_ways.get((first, second), nan) for second in tasks] for first in tasks]
    figure = Figure(figsize=(0.75 * WIDTH, 0.6 * WIDTH), layout="constrained")
    axis = figure.add_subplot()
    axis.grid(visible=False)
    limit = max(0.1, *(abs(value) for value in means.values()))
    image = axis.imshow(grid, cmap="PuOr_r", vmin=-limit, vmax=limit)
    places = range(len(tasks))
    axis.set_xticks(places, tasks, rotation=35, ha="right")
    axis.set_yticks(places, tasks)
    for row in places:
        for column in places:
            value = grid[row][column]
            if value == value:
                color = "white" if abs(value) > 0.6 * limit else "black"
                axis.text(column, row, f"{value:+.2f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=axis, label="mean cosine of gradients (no unit)", shrink=0.85)
    return figure


def read_outs(results: Results) -> Figure | None:
    """Each read-out of each variant: seeds, mean and spread; above the untrained network where measured."""
    columns = columns_of(results)
    if not columns:
        return None
    variants = list(results.runs)
    figure, axes = _panels(len(columns), height=0.9 + 0.22 * len(variants), below=0.0, share_y=True)
    for axis, column in zip(axes, columns, strict=True):
        untrained = results.untrained(column)
        for place, variant in enumerate(variants):
            found = [value - (untrained or 0.0) for value in results.values(variant, column).values()]
            if not found:
                continue
            color = COLORS[1] if variant == ALL else COLORS[0]
            axis.plot(found, [place] * len(found), "o", color=color, markersize=3, alpha=0.5)
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            axis.errorbar(
                statistics.fmean(found), place, xerr=spread, fmt="D", color=color, markersize=5, capsize=3
            )
        axis.set_yticks(range(len(variants)), variants)
        axis.set_ylim(len(variants) - 0.5, -0.5)
        axis.set_title(column)
        if untrained is None:
            axis.set_xlabel("%")
        else:
            axis.axvline(0, color="#777777", linestyle="--", linewidth=1)
            axis.set_xlabel("points above untrained")
    return figure


def pairs(results: Results) -> list[tuple[str, str]]:
    """All tasks against every other variant, and the contrastive task with a helper against it alone."""
    variants = list(results.runs)
    against_all = [(ALL, name) for name in variants if name != ALL and "+" not in name]
    helped = [(name, CONTRASTIVE) for name in variants if name.startswith(f"{CONTRASTIVE}+")]
    return [pair for pair in against_all + helped if all(name in variants for name in pair)]


def differences(results: Results) -> Figure | None:
    """Paired differences in points with their intervals, and which of them the rule calls a win or a loss."""
    columns = columns_of(results)
    found = {
        pair: {column: difference(*(results.values(name, column) for name in pair)) for column in columns}
        for pair in pairs(results)
    }
    found = {
        pair: told
        for pair, told in found.items()
        if any(one and one.low is not None for one in told.values())
    }
    if not found:
        return None
    names = [f"{first} against {second}" for first, second in found]
    figure, axes = _panels(len(columns), height=0.9 + 0.22 * len(names), below=0.3, share_y=True)
    for axis, column in zip(axes, columns, strict=True):
        for place, told in enumerate(found.values()):
            one = told[column]
            if one is None or one.low is None or one.high is None:
                continue
            color, marker = VERDICT_STYLES.get(one.verdict, ("#777777", "o"))
            label = one.verdict if one.verdict in VERDICT_STYLES else "no difference shown"
            axis.plot([one.low, one.high], [place, place], color=color, linewidth=1.5)
            axis.plot(one.mean, place, linestyle="", color=color, marker=marker, markersize=5, label=label)
        axis.axvline(0, color="#777777", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(column)
        axis.set_xlabel("points")
    _legend_below(figure, axes)
    return figure


FIGURES: Mapping[str, Callable[..., Figure | None]] = {
    "compute": compute,
    "differences": differences,
    "weights": weights,
    "conflict": conflict,
    "conflict-time": conflict_over_time,
    "read-outs": read_outs,
}


def _panels(count: int, *, height: float, below: float, share_y: bool = False) -> tuple[Figure, list[Any]]:
    """height: of a row, below: for a legend, in inches."""
    num_columns = min(count, NUM_PANELS)
    num_rows = -(-count // num_columns)
    figure = Figure(figsize=(WIDTH, num_rows * height + below), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=share_y)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _legend_below(figure: Figure, axes: Sequence[Any]) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=LEGEND_COLUMNS)


def draw(name: str, several: Sequence[Results], path: Path) -> bool:
    """Write a figure, if there is anything to draw. several: one study, or those that it holds together."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own file says
        matplotlib.rcParams.update(STYLE)
        figure = FIGURES[name](*several)
        if figure is None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Creator": None}
        figure.savefig(path, format="svg", bbox_inches="tight", pad_inches=0.05, metadata=about)
    return True
