"""What the template of the document can say: every number of it comes from a record, through one of these."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from study import compare, figures
from study.origin import ROOT
from study.records import Results
from study.tables import Tables

TEMPLATE = Path(__file__).with_name("study.md.j2")
ABOUT = "about.json"  # beside pictures: what they are of

ALT_TEXTS = {
    "compute": "Read-outs over training compute, of both budgets: mean with spread of variants",
    "weights": "Weight of each task's loss over training, every seed",
    "differences": "Differences of variants on every read-out, with intervals, and who wins by the rule",
    "conflict": "Mean cosine between the gradients of every two tasks",
    "conflict-time": "Cosine between the contrastive gradient and that of each other task over training",
    "read-outs": "Every read-out of every variant: seeds, mean and spread",
}


@dataclass
class Document(Tables):
    """Functions for the template. Figures go to `folder`, and are linked from the page beside that folder."""

    results: Mapping[str, Results]
    folder: Path
    drawn: list[Path] = field(default_factory=list)

    def functions(self) -> dict[str, Callable[..., Any]]:
        names = (
            "measured", "not_measured", "pending", "table", "value", "difference", "verdict", "says",
            "comparisons", "versus", "summary", "column_difference", "column_differences", "above_untrained",
            "own_measures", "step_costs", "times_the_compute", "cost", "costs", "setting", "setup", "commit",
            "commands", "seeds", "num_seeds", "hardware", "of_copies", "expected", "figure", "conflict",
            "mean", "largest_cosine", "cosine_range", "pictures", "weights",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

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
