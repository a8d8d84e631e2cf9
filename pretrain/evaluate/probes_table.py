"""The result of `pretrain evaluate probes` as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.evaluate.table import aligned, percent


def format_probes(result: Mapping[str, Any]) -> str:
    """A table of the features, one of the further test sets, and the seconds."""
    features = result["features"]
    shares = result[features[0]]["linear"]
    k = result[features[0]]["knn"]["reported_k"]
    heads = [f"linear {100 * one['fraction_ratio']:g} % ({one['num_train']})" for one in shares.values()]
    rows = [("feature", f"k-NN % (k={k})", "best k-NN %", *heads)]
    for name in features:
        knn, linear = result[name]["knn"], result[name]["linear"]
        best = f"{percent(knn['best_top1_ratio'])} (k={knn['best_k']})"
        rows.append((name, percent(knn["top1_ratio"]), best, *(_cell(linear[share]) for share in shares)))
    parts = [_head(result), aligned(rows)]
    if result["also"]:
        parts.append(aligned(_also_rows(result)))
    num_images = result["num_train"] + result["num_test"]
    num_images += sum(one["num_samples"] for one in result["also"].values())
    parts.append(
        f"{num_images} images encoded in {result['extract_seconds']:.1f} s, read out in "
        f"{result['classify_seconds']:.1f} s (k-NN {result['knn_seconds']:.1f} s, linear "
        f"{result['linear_seconds']:.1f} s)"
    )
    return "\n\n".join(parts)


def _head(result: Mapping[str, Any]) -> str:
    counts = [
        f"{result[f'num_{role}']} {role} images"
        + (f" of {result[role]['num_samples']}" if result[f"is_part_of_{role}"] else "")
        for role in ("train", "test")
    ]
    num_seeds = len(result["seeds"])
    seeds = [f"+- deviation of {num_seeds} seeds"] if num_seeds > 1 else []
    of = f"{result['encoder']['weights']}, protocol {result['protocol']}"
    return "; ".join([of, ", ".join(counts), *seeds])


def _also_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            "also tested",
            "images",
            "feature",
            "read-out",
            "top-1 %",
            "same images in both",
            "here %",
            "there %",
            "agree %",
        )
    ]
    for name, one in result["also"].items():
        for feature in result["features"]:
            for read_out in ("knn", "linear"):
                found = one[feature][read_out]
                paired = (
                    percent(found[key])
                    for key in ("own_same_keys_top1_ratio", "same_keys_top1_ratio", "agreement_ratio")
                )
                told = (name, str(found["num_test"]), feature, read_out, _cell(found))
                rows.append((*told, str(found["num_same_keys"]), *paired))
    return rows


def _cell(accuracy: Mapping[str, Any]) -> str:
    std = accuracy["top1_ratio_std"]
    return percent(accuracy["top1_ratio"]) + ("" if std is None else f" +- {percent(std)}")
