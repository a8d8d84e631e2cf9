"""Tables of evaluations that are more than one accuracy: few labels, detection, segmentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pretrain.report.chart import ABSENT
from pretrain.report.markup import Markup
from pretrain.report.page import table

Result = Mapping[str, Any]
Row = tuple[str, ...]
AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MEANS = ("miou", "macc", "pixel_accuracy")
MAX_CLASSES = 40  # of a segmentation that are listed


def special_table(result: Result) -> Markup | None:
    """None where the kind of result is not known here, or its numbers are not where they should be."""
    made: dict[str, Callable[[Result], Markup]] = {
        "fewshot": _fewshot,
        "detection": _detection,
        "segmentation": _segmentation,
    }
    make = made.get(str(result.get("method")))
    if make is None:
        return None
    try:
        return make(result)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # of another version; its plain values are shown


def _fewshot(result: Result) -> Markup:
    rows: list[Row] = []
    for row in result["rows"].values():
        share = f"{100 * float(row['fraction_ratio']):g} %"
        rows.append((share, str(row["num_train"]), _accuracy(row["finetuned"]), _accuracy(row["linear"])))
    head = ("labels", "images", "fine-tuned", "then linear with all labels")
    return table(head, rows, numbers=(1, 2, 3))


def _accuracy(found: Result | None) -> str:
    if found is None:
        return ABSENT
    spread = found.get("top1_ratio_std")
    told = f" \N{PLUS-MINUS SIGN} {100 * float(spread):.1f}" if isinstance(spread, int | float) else ""
    return f"{100 * float(found['top1_ratio']):.1f} %{told}"


def _detection(result: Result) -> Markup:
    """In percent, as COCO's scores are told."""
    names = {"bbox": "boxes", "segm": "masks"}
    rows: list[Row] = []
    for kind, scores in result["scores"].items():
        of_kind = [(f"after {result['step']} steps", scores)]
        if result.get("initial"):
            of_kind.append(("before training", result["initial"][kind]))
        of_kind += [
            (f"one box: {name.replace('_', ' ')}", found[kind]) for name, found in result["baselines"].items()
        ]
        for words, found in of_kind:
            rows.append((names.get(kind, kind), words, *(_score(found[column]) for column in AP_COLUMNS)))
    return table(("of", "detector", *AP_COLUMNS), rows, numbers=range(2, 8))


def _score(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def _segmentation(result: Result) -> Markup:
    rows: list[Row] = [("all classes", "trained", *_means(result))]
    for name, found in result["baselines"].items():
        words = f"always '{found['class']}'" if name == "majority" else "before the first step"
        rows.append(("all classes", words, *_means(found)))
    for row in result["classes"][:MAX_CLASSES]:
        rows.append((str(row["name"]), "trained", _ratio(row["iou"]), _ratio(row["accuracy"]), ""))
    return table(("class", "segmenter", "IoU", "accuracy", "pixel accuracy"), rows, numbers=(2, 3, 4))


def _means(found: Result) -> Row:
    return tuple(_ratio(found[key]) for key in MEANS)


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * float(value):.1f} %"
