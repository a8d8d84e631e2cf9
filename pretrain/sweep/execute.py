"""Runs a study: train, export and evaluate each run once, go on after any interruption, keep the table."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, UserError
from pretrain.sweep.processes import CommandError, Processes, StoppedError, only_one
from pretrain.sweep.record import about_run, has_record, metric_records, take_over, write_records
from pretrain.sweep.runs import (
    COST,
    DONE,
    FAILED,
    OF_RUNS,
    PROGRESS,
    Run,
    Sweep,
    asked,
    counted_costs,
    hash_of,
    is_done,
    mixed_protocols,
    plan_runs,
    read_json,
    refuse_changed,
    resolve_variants,
    write_json,
)
from pretrain.sweep.table import format_table, table_of, write_table

logger = logging.getLogger("pretrain")

PROGRAM = (sys.executable, "-m", "pretrain")
LOG = "sweep.log"  # what the commands of a run print
MAX_ARRAY_JOBS = 4  # of a Slurm array that run at once


def run_sweep(
    sweep: Sweep, processes: Processes, index: int | None = None, *, measure_only: bool = False
) -> int:
    """Run what is not done yet, all of it or one run by its index; returns the exit code."""
    _warn(sweep)
    with processes.listening():
        # jobs of an array run side by side, and must not each measure costs of their own
        if known_costs(sweep) is None and index is None:
            try:
                measure_costs(sweep, processes)
            except StoppedError:
                logger.info("stopped while measuring seconds per step; the same command goes on")
                return EXIT_PREEMPTED
        if measure_only:
            unit = "training FLOPs an image" if sweep.study.cost == "flops" else "s per step"
            for name, cost in (known_costs(sweep) or {}).items():
                logger.info("%s: %.4g %s", name, cost, unit)
            return EXIT_DONE
        runs = resolved_runs(sweep)
        if index is not None and not 0 <= index < len(runs):
            raise UserError(f"--index {index}: the study has runs 0 to {len(runs) - 1}")
        take_over(sweep, runs)
        chosen = runs if index is None else [runs[index]]
        for run in runs:
            refuse_changed(run)
        failed, unfinished = _run_all(sweep, runs, chosen, processes)
    show_table(sweep, runs)
    if failed:
        logger.warning("failed: %s; the last lines of each are in its %s", ", ".join(failed), FAILED)
    if unfinished:
        logger.info("not finished: %s; the same command goes on where this one stopped", _listed(unfinished))
        return EXIT_PREEMPTED
    return EXIT_FAILED if failed else EXIT_DONE


def _warn(sweep: Sweep) -> None:
    for line in mixed_protocols(sweep):
        logger.warning("%s", line)


def _run_all(
    sweep: Sweep, runs: Sequence[Run], chosen: Sequence[Run], processes: Processes
) -> tuple[list[str], list[str]]:
    """Names of those that failed, and of those that are not finished."""
    failed, unfinished = [], []
    for run in chosen:
        if is_done(run):
            continue
        if processes.must_stop:
            unfinished.append(run.name)
            continue
        title = f"[{runs.index(run) + 1}/{len(runs)}] {run.name}"
        try:
            if not _run_alone(sweep, run, processes, title):
                unfinished.append(run.name)
        except StoppedError:
            unfinished.append(run.name)
        except CommandError as error:
            failed.append(run.name)
            logger.warning("%s: failed with exit code %d; its log ends", title, error.exit_code)
            for line in error.last_lines:
                logger.warning("  %s", line)
        write_table(sweep, runs)
        write_records(sweep, [run])
    done_elsewhere = {run.name for run in chosen if is_done(run)}
    return failed, [name for name in unfinished if name not in done_elsewhere]


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} runs, {names[0]} first" if len(names) > 1 else names[0]


def resolved_runs(sweep: Sweep) -> list[Run]:
    """Every run of the study, with the lengths that its budget gives them."""
    costs = known_costs(sweep)
    if costs is None:
        raise UserError(
            f"{sweep.folder / COST}: lacks the cost of some variants, which all runs of a study share; "
            "measure it first, with --measure-only"
        )
    return plan_runs(sweep, costs)


def show_table(sweep: Sweep, runs: Sequence[Run]) -> None:
    """Write the table from what is done, and show it."""
    take_over(sweep, runs)
    for run in runs:
        refuse_changed(run)  # nor is it counted
    write_table(sweep, runs)
    write_records(sweep, runs)
    logger.info("\n%s\n\ntable in %s", format_table(table_of(sweep, runs)), sweep.folder / "table.md")


def _run_alone(sweep: Sweep, run: Run, processes: Processes, title: str) -> bool:
    """Run it unless another process does; returns whether it is done now."""
    with only_one(run.folder / ".sweep.lock") as is_ours:
        if not is_ours:
            logger.info("%s: another sweep is at it; left to that one", title)
            return False
        if not is_done(run):  # the other process may just have finished it
            _run(sweep, run, processes, title)
        return True


def _run(sweep: Sweep, run: Run, processes: Processes, title: str) -> None:
    progress: dict[str, Any] = {"stages": {}, "begun": {}, "read_outs": {}}
    progress |= read_json(run.folder / PROGRESS) or {}
    progress |= {"config_hash": run.config_hash, "config": run.settings}
    write_json(run.folder / PROGRESS, progress)  # before anything else: now the folder is this run's
    exported = run.folder / "exported"

    def stage(name: str, command: Sequence[str]) -> float:
        logger.info("%s: %s", title, name)
        try:
            return processes.call([*PROGRAM, *command], run.folder / LOG)
        except CommandError as error:
            _record_failure(run, name, error)
            raise

    if "train" not in progress["stages"]:
        progress["stages"]["train"] = stage("train", train_command(sweep, run))
        write_json(run.folder / PROGRESS, progress)
    if not exported.is_dir():
        for left_over in run.folder.glob(f".{exported.name}.*.tmp"):  # of an export that was killed
            shutil.rmtree(left_over)
        progress["stages"]["export"] = stage("export", ["export", str(run.folder), "--out", str(exported)])
        write_json(run.folder / PROGRESS, progress)
    for read_out in run.read_outs:
        wanted = asked(run, read_out)
        if progress["read_outs"].get(read_out.name, {}).get("asked") == wanted:
            continue
        out = run.folder / "read_outs" / read_out.name
        if out.is_dir() and progress["begun"].get(read_out.name) != wanted:
            shutil.rmtree(out)  # else it is left to commands that can go on from what they kept
        progress["begun"][read_out.name] = wanted
        write_json(run.folder / PROGRESS, progress)
        command = ["evaluate", wanted["kind"]]
        if wanted["kind"] in OF_RUNS:
            command.append(str(run.folder))
        else:
            command.append(f"untrained:{exported}" if read_out.weights == "untrained" else str(exported))
        sets = ("test",) if wanted["kind"] in OF_RUNS else ("train", "test", "data")
        for flag in sets:
            if flag in wanted:
                command += [f"--{flag}", wanted[flag]]
        command += ["--out", str(out), *wanted["args"]]
        seconds = stage(read_out.name, command)
        # a fine-tuning also names its recipe and share of the labels; the folder is this read-out's own
        left = sorted((out / "eval").glob(f"{read_out.kind}*.json"))
        result = read_json(left[0]) if left else None
        if result is None:
            failure = CommandError(EXIT_FAILED, [f"left no {read_out.kind}.json in {out / 'eval'}"])
            _record_failure(run, read_out.name, failure)
            raise failure
        progress["read_outs"][read_out.name] = {"asked": wanted, "seconds": seconds, "result": result}
        write_json(run.folder / PROGRESS, progress)
    write_json(run.folder / DONE, _done(sweep, run, progress))
    (run.folder / FAILED).unlink(missing_ok=True)


def _record_failure(run: Run, stage: str, error: CommandError) -> None:
    failure = {"stage": stage, "exit_code": error.exit_code, "last_lines": error.last_lines}
    write_json(run.folder / FAILED, {**failure, "unix_time": round(time.time(), 2)})


def train_command(sweep: Sweep, run: Run) -> list[str]:
    ranks = [] if sweep.num_processes is None else ["--nproc", str(sweep.num_processes)]
    where = ["--resume", "auto", "--output-dir", str(run.folder)]
    return ["train", str(sweep.base_of(run.variant)), *run.overrides, *where, *ranks]


def _done(sweep: Sweep, run: Run, progress: Mapping[str, Any]) -> dict[str, Any]:
    environment = read_json(run.folder / "environment.json") or {}
    records = metric_records(run.folder)
    return {
        "variant": run.variant,
        "seed": run.seed,
        "overrides": list(run.overrides),
        "config_hash": run.config_hash,
        "config": run.settings,
        "commit": environment.get("commit"),
        "hardware": hardware(environment),
        "steps": records[-1]["step"] if records else None,
        "images": records[-1]["images"] if records else None,
        "train_seconds": train_seconds(records),
        "stage_seconds": progress["stages"],  # whole processes; the training's without what was interrupted
        "read_outs": progress["read_outs"],
        "metrics": last_values(records),
        "processes": sweep.num_processes or 1,
        **about_run(run),
        "unix_time": round(time.time(), 2),
    }


def train_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """The seconds of all steps that count, also those before an interruption; no start, no checkpoints."""
    seconds, before = 0.0, 0
    for record in records:
        seconds += record["step_seconds"] * (record["step"] - before)
        before = record["step"]
    return round(seconds, 3)


def last_values(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last known value of everything that was logged."""
    values: dict[str, float] = {}
    for record in records:
        values |= {name: value for name, value in record.items() if value is not None}
    return values


def hardware(environment: Mapping[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    if gpus:
        return ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    return f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"


def known_costs(sweep: Sweep) -> dict[str, float] | None:
    """What a step of each variant costs: {} where the budget needs none, None where some are not measured."""
    study = sweep.study
    if study.budget != "compute":
        return {}
    if study.cost == "flops":
        return counted_costs(sweep)
    if study.cost:
        return dict(study.cost)
    measured = _measured_costs(sweep)
    names = study.all_variants()
    if not all(name in measured for name in names):
        return None
    for name, (_, config) in resolve_variants(sweep).items():
        _refuse_other_cost(sweep, name, measured[name], hash_of(config.model_dump(mode="json")))
    return {name: measured[name]["seconds_per_step"] for name in names}


def _measured_costs(sweep: Sweep) -> dict[str, Any]:
    """By the name of the variant: measured for these runs, else for those that `--results` has records of."""
    path = None if sweep.results is None else sweep.results / sweep.path.stem / COST
    kept = {} if path is None else read_json(path, f"remove {path}") or {}
    # given or counted costs, of an earlier version of the study, are not measured ones
    return read_json(sweep.folder / COST) or {name: one for name, one in kept.items() if "config_hash" in one}


def _refuse_other_cost(sweep: Sweep, name: str, measured: Mapping[str, Any], config_hash: str) -> None:
    if measured["config_hash"] != config_hash:
        raise UserError(
            f"{sweep.folder / COST}: the cost of '{name}' was measured with other settings; undo the change, "
            "or choose another --output-dir"
        )


def measure_costs(sweep: Sweep, processes: Processes) -> dict[str, float]:
    """Measure the seconds per step of every variant in a short run each, and keep them for all its runs."""
    path = sweep.folder / COST
    measured = _measured_costs(sweep)
    for name, (overrides, config) in resolve_variants(sweep).items():
        config_hash = hash_of(config.model_dump(mode="json"))
        if name in measured:
            _refuse_other_cost(sweep, name, measured[name], config_hash)
            continue
        folder = sweep.folder / ".cost" / name
        if folder.is_dir():  # of a measurement that was interrupted
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        steps = sweep.study.measure_steps
        short = (f"schedule={{steps: {steps}}}", f"log.every_steps={max(1, steps // 12)}")
        run = Run(name, sweep.study.seeds[0], (*overrides, *short), config, (), folder)
        logger.info("%s: measuring seconds per step over %d steps", name, steps)
        log = folder.with_name(f"{name}.log")
        try:
            processes.call([*PROGRAM, *train_command(sweep, run)], log)
        except CommandError as error:
            raise UserError(
                f"variant '{name}': its cost cannot be measured ({error}); the end of {log}: "
                + " / ".join(error.last_lines[-1:])
            ) from None
        environment = read_json(folder / "environment.json") or {}
        measured[name] = {
            "seconds_per_step": steady_seconds(metric_records(folder)),
            "config_hash": config_hash,
            "hardware": hardware(environment),
        }
        write_json(path, measured)
        shutil.rmtree(folder)
    return {name: cost["seconds_per_step"] for name, cost in measured.items()}


def steady_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """The median seconds per step after the first third, in which things compile and warm up."""
    last = records[-1]["step"]
    return float(statistics.median(one["step_seconds"] for one in records if one["step"] > last / 3))


def describe(sweep: Sweep) -> str:
    """What would run, one line each."""
    _warn(sweep)
    costs = known_costs(sweep)
    lines = []
    if costs is None:
        lines.append(
            f"seconds per step are measured first, {sweep.study.measure_steps} steps of each variant; "
            "the lengths below are not yet scaled by them"
        )
    runs = plan_runs(sweep, costs if costs is not None else dict.fromkeys(sweep.study.all_variants(), 1.0))
    width = max(len(run.name) for run in runs)
    for number, run in enumerate(runs):
        schedule = run.config.schedule
        length = f"{schedule.epochs:g} epochs" if schedule.steps is None else f"{schedule.steps} steps"
        if costs is not None:
            refuse_changed(run)
        state = next(
            (
                told
                for name, told in ((DONE, "done"), (FAILED, "failed, is tried again"), (PROGRESS, "begun"))
                if (run.folder / name).exists()
            ),
            "to run",
        )
        if state == "done" and not is_done(run):
            state = "lacks a read-out"
        if state == "to run" and has_record(sweep, run):
            state = "has a record"
        lines.append(f"{number:4d}  {run.name.ljust(width)}  {length}, {state}")
    lines.append(f"{len(runs)} runs into {sweep.folder}")
    lines.append(f"the first: pretrain {shlex.join(train_command(sweep, runs[0]))}")
    return "\n".join(lines)


def describe_array(sweep: Sweep) -> str:
    """The lines that give every run a Slurm job of its own."""
    num_runs = sum(len(sweep.study.seeds_of(name)) for name in resolve_variants(sweep))
    ranks = [] if sweep.num_processes is None else ["--nproc", str(sweep.num_processes)]
    where = ["--output-dir", str(sweep.folder)]
    where += [] if sweep.results is None else ["--results", str(sweep.results)]
    where += [word for name in sweep.skip for word in ("--skip", name)]
    command = shlex.join(["pretrain", "sweep", str(sweep.path), *sweep.overrides, *where, *ranks])
    lines = [f"{num_runs} runs"]
    after = ""
    if known_costs(sweep) is None:
        lines.append(f'job=$(sbatch --parsable --wrap "{command} --measure-only")')
        after = "--dependency=afterok:$job "
    lines.append(
        f"sbatch {after}--array=0-{num_runs - 1}%{MAX_ARRAY_JOBS} "
        f'--wrap "{command} --index \\$SLURM_ARRAY_TASK_ID"'
    )
    return "\n".join(lines)
