"""What is to run: every variant with every seed as one resolved config, at equal budgets."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.check import check
from pretrain.config import RunConfig, load_config
from pretrain.errors import ConfigError, UserError, nearest
from pretrain.evaluate.arguments import add_arguments
from pretrain.evaluate.shards import Role, find_split, open_also
from pretrain.parser import Parser
from pretrain.sweep.study import OF_MASKS, ReadOut, Study, load_study, refuse_seed

PROGRESS = "sweep.json"  # what this run is, and which of its stages are done
DONE = "done.json"  # written last: everything the table needs
FAILED = "failed.json"
COST = "cost.json"  # of the whole study: measured seconds per step of each variant
OF_FROZEN = ("knn", "linear", "probes")  # read-outs by a protocol, if none is named that of the method
OF_RUNS = ("pretext", "head")  # read-outs that need the heads, which an export does not have
NUM_DIFFERENCES = 3  # that a refusal names


@dataclass(frozen=True)
class Sweep:
    """A study, where its runs go, and what the command line added to each of them."""

    study: Study
    path: Path  # of the study
    folder: Path
    num_processes: int | None = None
    overrides: tuple[str, ...] = ()
    results: Path | None = None  # where the records of finished runs are kept
    skip: tuple[str, ...] = ()  # read-outs of the study's file that are left out

    def base_of(self, variant: str) -> Path:
        return self.path.parent / self.study.base_of(variant)


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    overrides: tuple[str, ...]  # of the base config, the seed last
    config: RunConfig
    read_outs: tuple[ReadOut, ...]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant}/seed-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    @property
    def config_hash(self) -> str:
        return hash_of(self.settings)


def open_sweep(
    path: Path,
    folder: Path | None,
    num_processes: int | None = None,
    overrides: Sequence[str] = (),
    *,
    results: Path | None = None,
    skip: Sequence[str] = (),
) -> Sweep:
    """Read the study; its runs go to `runs/<name of the study>` unless told otherwise.

    skip: names of read-outs that are left out.
    """
    study = load_study(path)
    known = [one.name for one in study.evaluate]
    for name in skip:
        if name not in known:
            raise ConfigError(f"--skip {name}: the study has no such read-out; {nearest(name, known)}")
    study = study.model_copy(update={"evaluate": tuple(o for o in study.evaluate if o.name not in skip)})
    if results is not None:
        _refuse_results(results)
    for override in overrides:
        try:
            refuse_seed(override)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    folder = folder or Path("runs") / path.stem
    return Sweep(study, path, folder, num_processes, tuple(overrides), results, tuple(skip))


def _refuse_results(folder: Path) -> None:
    """A place that cannot hold records, told before hours of training."""
    above = folder
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise UserError(f"--results {folder}: {above} is a file; name a folder")


def hash_of(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def resolve_variants(sweep: Sweep) -> dict[str, tuple[tuple[str, ...], RunConfig]]:
    """Name -> overrides and config of each variant, before the budget: read, checked, of equal schedules.

    The command line's overrides come after those of the study, so they win.
    """
    resolved = {}
    _refuse_absent_tasks(sweep)
    for name, own in sweep.study.all_variants().items():
        overrides = (*sweep.study.overrides, *own, *sweep.overrides)
        try:
            config = load_config(sweep.base_of(name), overrides)
            check(config, sweep.num_processes or 1)
        except ConfigError as error:
            raise ConfigError(f"variant '{name}': {error}") from None
        resolved[name] = (overrides, config)
    if sweep.study.budget != "as_given":
        _refuse_unequal(resolved)
    configs = {name: config for name, (_, config) in resolved.items()}
    for read_out in sweep.study.evaluate:
        _refuse_read_out(read_out, {n: c for n, c in configs.items() if n in (read_out.variants or (n,))})
    tasks = {task for config in configs.values() for task in config.tasks.enabled()}
    for metric in sweep.study.metrics:
        task, found, _ = metric.removeprefix("loss/").partition("/")
        if (found or metric.startswith("loss/")) and task not in tasks:
            raise ConfigError(f"metrics: '{metric}' is of no task of the study; {nearest(task, tasks)}")
    return resolved


def _refuse_read_out(read_out: ReadOut, configs: Mapping[str, RunConfig]) -> None:
    """Everything that can be known to be wrong with it before the first run: hours may lie in between."""
    if read_out.data is not None:
        _refuse_masks(read_out, read_out.data, configs)
        return
    for name, config in configs.items():
        shards = config.data.shards
        sets: dict[Role, str] = {"train": read_out.train or shards, "test": read_out.test or shards}
        if read_out.kind in OF_RUNS:
            del sets["train"]
        parsed = _parsed(read_out, sets.items())
        if read_out.kind == "head" and config.tasks.classification is None:
            raise ConfigError(
                f"evaluate '{read_out.name}': variant '{name}' trains no classification head; name others "
                "under 'variants'"
            )
        try:
            found = {split: find_split(where, split) for split, where in sets.items()}
            if read_out.kind == "probes":
                open_also(parsed.also_test, found["train"])
        except UserError as error:
            raise ConfigError(f"evaluate '{read_out.name}': {error}") from None


def mixed_protocols(sweep: Sweep) -> list[str]:
    """A line for each read-out that leaves the protocol to the variants' methods, which have several."""
    from pretrain.evaluate.protocols import method_of

    configs = {name: config for name, (_, config) in resolve_variants(sweep).items()}
    lines = []
    for read_out in sweep.study.evaluate:
        features_only = read_out.kind == "knn" and "--feature" in read_out.args
        if read_out.kind not in OF_FROZEN or "--protocol" in read_out.args or features_only:
            continue
        methods: dict[str, list[str]] = {}
        for name in read_out.variants or configs:
            methods.setdefault(method_of(configs[name].tasks.enabled()), []).append(name)
        if len(methods) > 1:
            told = "; ".join(f"{method}: {', '.join(names)}" for method, names in methods.items())
            lines.append(
                f"evaluate '{read_out.name}': variants are read out by different protocols ({told}), and "
                "differ for that alone; add --protocol to its args"
            )
    return lines


def _parsed(read_out: ReadOut, sets: Iterable[tuple[str, str]]) -> argparse.Namespace:
    """What its command line says; ConfigError if it does not read."""
    parser = Parser(prog="pretrain evaluate")
    add_arguments(parser)
    command = [read_out.kind, "WEIGHTS"]
    for flag, where in sets:
        command += [f"--{flag}", where]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return parser.read(
                [*command, *(str(argument).replace("{seed}", "0") for argument in read_out.args)]
            )
    except SystemExit:
        raise ConfigError(f"evaluate '{read_out.name}': {told.getvalue().strip()}") from None


def _refuse_masks(read_out: ReadOut, data: str, configs: Mapping[str, RunConfig]) -> None:
    """A folder that is not there or lacks a split, and a size that is not whole patches."""
    from pretrain.transfer.dense.run import DenseRequest, check_request

    arguments = _parsed(read_out, [("data", data)])
    request = DenseRequest.of(arguments)
    try:
        for config in configs.values():
            check_request(request, config.model.token_px)
    except UserError as error:
        raise ConfigError(f"evaluate '{read_out.name}': {error}") from None


def _refuse_absent_tasks(sweep: Sweep) -> None:
    """A subset of tasks that the base does not have would be another one than its name says."""
    if sweep.study.subsets is None:
        return
    base = sweep.path.parent / sweep.study.base
    enabled = load_config(base, (*sweep.study.overrides, *sweep.overrides)).tasks.enabled()
    for task in sweep.study.subsets.of:
        if task not in enabled:
            raise ConfigError(
                f"subsets: the base has no task '{task}' (it has {', '.join(enabled)}); "
                f"add 'tasks.{task}={{}}' to the study's overrides"
            )


def _refuse_unequal(resolved: Mapping[str, tuple[tuple[str, ...], RunConfig]]) -> None:
    """A budget is only equal if the variants start from one length and one batch."""
    first, *others = resolved
    of_first = _length(resolved[first][1])
    for name in others:
        if _length(resolved[name][1]) != of_first:
            raise ConfigError(
                f"variant '{name}': trains {_length(resolved[name][1])}, '{first}' trains {of_first}; "
                "make them equal, or set budget: as_given"
            )


def _length(config: RunConfig) -> str:
    schedule = config.schedule
    length = f"{schedule.epochs:g} epochs" if schedule.steps is None else f"{schedule.steps} steps"
    return f"{length} of {config.batch.global_size} images a step"


def counted_costs(sweep: Sweep) -> dict[str, float]:
    """Training FLOPs of an image by each variant: all see batches of one size."""
    from pretrain.plan.flops import train_flops

    return {name: train_flops(config).train for name, (_, config) in resolve_variants(sweep).items()}


def plan_runs(sweep: Sweep, costs: Mapping[str, float] | None = None) -> list[Run]:
    """Every run, all variants of one seed before the next: a sweep that is cut short has whole rows to show.

    costs: of a step of each variant, in any unit, for budget: compute.
    """
    study = sweep.study
    variants = resolve_variants(sweep)
    if study.budget == "compute":
        assert costs is not None
        reference = study.reference or max(variants, key=lambda name: costs[name])
        for name, (overrides, config) in variants.items():
            factor = costs[reference] / costs[name]
            scaled = (*overrides, *scaled_schedule(config, factor))
            variants[name] = (scaled, load_config(sweep.base_of(name), scaled))
    runs = []
    for seed in study.seeds:
        for name, (overrides, config) in variants.items():
            if seed not in study.seeds_of(name):
                continue
            read_outs = tuple(one for one in study.evaluate if name in (one.variants or (name,)))
            own = config.model_copy(update={"seed": seed})
            folder = sweep.folder / name / f"seed-{seed}"
            runs.append(Run(name, seed, (*overrides, f"seed={seed}"), own, read_outs, folder))
    return runs


def scaled_schedule(config: RunConfig, factor: float) -> tuple[str, ...]:
    """Overrides that make a run `factor` times as long; its warm-up grows alike, so the shape stays.

    100 steps with 10 of warm-up and a factor of 1.5 give schedule.steps=150 and schedule.warmup_steps=15.
    """
    scaled = []
    for key in ("steps", "epochs", "warmup_steps", "warmup_epochs", "length_epochs"):
        value = getattr(config.schedule, key)
        if value is None:
            continue
        number = max(round(value * factor), 1 if value else 0) if isinstance(value, int) else value * factor
        scaled.append(f"schedule.{key}={number}")
    return tuple(scaled)


def read_json(path: Path, remedy: str | None = None) -> dict[str, Any] | None:
    """The object in a file, or None if there is no such file. remedy: for a file of no run's own folder."""
    remedy = remedy or f"remove {path.parent} to run it again"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no object; {remedy}")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Complete or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Complete or not at all, also where several sweeps of one study write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def is_done(run: Run) -> bool:
    """Whether every result that the study wants of this run is there."""
    done = read_json(run.folder / DONE)
    return done is not None and all(
        done["read_outs"].get(one.name, {}).get("asked") == asked(run, one) for one in run.read_outs
    )


def asked(run: Run, read_out: ReadOut) -> dict[str, Any]:
    """What a read-out measured, to tell whether the study still wants the same."""
    args = [str(argument).replace("{seed}", str(run.seed)) for argument in read_out.args]
    if read_out.kind in OF_MASKS:
        return {
            "kind": read_out.kind,
            "data": read_out.data,
            "weights": read_out.weights,
            "args": args,
        }
    train, test = read_out.train or run.config.data.shards, read_out.test or run.config.data.shards
    if not train or not test:
        raise UserError(
            f"evaluate '{read_out.name}': the run mixes several sources; say 'train' and 'test' shards"
        )
    return {
        "kind": read_out.kind,
        "train": train,
        "test": test,
        "weights": read_out.weights,
        "args": args,
    }


def refuse_changed(run: Run) -> None:
    """A folder that a run with other settings began is never continued, nor counted in the table."""
    begun = read_json(run.folder / DONE) or read_json(run.folder / PROGRESS)
    if begun is None or begun.get("config_hash") == run.config_hash:
        return
    found = differences(begun.get("config", {}), run.settings)
    raise UserError(
        f"{run.folder}: was begun with other settings ({told_in_short(found)}); "
        "undo the change, choose another --output-dir, or remove that folder"
    )


def told_in_short(found: Sequence[str]) -> str:
    """The first of some differences, and how many more there are."""
    more = f" and {len(found) - NUM_DIFFERENCES} more" if len(found) > NUM_DIFFERENCES else ""
    return "; ".join(found[:NUM_DIFFERENCES]) + more


def differences(was: Any, now: Any, where: str = "") -> list[str]:
    """`key: was x, now y` for every setting that is not the same."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [*was, *(key for key in now if key not in was)]
        return [
            line
            for key in keys
            for line in differences(was.get(key), now.get(key), f"{where}.{key}".removeprefix("."))
        ]
    return [] if was == now else [f"{where}: was {was}, now {now}"]
