"""The records of studies, as `pretrain sweep STUDY --results DIR` writes them, by variant and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.plan.backbone import encoder_of
from pretrain.plan.flops import flops_of, site_of
from pretrain.sweep.runs import differences, read_json, told_in_short
from pretrain.sweep.study import ReadOut, Study, load_study

OWN = ("steps", "images", "train_seconds", "seconds_per_step", "train_flops")  # columns that every run has

WEIGHTS_SEED = "--weights-seed"  # of fresh weights: trained ones have none

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A number of each run. read_out: None for a metric of the training; untrained: of fresh weights."""

    name: str
    key: str
    read_out: ReadOut | None = None
    untrained: str | None = None

    @property
    def is_percent(self) -> bool:
        return self.key.endswith("_ratio")

    @property
    def is_of_features(self) -> bool:
        """Whether it says what the trained weights are worth, so that variants are compared by it."""
        if self.read_out is None or self.read_out.weights == "untrained" or "--scratch" in self.read_out.args:
            return False
        is_of_other_images = self.key.startswith("also.")  # which tell about images, not about weights
        return self.is_percent and not is_of_other_images


@dataclass(frozen=True)
class Results:
    """What is stored of a study. runs: variant -> seed -> record, in the order of the study."""

    name: str
    study: Study
    runs: Mapping[str, Mapping[int, Record]]
    columns: Mapping[str, Column]
    costs: Mapping[str, Any]
    pictures: tuple[Path, ...]

    @property
    def records(self) -> list[Record]:
        return [record for by_seed in self.runs.values() for record in by_seed.values()]

    def values(self, variant: str, column: str) -> dict[int, float]:
        """Seed -> value, in percent where it is a ratio; only seeds that have one."""
        found = {seed: self._value(record, column) for seed, record in self.runs.get(variant, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def _value(self, record: Record, name: str) -> float | None:
        if name == "seconds_per_step":
            return record["train_seconds"] / record["steps"] if record["steps"] else None
        if name == "train_flops":
            return record["images"] * flops_per_image(record["config"])
        if name in OWN:
            return record[name]
        column = self.columns.get(name)
        if column is None:
            return None
        if column.read_out is None:
            return record["metrics"].get(name)
        left = record["read_outs"].get(column.read_out.name)
        if left is None or not _is_of(left["asked"], column.read_out, record["seed"]):
            return None  # as in the table of the sweep: measured in another way, before the study was changed
        found: Any = left["result"]
        for key in column.key.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return None
        return 100.0 * found if column.is_percent else float(found)

    def is_percent(self, column: str) -> bool:
        return column in self.columns and self.columns[column].is_percent

    def has(self, column: str) -> bool:
        return any(self.values(variant, column) for variant in self.runs)

    def untrained(self, column: str) -> float | None:
        """What the same read-out gives for weights that were never trained, over all that measured it."""
        known = self.columns.get(column)
        other = known.untrained if known else None
        found = [value for variant in self.runs for value in self.values(variant, other or "").values()]
        return sum(found) / len(found) if found else None


def read(folder: Path) -> dict[str, Results]:
    """Name -> results of every study that lies in `folder` and has a finished run."""
    found = {}
    for path in sorted(folder.glob("*/study.yaml")):
        results = read_study(path.parent)
        if results.runs:
            found[results.name] = results
    return found


def read_study(folder: Path) -> Results:
    """Raises UserError for a file that is no record, and for records that are not of one study."""
    study = load_study(folder / "study.yaml")
    runs = {}
    for variant in study.all_variants():
        found = {path: _read(path) for path in (folder / variant).glob("seed-*.json")}
        records = sorted((one for one in found.values() if one), key=lambda one: one["seed"])
        if records:
            runs[variant] = {record["seed"]: record for record in records}
    _refuse_mixed(folder, study, runs)
    return Results(
        name=folder.name,
        study=study,
        runs=runs,
        columns=_columns(study),
        costs=_read(folder / "cost.json") or {},
        pictures=tuple(sorted(folder.glob("**/*.png"))),
    )


def _read(path: Path) -> Record | None:
    return read_json(path, f"remove {path}, or run it again")


def _refuse_mixed(folder: Path, study: Study, runs: Mapping[str, Mapping[int, Record]]) -> None:
    """Seeds of a variant differ in nothing else, and at equal images all runs saw as many: else some are left
    of an earlier version of the study, and would be compared with those of a later one."""
    seen: tuple[str, Any] | None = None
    for variant, by_seed in runs.items():
        first, *others = by_seed.values()
        for record in others:
            found = differences({**first["config"], "seed": 0}, {**record["config"], "seed": 0})
            if found:
                raise UserError(
                    f"{folder / variant}: seed {record['seed']} has other settings than seed {first['seed']} "
                    f"({told_in_short(found)}); remove the one that is out of date, or run it again"
                )
        if study.budget == "images":
            seen = seen or (variant, first["images"])
            if first["images"] != seen[1]:
                raise UserError(
                    f"{folder}: '{variant}' saw {first['images']} images, '{seen[0]}' {seen[1]}, though the "
                    "study is one of equal images; remove the records that are out of date, or run them again"
                )


def flops_per_image(config: Mapping[str, Any]) -> float:
    """Training FLOPs of a run for each image, counted from its config as `pretrain plan` does."""
    encoder = encoder_of(config)
    return flops_of(config, encoder, site_of(config, encoder, world_size=1, num_samples=0)).train


def _is_of(asked: Mapping[str, Any], read_out: ReadOut, seed: int) -> bool:
    """Whether a result is of the read-out as the study has it now. A set that the study leaves to the run
    is that of its training."""
    args = [str(argument).replace("{seed}", str(seed)) for argument in read_out.args]
    named = {"train": read_out.train, "test": read_out.test, "data": read_out.data}
    wanted = {"kind": read_out.kind, "weights": read_out.weights, "args": args}
    wanted |= {name: where for name, where in named.items() if where is not None}
    return all(asked.get(name) == value for name, value in wanted.items())


def _asks(read_out: ReadOut) -> tuple[object, ...]:
    """What it measures, whatever the weights."""
    args = list(map(str, read_out.args))
    if WEIGHTS_SEED in args:
        place = args.index(WEIGHTS_SEED)
        del args[place : place + 2]
    return read_out.kind, tuple(args), read_out.train, read_out.test, read_out.data


def _columns(study: Study) -> dict[str, Column]:
    found = {}
    for name, read_out, key in study.read_columns():
        beside = [
            other
            for other, fresh, its_key in study.read_columns()
            if fresh.weights == "untrained" and read_out.weights != "untrained" and its_key == key
            if _asks(fresh) == _asks(read_out)
        ]
        found[name] = Column(name, key, read_out, beside[0] if beside else None)
    return {**found, **{name: Column(name, name) for name in study.metrics}}
