"""What there is to choose from: methods that have a config, tasks, and backbones."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.errors import nearest

METHODS = Path(__file__).parents[1] / "configs" / "methods"  # of a checkout; an installed package has none
NUM_EXAMPLES = 3  # of a family


def list_methods(pattern: str, folder: Path = METHODS) -> str:
    """Every config of a method with the first line of its header."""
    paths = [path for path in sorted(folder.glob("*.yaml")) if fnmatch.fnmatch(path.stem, pattern)]
    if not folder.is_dir():
        return f"no methods: {folder} is not there; they come with the repository, not with the package"
    return _rows([(path.stem, _header(path)) for path in paths]) if paths else f"no method '{pattern}'"


def _header(path: Path) -> str:
    """What stands after `#` in the first line."""
    first = next(iter(path.read_text().splitlines()), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def list_tasks(pattern: str) -> str:
    """Every task of the TASKS table: what it does, how its loss is balanced, what heads its row."""
    from pretrain.tasks import TASKS

    rows = [
        (
            name,
            _loss(spec.likelihood),
            f"{spec.headline} ({'up' if spec.higher_is_better else 'down'})",
            about(spec.task),
        )
        for name, spec in TASKS.items()
        if fnmatch.fnmatch(name, pattern)
    ]
    return _rows([("task", "loss", "headline", ""), *rows]) if rows else f"no task '{pattern}'"


def _loss(likelihood: object) -> str:
    return likelihood if isinstance(likelihood, str) else "by settings"


def about(task: type) -> str:
    """The first sentence of a task: that of its class, or of its file if the class only lists its metrics."""
    own = task.__doc__ or ""
    if not own or own.startswith("Metrics:"):
        own = sys.modules[task.__module__].__doc__ or own
    return " ".join(own.strip().partition("\n\n")[0].split())


def list_backbones(pattern: str) -> str:
    """timm's architectures that can be a backbone: the families with examples, or those a pattern names."""
    import timm

    from pretrain.models.backbone import FAMILIES

    # a name without a pattern is an architecture of our own, which timm learns of when one is made
    families = {family: timm.list_models(family) or [family] for family in FAMILIES}
    if pattern == "*":
        rows = [
            (
                family,
                str(len(names)),
                ", ".join(names[:NUM_EXAMPLES]) + (", ..." * (len(names) > NUM_EXAMPLES)),
            )
            for family, names in families.items()
        ]
        return _rows([("family", "models", "such as"), *rows])
    every = sorted({name for names in families.values() for name in names})
    found = [name for name in every if fnmatch.fnmatch(name, pattern)]
    return "\n".join(found) if found else f"no backbone '{pattern}'; {nearest(pattern, FAMILIES)}"


LISTS: dict[str, Callable[[str], str]] = {
    "methods": list_methods,
    "tasks": list_tasks,
    "backbones": list_backbones,
}


def list_choices(what: str | None, pattern: str = "*") -> str:
    """One list, or all of them under their names."""
    if what is not None:
        return LISTS[what](pattern)
    return "\n\n".join(f"{name}\n{_indented(listed('*'))}" for name, listed in LISTS.items())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _rows(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
