"""The table of a study: rows are variants, columns read-outs and metrics, mean ± std over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.errors import UserError
from pretrain.sweep.runs import DONE, FAILED, Run, Sweep, asked, read_json, write_json, write_text
from pretrain.sweep.study import ReadOut

EMPTY = "–"  # noqa: RUF001


def table_of(sweep: Sweep, runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the table says, from the finished runs' files alone. A value is a number per seed."""
    rows = []
    run_of = {(run.variant, run.seed): run for run in runs}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        done = read_json(run.folder / DONE)
        if done is not None:
            found.setdefault(run.variant, {})[run.seed] = done
    for name in sweep.study.all_variants():
        done_by_seed = found.get(name, {})
        columns = {}
        for column, read_out, key in sweep.study.read_columns():
            values = {
                seed: _read(done, run_of[name, seed], read_out, key) for seed, done in done_by_seed.items()
            }
            columns[column] = summarise(values, is_percent=key.endswith("_ratio"))
        for metric in sweep.study.metrics:
            values = {seed: done["metrics"].get(metric) for seed, done in done_by_seed.items()}
            columns[metric] = summarise(values)
        rows.append(
            {
                "variant": name,
                "planned": sum(run.variant == name for run in runs),
                "finished": len(done_by_seed),
                "failed": [
                    run.seed for run in runs if run.variant == name and (run.folder / FAILED).exists()
                ],
                "steps": summarise({seed: done["steps"] for seed, done in done_by_seed.items()}),
                "train_seconds": summarise(
                    {seed: done["train_seconds"] for seed, done in done_by_seed.items()}
                ),
                "columns": columns,
            }
        )
    all_done = [done for by_seed in found.values() for done in by_seed.values()]
    return {
        "study": sweep.path.stem,
        "budget": "flops" if sweep.study.cost == "flops" else sweep.study.budget,
        "rows": rows,
        "hardware": sorted({done["hardware"] for done in all_done}),
        "commits": sorted({done["commit"] or "unknown" for done in all_done}),
        "uncommitted": any(done.get("uncommitted") for done in all_done),
    }


def _read(done: Mapping[str, Any], run: Run, read_out: ReadOut, path: str) -> float | None:
    """The value at `path` of a run's read-out; None where it has none, null, or one with other arguments."""
    left = done["read_outs"].get(read_out.name)
    if left is None or left["asked"] != asked(run, read_out):
        return None
    if _is_of_another_task(run, read_out, path):
        return None
    value = left["result"]
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise UserError(
                f"evaluate '{read_out.name}': '{path}' is not in its result"
                + (f", which has {', '.join(value)}" if isinstance(value, dict) else "")
            )
        value = value[key]
    if value is None:  # such as the accuracy on images that two sets share, where they share none
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"evaluate '{read_out.name}': '{path}' is not a number")
    return value


def _is_of_another_task(run: Run, read_out: ReadOut, path: str) -> bool:
    """Whether a metric of a task is asked of a variant that does not have it, as among subsets of tasks."""
    task = path.removeprefix("values.").partition("/")[0]
    tasks = run.config.tasks
    return read_out.kind == "pretext" and task in type(tasks).model_fields and task not in tasks.enabled()


def summarise(by_seed: Mapping[int, float | None], *, is_percent: bool = False) -> dict[str, Any]:
    """Mean and sample standard deviation (n - 1) of the seeds that have a value."""
    factor = 100.0 if is_percent else 1.0
    values = {seed: factor * value for seed, value in by_seed.items() if value is not None}
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "n": len(numbers),
        "unit": "%" if is_percent else None,
        "by_seed": {str(seed): value for seed, value in values.items()},
    }


def format_table(table: Mapping[str, Any]) -> str:
    """Markdown."""
    names = list(table["rows"][0]["columns"])
    units = [table["rows"][0]["columns"][name]["unit"] for name in names]
    heads = [f"{name} {unit}" if unit else name for name, unit in zip(names, units, strict=True)]
    lines = [["variant", "runs", "steps", "train s", *heads]]
    for row in table["rows"]:
        cells = [_cell(row["columns"][name], row["finished"]) for name in names]
        steps, seconds = row["steps"]["mean"], row["train_seconds"]["mean"]
        lines.append(
            [
                row["variant"],
                f"{row['finished']} of {row['planned']}" + (" (failed)" if row["failed"] else ""),
                EMPTY if steps is None else f"{steps:.0f}",
                EMPTY if seconds is None else f"{seconds:.1f}",
                *cells,
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    shown = (
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in (lines[0], rule, *lines[1:])
    )
    return "\n".join([*shown, "", *_notes(table)])


def _cell(value: Mapping[str, Any], num_finished: int) -> str:
    """`39.21 ± 0.35`; a single seed has no spread, and n is said where it is not that of the row."""
    if value["mean"] is None:
        return EMPTY
    digits = ".2f" if value["unit"] == "%" else ".4g"
    text = f"{value['mean']:{digits}}"
    if value["std"] is not None:
        text += f" ± {value['std']:{'.2f' if value['unit'] == '%' else '.2g'}}"
    return text if value["n"] == num_finished else f"{text} (n={value['n']})"


_BUDGETS = {
    "images": "every variant saw the same number of images",
    "compute": "every variant trained for the same steps x seconds per step, as measured or given beforehand",
    "flops": "every variant trained for the same FLOPs, as counted from its config",
    "as_given": "lengths as the study gives them, not made equal",
}


def _notes(table: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Mean ± sample standard deviation over the seeds of the finished runs. Budget: "
        f"{_BUDGETS[table['budget']]}."
    ]
    if table["hardware"]:
        notes.append(f"Hardware: {'; '.join(table['hardware'])}.")
        commits = [commit[:12] for commit in table["commits"]]
        warning = " (several: are they the same where it matters?)" if len(commits) > 1 else ""
        changed = ", with changes that are in no commit" if table.get("uncommitted") else ""
        notes.append(f"Commit: {', '.join(commits)}{changed}{warning}.")
    failed = [f"{row['variant']}/seed-{seed}" for row in table["rows"] for seed in row["failed"]]
    if failed:
        notes.append(f"Failed: {', '.join(failed)}.")
    return notes


def write_table(sweep: Sweep, runs: Sequence[Run]) -> None:
    """DIR/table.json and DIR/table.md, each complete or not at all."""
    table = table_of(sweep, runs)
    write_json(sweep.folder / "table.json", table)
    write_text(sweep.folder / "table.md", f"# {table['study']}\n\n{format_table(table)}\n")
