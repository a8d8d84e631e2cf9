"""What was found: tables of read-outs, of differences with their verdicts, and of how the training went."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from study import figures, progress
from study.compare import Difference, difference
from study.origin import Origin
from study.records import flops_per_image
from study.words import (
    EMPTY,
    NOT_MEASURED,
    at,
    listed,
    markdown,
    plain_mean,
    spread,
    told,
    told_with_verdict,
)

Pair = tuple[str, str]


class Tables(Origin):
    """What the template can say of that, by the names of studies, variants and columns."""

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

    def mean(self, study: str, variant: str, column: str) -> float:
        """Over seeds; not a number where it was not measured, which every comparison denies."""
        values = self.results[study].values(variant, column) if study in self.results else {}
        return statistics.fmean(values.values()) if values else math.nan

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
        return markdown(heads, rows)

    def _of_all(self, study: str, column: str | None) -> str:
        """A column that is of all variants alike, as a cell."""
        if column is None:
            return EMPTY
        cells = [self._cell(study, name, column) for name in self.results[study].runs]
        return next((cell for cell in cells if cell != EMPTY), EMPTY)

    def own_measures(self, study: str) -> str:
        """What each task measures of itself at the end of training, and chance in the same unit; '' where
        nothing was asked for."""
        results = self.results[study]
        names = self._columns(study, [name for name, one in results.columns.items() if one.read_out is None])
        if not names:
            return ""
        heads = [name + (" (less is better)" if progress.is_better_lower(name) else "") for name in names]
        chances = progress.chances(results, names)
        rows = [["by chance", "", *(plain_mean(chances[name]) for name in names)]]
        for variant, by_seed in results.runs.items():
            rows.append([variant, str(len(by_seed)), *(self._cell(study, variant, name) for name in names)])
        return markdown(["variant", "seeds", *heads], rows)

    def _difference(self, study: str, a: str, b: str, column: str) -> Difference | None:
        results = self.results[study]
        return difference(results.values(a, column), results.values(b, column))

    def difference(self, study: str, a: str, b: str, column: str) -> str:
        """`+1.20 (0.50 to 1.90, n = 3)`: points by which a is above b."""
        return told(self._difference(study, a, b, column)) if study in self.results else NOT_MEASURED

    def verdict(self, study: str, a: str, b: str, column: str) -> str:
        found = self._difference(study, a, b, column) if study in self.results else None
        return found.verdict if found else NOT_MEASURED

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

    def comparisons(self, study: str, pairs: Sequence[Pair], columns: Sequence[str] | None = None) -> str:
        """Differences and verdicts of pairs of variants, a row for each that both were measured."""
        shown = self._columns(study, columns, of_features=True)
        rows = []
        for a, b in pairs:
            found = [self._difference(study, a, b, column) for column in shown]
            if any(found):
                rows.append([f"{a} against {b}", *(told_with_verdict(one) for one in found)])
        return markdown(["points", *shown], rows) if rows else ""

    def versus(self, studies: Sequence[str], pairs: Sequence[Pair]) -> str:
        """The comparisons of each study that has any of these pairs, and which studies have none yet."""
        found = {name: self.comparisons(name, pairs) for name in studies if name in self.results}
        parts = [f"`{name}`:\n\n{table}" for name, table in found.items() if table]
        return "\n\n".join([*parts, self.pending([name for name in studies if not found.get(name)])]).strip()

    def summary(self, questions: Sequence[tuple[str, str, str, str]], first: str = "linear") -> str:
        """On which read-outs each question's first variant wins; questions: (words, study, a, b).

        first: the read-out that a conclusion is drawn from, with its difference.
        """
        rows: list[list[str]] = []
        missing: dict[str, None] = {}
        for words, study, a, b in questions:
            if not self.measured(study, a, b):
                missing[f"{words} (`{study}`)" if self.measured(study) else f"`{study}`"] = None
                continue
            found: dict[str, list[str]] = {}
            for column in self._columns(study, None, of_features=True):
                one = self._difference(study, a, b, column)
                if one:
                    found.setdefault(one.verdict, []).append(column)
            names = [", ".join(found.get(verdict, [])) for verdict in ("wins", "loses")]
            if "too few seeds" in found:
                names = ["too few seeds", ""]
            gap = told_with_verdict(self._difference(study, a, b, first))
            rows.append([words, f"`{study}`", gap, *names])
        table = markdown(["question", "study", f"points on {first}", "yes on", "the opposite on"], rows)
        return "\n\n".join(filter(None, [table if rows else "", listed("Not measured yet", list(missing))]))

    def column_differences(self, study: str, pairs: Sequence[Pair]) -> str:
        """Two read-outs of the same runs against each other, in points; '' where no run has both."""
        results = self.results[study]
        rows = []
        for a, b in pairs:
            for variant in results.runs:
                found = difference(results.values(variant, a), results.values(variant, b))
                if found:
                    cells = [self._cell(study, variant, column) for column in (a, b)]
                    rows.append([variant, f"{a} against {b}", *cells, told_with_verdict(found)])
        return markdown(["variant", "read-outs", "first %", "second %", "points"], rows) if rows else ""

    def column_difference(self, study: str, variant: str, a: str, b: str) -> str:
        """`+9.78 (n = 1)`: points by which read-out a of a variant is above read-out b."""
        results = self.results[study]
        return told(difference(results.values(variant, a), results.values(variant, b)))

    def of_copies(self, study: str, read_out: str = "lossless") -> str:
        """A read-out on images and on copies of the same ones; '' where no run has it.

        The last column is what so few images leave open: accuracies of the same images differ at most by the
        share of answers that are not the same, so 1.96 standard errors of that share bound the difference.
        """
        results = self.results[study]
        column = results.columns.get(read_out)
        rows = []
        for variant, by_seed in results.runs.items():
            found = []
            for record in by_seed.values():
                left = record["read_outs"].get(read_out)
                if left and column:
                    found.append(at(left["result"], column.key.rpartition(".")[0]))
            if found:
                own, copies, same = (
                    100 * statistics.fmean(one[key] for one in found)
                    for key in ("own_same_keys_top1_ratio", "same_keys_top1_ratio", "agreement_ratio")
                )
                num_images = found[0]["num_same_keys"]
                open_points = 196 * ((1 - same / 100) / num_images) ** 0.5
                cells = [
                    f"{own:.2f}",
                    f"{copies:.2f}",
                    f"{own - copies:+.2f}",
                    f"{same:.1f}",
                    f"{open_points:.1f}",
                ]
                rows.append([variant, str(len(found)), f"{num_images:,}", *cells])
        heads = [
            "variant",
            "seeds",
            "images",
            "lossless %",
            "copies %",
            "points",
            "same answer %",
            "± of so few images",
        ]
        return markdown(heads, rows) if rows else ""

    def expected(self, study: str) -> str:
        """What was published or wanted beforehand, and what came out; '' where the study says nothing."""
        results = self.results[study]
        rows = []
        for one in results.study.expected:
            beside = one.minus and (one.minus.variant or one.variant, one.minus.column or one.column)
            what = f"{one.variant}: {one.column}"
            if beside:
                what += f" minus {beside[1]}" if beside[0] == one.variant else f" minus {beside[0]}"
            values = list(results.values(one.variant, one.column).values())
            others = list(results.values(*beside).values()) if beside else [0.0]
            bounds = [
                *([f"at least {one.at_least:g}"] if one.at_least is not None else []),
                *([f"at most {one.at_most:g}"] if one.at_most is not None else []),
            ]
            cells = [
                NOT_MEASURED,
                EMPTY if one.published is None else f"{one.published:g}",
                ", ".join(bounds),
                "",
            ]
            if values and others:
                found = statistics.fmean(values) - statistics.fmean(others)
                cells[0] = f"{found:.4g} (n = {min(len(values), len(others) if beside else len(values))})"
                is_met = (one.at_least is None or found >= one.at_least) and (
                    one.at_most is None or found <= one.at_most
                )
                cells[3] = ("yes" if is_met else "**no**") if bounds else ""
            rows.append([what, *cells])
        return markdown(["of", "measured", "published", "wanted", "met"], rows) if rows else ""

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
        return markdown(heads, rows)

    def times_the_compute(self, study: str, a: str, b: str) -> str:
        """`5.05`: training FLOPs of an image by a, relative to those by b."""
        first, second = (next(iter(self.results[study].runs[name].values())) for name in (a, b))
        return f"{flops_per_image(first['config']) / flops_per_image(second['config']):.2f}"

    def largest_cosine(self, study: str, variant: str = figures.ALL) -> float:
        """Of the mean cosines of all pairs of tasks, without its sign."""
        found = figures.cosines(self.results[study], variant) if study in self.results else {}
        return max((abs(statistics.fmean(values)) for values in found.values()), default=math.nan)

    def cosine_range(self, study: str, variant: str = figures.ALL) -> str:
        """`-0.02 to +0.05`: of the mean cosines of all pairs of tasks."""
        found = figures.cosines(self.results[study], variant)
        means = [statistics.fmean(values) for values in found.values()]
        return f"{min(means):+.2f} to {max(means):+.2f}" if means else NOT_MEASURED

    def weights(self, study: str, variant: str = figures.ALL) -> str:
        """The weight of each task's loss in training, and whether it has come to rest."""
        found = progress.weights(self.results[study], variant)
        heads = ["task", "weight at first", "at the end", "weighted loss", "settles at"]
        return markdown(
            heads,
            [[name, *(progress.told(values) for values in one.values())] for name, one in found.items()],
        )

    def conflict(self, study: str, variant: str = figures.ALL) -> str:
        """Mean cosine of every two tasks, the worst first."""
        found = figures.cosines(self.results[study], variant)
        rows = [
            [f"{first}, {second}", spread(values), f"{sum(value < 0 for value in values)} of {len(values)}"]
            for (first, second), values in sorted(found.items(), key=lambda one: statistics.fmean(one[1]))
        ]
        return markdown(["tasks", "cosine", "seeds below 0"], rows) if rows else "Not measured."
