"""A study as YAML: one base config, the variants to compare, their seeds, and how each run is read out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pretrain.errors import ConfigError, nearest
from pretrain.optim import Positive
from pretrain.settings import model_in, parse_yaml, plain

Seed = Annotated[int, Field(ge=0, lt=1 << 31)]
Override = Annotated[str, Field(pattern=r"^[^=\s][^=]*=")]
# images: every variant sees as many; compute: every variant trains as long; as_given: nothing is made equal
BudgetKind = Literal["images", "compute", "as_given"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # of a folder, and of a cell in a table
JOINED = "+"  # between the tasks of a subset
ALL = "all"  # the subset of all tasks, where there are several
OF_MASKS = ("dense",)  # read-outs of a folder of images and masks, in place of shards
OWN_COLUMNS = {"variant", "runs", "steps", "train s"}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Subsets(_Settings):
    """Runs with some of the base config's tasks, the others removed; each is named after its tasks."""

    of: Annotated[tuple[str, ...], Field(min_length=1)]
    only: tuple[tuple[str, ...], ...] | None = None  # None: all subsets but the empty one
    also: dict[str, tuple[Override, ...]] = {}  # every subset once plain, and once more with each of these

    @model_validator(mode="after")
    def _subsets_of_what_is_named(self) -> Subsets:
        if len(set(self.of)) < len(self.of):
            raise ValueError("`of` names a task twice")
        for subset in self.only or ():
            unknown = [task for task in subset if task not in self.of]
            if unknown:
                raise ValueError(f"`only` has '{unknown[0]}'; {nearest(unknown[0], self.of)}")
            if not subset or len(set(subset)) < len(subset):
                raise ValueError(f"`only` has {list(subset)}; a subset names one or more tasks, each once")
        return self

    def variants(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Names and overrides, small subsets first."""
        subsets = self.only
        if subsets is None:
            sizes = range(1, len(self.of) + 1)
            subsets = tuple(subset for size in sizes for subset in combinations(self.of, size))
        for subset in subsets:
            kept = [task for task in self.of if task in subset]
            removed = tuple(f"tasks.{task}=null" for task in self.of if task not in subset)
            called = ALL if not removed and len(kept) > 1 else JOINED.join(kept)
            yield called, removed
            for name, overrides in self.also.items():
                yield f"{called}-{name}", (*removed, *overrides)


class ReadOut(_Settings):
    """One `pretrain evaluate KIND` after a run; `value` of its result becomes a column of the table."""

    name: Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
    kind: str
    train: str | None = None  # DIR or DIR:split; None: the shards that the run was trained on
    test: str | None = None
    data: str | None = None  # DIR of images and masks; of kind dense, in place of train and test
    args: tuple[str | int | float, ...] = ()  # more arguments; "{seed}" in one is the seed of the run
    value: str = (
        "top1_ratio"  # key of the result, with dots into what it holds; a `_ratio` is shown in percent
    )
    more: dict[str, str] = {}  # further columns: name -> key of the same result
    weights: Literal["exported", "untrained"] = "exported"  # untrained: same architecture, fresh weights
    variants: tuple[str, ...] | None = None  # None: all of them

    @model_validator(mode="after")
    def _reads_shards_or_masks(self) -> ReadOut:
        if self.kind not in OF_MASKS:
            if self.data is not None:
                raise ValueError(
                    f"'{self.name}': kind {self.kind} reads shards, not `data`; name them with `train` and "
                    "`test`"
                )
            return self
        if self.data is None:
            raise ValueError(
                f"'{self.name}': kind {self.kind} reads a folder of images and masks; name it with `data`"
            )
        if self.train is not None or self.test is not None:
            raise ValueError(
                f"'{self.name}': kind {self.kind} reads `data`, not shards; remove `train` and `test` "
                "(--train-split and --test-split among its `args` name splits)"
            )
        if self.value == "top1_ratio":
            raise ValueError(f"'{self.name}': kind {self.kind} has no top1_ratio; set `value: miou_ratio`")
        return self


class Variant(_Settings):
    """A row with a config, or with seeds, of its own."""

    base: str | None = None  # relative to the study; None: the study's
    overrides: tuple[Override, ...] = ()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None  # of the study's; None: all of them


class Cell(_Settings):
    """A place in the table; what is not named is that of the value that it is taken from."""

    variant: str | None = None
    column: str | None = None


class Expected(_Settings):
    """What the mean of a column should be, or its difference to another one, in the table's unit."""

    variant: str
    column: str
    minus: Cell | None = None
    published: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _says_what(self) -> Expected:
        if self.published is None and self.at_least is None and self.at_most is None:
            raise ValueError("give `published`, `at_least` or `at_most`")
        return self


class Study(_Settings):
    """A study, completely."""

    base: str  # the config of a run, relative to the study
    overrides: tuple[Override, ...] = ()  # for every run
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    variants: dict[str, tuple[Override, ...] | Variant] = {}  # name -> overrides of the base, or of another
    subsets: Subsets | None = None
    budget: BudgetKind = "images"
    # of a step of each variant, for budget: compute. {}: its seconds are measured; flops: counted from the
    # configs, the same on any machine; else the seconds that are given
    cost: Literal["flops"] | dict[str, Positive] = {}
    reference: str | None = None  # whose schedule the compute budget keeps; None: that of the dearest step
    measure_steps: Annotated[int, Field(ge=6)] = 60  # of the short run that measures a variant's cost
    evaluate: tuple[ReadOut, ...] = ()
    metrics: tuple[str, ...] = ()  # of metrics.jsonl; their last value becomes a column
    expected: tuple[Expected, ...] = ()  # by a publication, or stated beforehand; for the report

    def all_variants(self) -> dict[str, tuple[str, ...]]:
        """Name -> overrides: the rows of the table, in their order."""
        own = {
            name: row.overrides if isinstance(row, Variant) else row for name, row in self.variants.items()
        }
        return {**(dict(self.subsets.variants()) if self.subsets else {}), **own}

    def base_of(self, variant: str) -> str:
        """The config that a row starts from, relative to the study."""
        row = self.variants.get(variant)
        return (row.base if isinstance(row, Variant) else None) or self.base

    def seeds_of(self, variant: str) -> tuple[int, ...]:
        row = self.variants.get(variant)
        return (row.seeds if isinstance(row, Variant) else None) or self.seeds

    def read_columns(self) -> list[tuple[str, ReadOut, str]]:
        """Name of the column, read-out, key of its result."""
        return [
            (name, one, key)
            for one in self.evaluate
            for name, key in {one.name: one.value, **one.more}.items()
        ]

    @model_validator(mode="after")
    def _names_are_known_and_told_apart(self) -> Study:
        names = list(self.variants)
        names += [name for name, _ in self.subsets.variants()] if self.subsets else []
        if not names:
            raise ValueError("nothing to compare; name the rows under 'variants' or 'subsets'")
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"the variant '{name}' cannot name a folder; use letters, digits and _ . + -"
                )
            if names.count(name) > 1:
                raise ValueError(f"two variants are called '{name}'; rename one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names one twice")
        for name in self.variants:
            strange = [seed for seed in self.seeds_of(name) if seed not in self.seeds]
            if strange or len(set(self.seeds_of(name))) < len(self.seeds_of(name)):
                told = f"has {list(self.seeds_of(name))}; name some of {list(self.seeds)}, each once"
                raise ValueError(f"variants.{name}.seeds: {told}")
        for override in (*self.overrides, *(one for many in self.all_variants().values() for one in many)):
            refuse_seed(override)
        self._check_budget(names)
        columns = [*(column for column, _, _ in self.read_columns()), *self.metrics]
        for column in columns:
            if columns.count(column) > 1 or column in OWN_COLUMNS:
                raise ValueError(f"two columns are called '{column}'; rename one")
        for read_out in self.evaluate:
            _refuse_unknown(f"evaluate '{read_out.name}'", read_out.variants or (), names)
        self._check_expected(names, columns)
        return self

    def _check_expected(self, names: Sequence[str], columns: Sequence[str]) -> None:
        for one in self.expected:
            other = one.minus or Cell()
            for variant in filter(None, (one.variant, other.variant)):
                _refuse_unknown("expected", [variant], names)
            for column in filter(None, (one.column, other.column)):
                if column not in columns:
                    raise ValueError(f"expected: no column '{column}'; {nearest(column, columns)}")

    def _check_budget(self, names: Sequence[str]) -> None:
        if self.budget != "compute" and (self.cost or self.reference):
            raise ValueError("`cost` and `reference` belong to budget: compute; set that, or remove them")
        _refuse_unknown("reference", [self.reference] if self.reference else [], names)
        if self.cost == "flops":
            return
        _refuse_unknown("cost", self.cost, names)
        missing = [name for name in names if name not in self.cost]
        if self.cost and missing:
            raise ValueError(
                f"cost: '{missing[0]}' has none; give all of them, or none to have them measured"
            )


def refuse_seed(override: str) -> None:
    if override.partition("=")[0] == "seed":
        raise ValueError(f"'{override}': every run has a seed of its own; list them under 'seeds'")


def _refuse_unknown(where: str, asked: Sequence[str] | Mapping[str, Any], known: Sequence[str]) -> None:
    for name in asked:
        if name not in known:
            raise ValueError(f"{where}: no variant '{name}'; {nearest(name, known)}")


def load_study(path: Path) -> Study:
    """Read a study's YAML. Raises ConfigError with one line that names each wrong key."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file") from None
    settings = parse_yaml(text, str(path))
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping, such as `base: run.yaml`")
    try:
        # by way of JSON, like a run's config: strict types, yet lists for tuples
        return Study.model_validate_json(json.dumps(plain(settings)), strict=True)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {_describe(error)}") from None


def _describe(error: ValidationError) -> str:
    """All problems in one line, for unknown keys with the nearest name."""
    problems = []
    for detail in error.errors():
        location = detail["loc"]
        where = ".".join(str(part) for part in location)
        if detail["type"] == "extra_forbidden":
            problems.append(
                f"{where}: unknown setting; {nearest(str(location[-1]), _keys_at(location[:-1]))}"
            )
        elif detail["type"] == "missing":
            problems.append(f"{where}: is required")
        elif detail["type"] == "string_pattern_mismatch" and location[-1] != "name":
            problems.append(f"{where}: an override reads key=value (got '{detail['input']}')")
        else:
            got = detail["input"]
            value = f" (got {got!r})" if where and isinstance(got, (str, int, float, type(None))) else ""
            told = detail["msg"].removeprefix("Value error, ")
            problems.append(f"{where}: {told}{value}".removeprefix(": "))
    return "; ".join(problems)


def _keys_at(location: Sequence[str | int]) -> list[str]:
    model: Any = Study
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = model_in(model.model_fields[part].annotation)
    return list(model.model_fields)
