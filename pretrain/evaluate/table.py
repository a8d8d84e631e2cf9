"""Results as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pretrain.evaluate import domain


def table(results: Iterable[dict[str, Any]]) -> str:
    """One evaluation a line; accuracies in percent."""
    rows = [("weights", "feature", "method", "top-1 %", "")]
    for result in results:
        encoder = result["encoder"]
        rows.append(
            (
                encoder["weights"],
                encoder["feature"],
                f"finetune {result['recipe_name']}" if result["method"] == "finetune" else result["method"],
                f"{100 * result['top1_ratio']:.2f}",
                _detail(result),
            )
        )
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.2f}"


def _detail(result: dict[str, Any]) -> str:
    low, high = result["top1_ratio_95"]
    parts = [f"95 % {percent(low)} to {percent(high)}"]
    if result.get("top1_ratio_std") is not None:
        parts = [f"+- {percent(result['top1_ratio_std'])} of {len(result['seeds'])} seeds", *parts]
    parts += _DETAILS[result["method"]](result)
    transfer = domain.told(result["domain"]) if "domain" in result else None
    return "; ".join([*parts, transfer] if transfer else parts)


def _knn_details(result: dict[str, Any]) -> list[str]:
    best = f"best {percent(result['best_top1_ratio'])} at k={result['best_k']}"
    bank = [] if result["bank_precision"] == "float32" else [f"bank in {result['bank_precision']}"]
    return [f"k={result['reported_k']}", best, *bank]


def _linear_details(result: dict[str, Any]) -> list[str]:
    """What was chosen, which may differ from seed to seed."""
    chosen = [run["chosen"] for run in result["runs"]]
    base_lr = result["runs"][0]["config"]["base_lr"]
    rates = sorted({base_lr * one["lr_factor"] for one in chosen})
    norms = {"on" if run["batch_norm"] else "off" for run in result["runs"]}
    optimizer = result["runs"][0]["config"]["optimizer"]
    parts = [
        f"protocol {result['protocol']}: {optimizer}",
        f"lr {' or '.join(f'{rate:g}' for rate in rates)} per 256 images",
        f"batch norm {' or '.join(sorted(norms))}",
        "augmented" if not result["augmentation"].startswith("none") else "cached features",
    ]
    features = sorted({one["feature"] for one in chosen} - {result["encoder"]["feature"]})
    return parts + [f"best with {feature}" for feature in features]


def _finetune_details(result: dict[str, Any]) -> list[str]:
    """The best epoch; what was unusual."""
    best = f"best {percent(result['best_top1_ratio'])}"
    if len(result["runs"]) == 1:
        best += f" at epoch {result['runs'][0]['best_epoch']}"
    parts = [best]
    if result["fraction_ratio"] < 1:
        parts.append(f"{100 * result['fraction_ratio']:g} % of the labels")
    if result["is_scratch"]:
        parts.append("from scratch")
    if result["linear_top1_ratio"] is not None:
        parts.append(f"then linear {percent(result['linear_top1_ratio'])}")
    return parts


def _head_details(result: dict[str, Any]) -> list[str]:
    return ["trained with the pretext tasks"]


_DETAILS = {
    "knn": _knn_details,
    "linear": _linear_details,
    "finetune": _finetune_details,
    "head": _head_details,
}
