"""The sections on what was measured after training: evaluations and exports, from their JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.report.chart import number
from pretrain.report.markup import Markup, tag
from pretrain.report.page import Section, how_to_read, section, table
from pretrain.report.special_results import special_table

MAX_VALUES = 16  # of a result of an unknown kind
OTHERS = {"untrained": "untrained", "pixels": "raw pixels"}  # what a summary puts beside the trained features
Result = Mapping[str, Any]
_HIDDEN = ("versions", "hardware", "encoder", "train", "test", "recipe", "runs", "history", "headlines")


def evaluation_section(results: Mapping[str, Result]) -> Section:
    """results: by file, such as `knn` or `step-00000100/linear`."""
    classified = {
        name: one for name, one in results.items() if isinstance(one.get("top1_ratio"), int | float)
    }
    parts: list[Markup | None] = [
        how_to_read(
            "What the features are worth on labelled images that no training saw. ",
            tag("b", "Good"),
            ": well above the same network with fresh weights and above raw pixels, and beyond the "
            "intervals.",
        )
    ]
    for name, result in results.items():
        if result.get("method") == "summary":
            parts += _summary(name, result)
    if classified:
        parts += [tag("h3", "Classification"), _classified(classified)]
    for name, result in results.items():
        if "values" in result and "headlines" in result:
            parts += _pretext(name, result)
        elif name not in classified and result.get("method") != "summary":
            known = special_table(result)
            parts += [tag("h3", name), _unknown(result) if known is None else known]
    return section("evaluation", "Evaluation", *parts)


def accuracies(results: Mapping[str, Result]) -> tuple[str, ...]:
    """The best-known numbers for the verdict: k-NN and linear accuracy, beside fresh weights if measured."""
    told: list[str] = []
    summary = next((one for one in results.values() if one.get("method") == "summary"), None)
    for method, name in (("knn", "k-NN"), ("linear", "linear probe")):
        beside: dict[str, float | None] = {}
        if summary is not None and isinstance(summary.get("features"), Mapping):
            features = summary["features"]
            beside = {
                kind: _top1(features[kind].get(method))
                for kind in ("trained", *OTHERS)
                if isinstance(features.get(kind), Mapping)
            }
        value = beside.pop("trained", None) or _top1(results.get(method))
        if value is not None:
            others = [f"{OTHERS[kind]} {_percent(one)}" for kind, one in beside.items() if one is not None]
            told.append(f"{name} {_percent(value)}" + (f" ({', '.join(others)})" if others else ""))
    return tuple(told)


def _summary(name: str, result: Result) -> list[Markup | None]:
    features = result.get("features")
    if not isinstance(features, Mapping):
        return [tag("h3", name), _unknown(result)]
    rows = []
    for kind, methods in features.items():
        values = [
            _top1(methods.get(method)) if isinstance(methods, Mapping) else None
            for method in ("knn", "linear")
        ]
        rows.append((str(kind), *(_percent(value) for value in values)))
    head = ("features", "k-NN, k = 20", "linear probe")
    return [tag("h3", "Trained beside plain features"), table(head, rows, numbers=(1, 2))]


def _classified(results: Mapping[str, Result]) -> Markup:
    rows = []
    for name, result in results.items():
        encoder = _mapping(result.get("encoder"))
        rows.append(
            (
                name,
                str(encoder.get("feature", "")),
                str(encoder.get("step", "")),
                _percent(_top1(result)),
                _interval(result.get("top1_ratio_95")),
                "; ".join(_details(result)),
            )
        )
    head = ("evaluation", "feature", "step", "top-1", "95 %", "how")
    return table(head, rows, numbers=(2, 3, 4), wrapped=(5,))


def _interval(low_high: object) -> str:
    if not isinstance(low_high, Sequence) or len(low_high) != 2 or isinstance(low_high, str):
        return ""
    return f"{100 * float(low_high[0]):.1f} to {100 * float(low_high[1]):.1f}"


def _details(result: Result) -> list[str]:
    """How it was made, of what any of the evaluations write down."""
    parts = []
    if isinstance(result.get("top1_ratio_std"), int | float):
        seeds = result.get("seeds")
        of_seeds = f" of {len(seeds)} seeds" if isinstance(seeds, Sequence) else ""
        parts.append(f"\N{PLUS-MINUS SIGN} {100 * float(result['top1_ratio_std']):.2f}{of_seeds}")
    if isinstance(result.get("best_k"), int):
        best = _percent(result.get("best_top1_ratio"))
        parts.append(f"k = {result.get('reported_k')}, best {best} at k = {result['best_k']}")
    for key, name in (("protocol", "protocol"), ("recipe_name", "recipe")):
        if isinstance(result.get(key), str):
            parts.append(f"{name} {result[key]}")
    for chosen in dict.fromkeys(_chosen(run) for run in [result, *_runs(result)]):
        parts += [chosen] if chosen else []
    fraction = result.get("fraction_ratio")
    if isinstance(fraction, int | float) and fraction < 1:
        parts.append(f"{100 * fraction:g} % of the labels")
    if result.get("is_scratch"):
        parts.append("from scratch")
    if isinstance(result.get("linear_top1_ratio"), int | float):
        parts.append(f"then linear {_percent(result['linear_top1_ratio'])}")
    for key, name in (("num_bank", "bank"), ("num_queries", "queries"), ("num_test", "test images")):
        if isinstance(result.get(key), int):
            parts.append(f"{name} {result[key]}")
    if _mapping(result.get("domain")).get("is_transfer"):
        parts.append("on other data than it was pretrained with")
    return parts


def _runs(result: Result) -> list[Result]:
    runs = result.get("runs")
    return [run for run in runs if isinstance(run, Mapping)] if isinstance(runs, list) else []


def _chosen(run: Result) -> str:
    """What a sweep chose, as it names it."""
    chosen = _mapping(run.get("chosen"))
    told = [(key, value) for key, value in chosen.items() if _is_plain(value) and not key.endswith("_ratio")]
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told)


def _pretext(name: str, result: Result) -> list[Markup | None]:
    values, headlines = result["values"], result["headlines"]
    rows = []
    for task, metric in headlines.items():
        value, chance = values.get(f"{task}/{metric}"), values.get(f"{task}/chance")
        rows.append((str(task), str(metric), number(_real(value)), number(_real(chance))))
    images, shards, step = (result.get(key, "?") for key in ("num_images", "shards", "step"))
    where = f"{images} images of {shards}, step {step}"
    return [
        tag("h3", "Pretext tasks on other images"),
        how_to_read(
            f"{where}; shown without augmentation ({name}.json). Comparisons of two views say little here."
        ),
        table(("task", "metric", "value", "chance"), rows, numbers=(2, 3)),
    ]


def _unknown(result: Result) -> Markup:
    """The plain numbers and words of a result, whoever wrote it."""
    rows = [(key, value) for key, value in _flat(result) if value][:MAX_VALUES]
    return table(("value", ""), rows or [("(no plain values)", "")], numbers=(1,))


def _flat(result: Result, before: str = "", depth: int = 0) -> list[tuple[str, str]]:
    found = []
    for key, value in result.items():
        if key in _HIDDEN:
            continue
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping) and depth < 2:
            found += _flat(value, f"{before}{key} ", depth + 1)
        elif isinstance(value, float):
            found.append((name, number(value)))
        elif _is_plain(value):
            found.append((name, str(value)))
    return found


def export_section(reports: Mapping[str, Result]) -> Section:
    """reports: export_report.json by the folder it lies in."""
    head = ("folder", "format", "architecture", "weights", "read by", "tensors", "difference", "sha256")
    return section(
        "export",
        "Export",
        how_to_read(
            "The weights as others load them; an export is opened again by who is to read it and compared "
            "with the checkpoint before it is kept. ",
            tag("b", "Good"),
            ": nothing missing or unexpected, the step of the newest checkpoint, a difference below its "
            "limit.",
        ),
        table(head, [_exported(folder, report) for folder, report in reports.items()]),
    )


def _exported(folder: str, report: Result) -> tuple[str, ...]:
    counts = []
    for key in ("matched", "missing", "unexpected", "left_out"):
        held = report.get(key)
        if isinstance(held, Sequence | Mapping) and (held or key != "left_out"):
            counts.append(f"{len(held)} {key.replace('_', ' ')}")
    difference, limit = _real(report.get("max_abs_difference")), _real(report.get("tolerance"))
    return (
        folder,
        str(report.get("format", "")),
        str(report.get("architecture", "")),
        f"{report.get('source_weights', '?')}, step {report.get('source_step', '?')}",
        str(report.get("consumer", "")),
        ", ".join(counts),
        "not compared" if difference is None else f"{number(difference)} (limit {number(limit)})",
        str(report.get("model_sha256", ""))[:12],
    )


def _top1(result: object) -> float | None:
    return _real(result.get("top1_ratio")) if isinstance(result, Mapping) else None


def _real(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _percent(value: object) -> str:
    found = _real(value)
    return "\N{EN DASH}" if found is None else f"{100 * found:.1f} %"


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str) and len(str(value)) <= 80


def _mapping(value: object) -> Result:
    return value if isinstance(value, Mapping) else {}
