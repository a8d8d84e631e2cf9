"""What the template of the document can say: every number of it comes from a record, through one of these."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from study import compare, figures
from study.compare import Difference, difference
from study.records import Results, flops_per_image

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("study.md.j2")
RESULTS = "benchmarks/results/study"
ABOUT = "about.json"  # beside pictures: what they are of
EMPTY = "–"  # noqa: RUF001
NOT_MEASURED = "not measured"

Pair = tuple[str, str]
ALT_TEXTS = {
    "compute": "Read-outs over training compute, of both budgets: runs, and mean with spread of variants",
    "weights": "Weight of each task's loss over training, every seed",
    "differences": "Differences of variants on every read-out, with intervals, and who wins by the rule",
    "conflict": "Mean cosine between the gradients of every two tasks",
    "conflict-time": "Cosine between the contrastive gradient and that of each other task over training",
    "read-outs": "Every read-out of every variant: seeds, mean and spread",
}
BUDGETS = {
    "images": "equal images: every variant saw the same images in the same order",
    "compute": "equal compute: steps x seconds per step are the same for every variant",
    "flops": "equal compute: every variant trains for the same FLOPs, counted from its config",
    "as_given": "lengths as the study gives them, not made equal",
}


@dataclass
class Document:
    """Functions for the template. Figures go to `folder`, and are linked from the page beside that folder."""

    results: Mapping[str, Results]
    folder: Path
    drawn: list[Path] = field(default_factory=list)

    def functions(self) -> dict[str, Callable[..., Any]]:
        names = (
            "measured", "not_measured", "pending", "table", "value", "difference", "verdict", "says",
            "comparisons", "versus", "summary", "column_differences", "above_untrained", "own_measures",
            "step_costs", "cost", "costs", "setting", "setup", "commit", "commands", "seeds", "num_seeds",
            "hardware", "figure", "conflict", "pictures", "weights",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    # what there is

    def measured(self, study: str, *variants: str) -> bool:
        """Whether there is any record of the study, and one of each of these variants."""
        return study in self.results and all(name in self.results[study].runs for name in variants)

    def not_measured(self, study: str) -> str:
        """One sentence with the command that would change it."""
        config = f"configs/studies/{study}.yaml"
        if not (ROOT / config).exists():
            return f"Not measured yet: `{study}`, whose study is not written."
        return f"Not measured yet: `pretrain sweep {config} --results {RESULTS}`"

    def pending(self, studies: Sequence[str]) -> str:
        """Which of these are not measured, in short; the commands stand at the end of the page."""
        names = [f"`{name}`" for name in studies]
        return f"Not measured yet: {', '.join(names)} ([commands](#commands-and-cost))." if names else ""

    def seeds(self, study: str) -> str:
        found = sorted({record["seed"] for record in self.results[study].records})
        return ", ".join(map(str, found))

    def num_seeds(self, study: str, *variants: str) -> int:
        """The least of any of these variants, or of all."""
        runs = self.results[study].runs
        return min(len(runs.get(name, {})) for name in variants or runs)

    def hardware(self, study: str) -> str:
        return "; ".join(sorted({record["hardware"] for record in self.results[study].records}))

    def commit(self, study: str) -> str:
        """Short, every one that a run was made with; told where the code was not all in its commit."""
        found = {
            (str(record["commit"] or "unknown")[:12], bool(record.get("uncommitted")))
            for record in self.results[study].records
        }
        return ", ".join(f"`{sha}`" + (" with changes" if changed else "") for sha, changed in sorted(found))

    def commands(self, study: str) -> list[str]:
        """As they were typed."""
        found = {record["command"] for record in self.results[study].records}
        return [f"{command} --results {RESULTS}" for command in sorted(found)]

    def setting(self, study: str, path: str) -> str:
        """A setting of the runs, with what differs between variants: `600 (contrastive: 900)`."""
        by_variant: dict[str, list[str]] = {}
        for variant, by_seed in self.results[study].runs.items():
            texts = {_plain(_at(record["config"], path)) for record in by_seed.values()}
            for text in texts:
                by_variant.setdefault(text, []).append(variant)
        usual = max(by_variant, key=lambda text: len(by_variant[text]))
        others = [f"{', '.join(names)}: {text}" for text, names in by_variant.items() if text != usual]
        return usual + (f" ({'; '.join(others)})" if others else "")

    def setup(self, study: str) -> str:
        """Markdown table of how its runs were made."""
        results = self.results[study]
        first = results.records[0]
        model = first["config"]["model"]
        side = model["img_px"] // model["patch_px"]
        depth = ", ".join(f"{name} {value}" for name, value in (model["args"] or {}).items())
        versions = sorted({_versions(record["versions"]) for record in results.records} - {""})
        dates = sorted(record["date"][:10] for record in results.records if record.get("date"))
        threads = sorted({str(record["threads"]) for record in results.records if record.get("threads")})
        rows = [
            ("budget", BUDGETS["flops" if results.study.cost == "flops" else results.study.budget]),
            ("backbone", f"{model['name']}{f' ({depth})' if depth else ''}"),
            ("tokens", f"{side * side} patches of {model['patch_px']} px of a view of {model['img_px']} px"),
            ("data", self.setting(study, "data.shards")),
            ("steps", self._range(study, "steps")),
            ("images a step", self.setting(study, "batch.global_size")),
            ("images in all", self._range(study, "images")),
            ("optimizer", self.setting(study, "optim.name")),
            ("base learning rate", self.setting(study, "optim.base_lr")),
            ("weights of the losses", self.setting(study, "balance.kind")),
            ("seeds", self.seeds(study)),
            ("hardware", self.hardware(study)),
            ("threads of a process", ", ".join(threads)),
            ("precision", self.setting(study, "engine.precision")),
            ("versions", "; ".join(versions)),
            ("commit", self.commit(study)),
            ("dates", f"{dates[0]} to {dates[-1]}" if dates else ""),
        ]
        return _markdown(["of its runs", study], [row for row in rows if row[1]])

    def _range(self, study: str, column: str) -> str:
        results = self.results[study]
        found = sorted(value for name in results.runs for value in results.values(name, column).values())
        return f"{found[0]:,.0f}" if found[0] == found[-1] else f"{found[0]:,.0f} to {found[-1]:,.0f}"

    # numbers

    def _columns(self, study: str, names: Iterable[str] | None, *, of_features: bool = False) -> list[str]:
        """Those of these that were measured, in their order; None: all of them."""
        results = self.results[study]
        wanted = results.columns if names is None else names
        kept = [name for name in wanted if results.has(name)]
        return [name for name in kept if results.columns[name].is_of_features] if of_features else kept

    def value(self, study: str, variant: str, column: str) -> str:
        """`39.21 ± 0.35 %`: mean and sample standard deviation over seeds."""
        if study not in self.results:
            return NOT_MEASURED
        text = self._cell(study, variant, column)
        if text == EMPTY:
            return NOT_MEASURED
        return f"{text} %" if self.results[study].is_percent(column) else text

    def _cell(self, study: str, variant: str, column: str) -> str:
        results = self.results[study]
        found = list(results.values(variant, column).values())
        if not found:
            return EMPTY
        is_percent = results.is_percent(column)
        text = f"{statistics.fmean(found):{'.2f' if is_percent else '.4g'}}"
        if len(found) > 1:
            text += f" ± {statistics.stdev(found):{'.2f' if is_percent else '.2g'}}"
        return text if len(found) == len(results.runs[variant]) else f"{text} (n={len(found)})"

    def table(
        self,
        study: str,
        columns: Sequence[str] | None = None,
        variants: Sequence[str] | None = None,
        without: Sequence[str] = (),
    ) -> str:
        """Mean ± std of every variant, and of fresh weights; columns that nothing has are left out.

        columns: all read-outs of trained weights but those in `without`, if None.
        """
        results = self.results[study]
        of_trained = [
            name
            for name, one in results.columns.items()
            if one.read_out is not None and one.read_out.weights != "untrained" and name not in without
        ]
        shown = self._columns(study, of_trained if columns is None else columns)
        units = [" %" if results.is_percent(name) else "" for name in shown]
        heads = ["variant", "seeds", "steps", "train s"]
        heads += [name + unit for name, unit in zip(shown, units, strict=True)]
        rows = []
        for name in variants or results.runs:
            if name in results.runs:
                own = [
                    f"{statistics.fmean(results.values(name, one).values()):,.0f}"
                    for one in ("steps", "train_seconds")
                ]
                rows.append(
                    [
                        name,
                        str(len(results.runs[name])),
                        *own,
                        *(self._cell(study, name, one) for one in shown),
                    ]
                )
        fresh = [results.columns[name].untrained if name in results.columns else None for name in shown]
        if any(fresh):
            rows.append(["untrained", EMPTY, "0", "0", *(self._of_all(study, one) for one in fresh)])
        return _markdown(heads, rows)

    def _of_all(self, study: str, column: str | None) -> str:
        """A column that is of all variants alike, as a cell."""
        if column is None:
            return EMPTY
        cells = [self._cell(study, name, column) for name in self.results[study].runs]
        return next((cell for cell in cells if cell != EMPTY), EMPTY)

    def own_measures(self, study: str) -> str:
        """What each task measures of itself at the end of training; '' where nothing was asked for."""
        names = [name for name, one in self.results[study].columns.items() if one.read_out is None]
        return self.table(study, names) if self._columns(study, names) else ""

    def _difference(self, study: str, a: str, b: str, column: str) -> Difference | None:
        results = self.results[study]
        return difference(results.values(a, column), results.values(b, column))

    def difference(self, study: str, a: str, b: str, column: str) -> str:
        """`+1.20 (0.50 to 1.90, n = 3)`: points by which a is above b."""
        return _told(self._difference(study, a, b, column)) if study in self.results else NOT_MEASURED

    def verdict(self, study: str, a: str, b: str, column: str) -> str:
        found = self._difference(study, a, b, column) if study in self.results else None
        return found.verdict if found else NOT_MEASURED

    def comparisons(self, study: str, pairs: Sequence[Pair], columns: Sequence[str] | None = None) -> str:
        """Differences and verdicts of pairs of variants, a row for each that both were measured."""
        shown = self._columns(study, columns, of_features=True)
        rows = []
        for a, b in pairs:
            found = [self._difference(study, a, b, column) for column in shown]
            if any(found):
                rows.append([f"{a} against {b}", *(_told_with_verdict(one) for one in found)])
        return _markdown(["points", *shown], rows) if rows else ""

    def versus(self, studies: Sequence[str], pairs: Sequence[Pair]) -> str:
        """The comparisons of each study that has any of these pairs, and which studies have none yet."""
        found = {name: self.comparisons(name, pairs) for name in studies if name in self.results}
        told = [f"`{name}`:\n\n{table}" for name, table in found.items() if table]
        return "\n\n".join([*told, self.pending([name for name in studies if not found.get(name)])]).strip()

    def summary(self, questions: Sequence[tuple[str, str, str, str]]) -> str:
        """How often each question's first variant wins; questions: (words, study, a, b)."""
        rows = []
        for words, study, a, b in questions:
            if study not in self.results:
                rows.append([words, f"`{study}`", "", "", "", NOT_MEASURED])
                continue
            found: dict[str, list[str]] = {}
            for column in self._columns(study, None, of_features=True):
                one = self._difference(study, a, b, column)
                if one:
                    found.setdefault(one.verdict, []).append(column)
            names = [
                ", ".join(found.get(verdict, [])) for verdict in ("wins", "loses", "no difference shown")
            ]
            few = f"too few seeds for {', '.join(found['too few seeds'])}" if "too few seeds" in found else ""
            rows.append([words, f"`{study}`", *names, few if found else NOT_MEASURED])
        return _markdown(["question", "study", "yes", "the opposite", "no difference shown", ""], rows)

    def says(
        self, study: str, a: str, b: str, *, wins: Sequence[str] = (), loses: Sequence[str] = ()
    ) -> bool:
        """Whether the rule gives just these verdicts, so that a sentence may stand."""
        if not self.measured(study, a, b):
            return False
        given = {
            column: self.verdict(study, a, b, column)
            for column in self._columns(study, None, of_features=True)
            if self._difference(study, a, b, column)
        }
        wanted = {column: "wins" if column in wins else "no difference shown" for column in given}
        wanted |= dict.fromkeys(loses, "loses")
        return bool(given) and given == wanted and set(wins) <= set(given)

    def column_differences(self, study: str, pairs: Sequence[Pair]) -> str:
        """Two read-outs of the same runs against each other, in points; '' where no run has both."""
        results = self.results[study]
        rows = []
        for a, b in pairs:
            for variant in results.runs:
                found = difference(results.values(variant, a), results.values(variant, b))
                if found:
                    cells = [self._cell(study, variant, column) for column in (a, b)]
                    rows.append([variant, f"{a} against {b}", *cells, _told_with_verdict(found)])
        return _markdown(["variant", "read-outs", "first %", "second %", "points"], rows) if rows else ""

    def above_untrained(self, study: str) -> str:
        """Each read-out against the same of fresh weights, where runs have both; '' where none has."""
        columns = self.results[study].columns.values()
        return self.column_differences(study, [(one.name, one.untrained) for one in columns if one.untrained])

    def step_costs(self, study: str, beside: str = figures.CONTRASTIVE) -> str:
        """What an image and a step of each variant take in training, also relative to one.

        Seconds are those that were given or measured beforehand; else those of the fastest run, since others
        may have had to share the machine.
        """
        results = self.results[study]
        flops, seconds = {}, {}
        for name, by_seed in results.runs.items():
            flops[name] = flops_per_image(next(iter(by_seed.values()))["config"]) / 1e6
            known = results.costs.get(name, {}).get("seconds_per_step")
            seconds[name] = known or min(results.values(name, "seconds_per_step").values())
        relative = [f"relative to {beside}"] if beside in results.runs else []
        rows = []
        for name in results.runs:
            row = [name]
            for found in (flops, seconds):
                row.append(f"{found[name]:.4g}")
                row += [f"{found[name] / found[beside]:.2f}"] if relative else []
            rows.append(row)
        heads = ["variant", "MFLOP an image", *relative, "seconds of a step", *relative]
        return _markdown(heads, rows)

    def weights(self, study: str, variant: str = figures.ALL) -> str:
        """The weight of each task's loss at the end of training."""
        found: dict[str, list[float]] = {}
        for record in self.results[study].runs.get(variant, {}).values():
            for name, curve in record["curves"].items():
                if name.startswith("weight/"):
                    found.setdefault(name.removeprefix("weight/"), []).append(curve["values"][-1])
        return _markdown(
            ["task", "weight at the end"], [[name, _spread(values)] for name, values in found.items()]
        )

    def conflict(self, study: str, variant: str = figures.ALL) -> str:
        """Mean cosine of every two tasks, the worst first."""
        found = figures.cosines(self.results[study], variant)
        rows = [
            [f"{first}, {second}", _spread(values), f"{sum(value < 0 for value in values)} of {len(values)}"]
            for (first, second), values in sorted(found.items(), key=lambda one: statistics.fmean(one[1]))
        ]
        return _markdown(["tasks", "cosine", "seeds below 0"], rows) if rows else "Not measured."

    # what it took

    def _hours(self, study: str) -> dict[str, tuple[float, float]]:
        """Hardware -> hours of training and of everything after it."""
        found: dict[str, tuple[float, float]] = {}
        for record in self.results[study].records:
            after = sum(one["seconds"] for one in record["read_outs"].values())
            after += record["stage_seconds"].get("export", 0.0)
            before = found.get(record["hardware"], (0.0, 0.0))
            found[record["hardware"]] = (
                before[0] + record["train_seconds"] / 3600,
                before[1] + after / 3600,
            )
        return found

    def cost(self, study: str) -> str:
        """`3.1 hours of 2 CPU cores: 2.1 hours of training, 58 minutes of export and read-outs`."""
        return "; ".join(
            f"{_duration(sum(hours))} of {hardware}: {_duration(hours[0])} of training, "
            f"{_duration(hours[1])} of export and read-outs"
            for hardware, hours in self._hours(study).items()
        )

    def costs(self) -> str:
        """Every study that was run."""
        rows = [
            [f"`{name}`", str(len(results.records)), _duration(sum(hours)), hardware]
            for name, results in self.results.items()
            for hardware, hours in self._hours(name).items()
        ]
        return _markdown(["study", "runs", "took", "hardware"], rows) if rows else "Nothing was run yet."

    # pictures

    def figure(self, name: str, study: str, *others: str) -> str:
        """Draw it, and link to it; '' where there is nothing to draw. others: studies in the same figure."""
        several = [self.results[one] for one in (study, *others) if one in self.results]
        path = self.folder / f"{study}-{name}.svg"
        if not several or not figures.draw(name, several, path):
            return ""
        self.drawn.append(path)
        return f"![{ALT_TEXTS[name]} ({study})]({self.folder.name}/{path.name})"

    def pictures(self) -> str:
        """The PNG files that lie beside records, as docs/ links to them, and what about.json says of them."""
        found = []
        for results in self.results.values():
            for folder, paths in itertools.groupby(results.pictures, key=lambda path: path.parent):
                file = folder / ABOUT
                about = json.loads(file.read_text()) if file.exists() else None
                for path in paths:
                    where = Path(os.path.relpath(path.resolve(), ROOT / "docs")).as_posix()
                    found.append(f"![{path.stem.replace('_', ' ')} ({results.name})]({where})")
                    if about and path.stem in about["captions"]:
                        found.append(about["captions"][path.stem])
                if about:
                    found.append(_origin(about))
        return "\n\n".join(found)


def render(document: Document, template: Path = TEMPLATE) -> str:
    """The page; its figures are drawn on the way."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    rule = {
        "min_seeds": compare.MIN_SEEDS,
        "margin": f"{compare.MARGIN_POINTS:g}",
        "level": f"{100 * compare.LEVEL_RATIO:g} %",
    }
    told = environment.get_template(template.name).render(**document.functions(), rule=rule, zip=zip)
    return re.sub(r"\n{3,}", "\n\n", told).rstrip() + "\n"


def _origin(about: Mapping[str, Any]) -> str:
    """Of which run and images pictures are, and the commands that made them."""
    images = ", ".join(
        f"{number} ({name})" if name else str(number)
        for number, name in zip(about["images"], about["classes"], strict=True)
    )
    commit = f"`{str(about['commit'] or 'unknown')[:12]}`" + (" with changes" if about["uncommitted"] else "")
    commands = "\n".join(filter(None, [about["train_command"], about["command"]]))
    return (
        f"Run `{about['run']}`: step {about['step']}, seed {about['seed']}, commit {commit}. "
        f"Images of {about['source']}: {images}.\n\n"
        f"```sh\n# needs some hours: the run that it draws\n{commands}\n```"
    )


def _at(settings: Any, path: str) -> Any:
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "timm") if name in versions)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return EMPTY if value is None else str(value)


def _spread(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def _told(found: Difference | None) -> str:
    if found is None:
        return NOT_MEASURED
    interval = "" if found.low is None else f"{found.low:+.2f} to {found.high:+.2f}, "
    return f"{found.mean:+.2f} ({interval}n = {found.n})"


def _told_with_verdict(found: Difference | None) -> str:
    """With the interval, in bold where the rule has a winner; the number of seeds where it has too few."""
    if found is None:
        return EMPTY
    if found.verdict == "too few seeds":
        return f"{found.mean:+.2f} (n = {found.n})"
    clear = "" if found.verdict == "no difference shown" else f" **{found.verdict}**"
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}){clear}"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
