"""What evaluations have found out about exactly these weights, as the model card tells it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One accuracy of an evaluation."""

    method: str
    feature: str
    data: str  # the test set, such as "cifar10 (test)"
    top1_ratio: float
    num_samples: int


def results_of(folders: Collection[Path], sha256s: Collection[str]) -> list[Result]:
    """Results in the `eval` folders of a run and of its export that were measured on weights with these sums.

    What is not a result, or one of other weights, is passed over.
    """
    found: dict[Result, None] = {}
    for folder in folders:
        for file in sorted((folder / "eval").rglob("*.json")):
            try:
                content = json.loads(file.read_text())
            except (OSError, ValueError):
                continue
            for record in _records(content):
                result = _result(record, sha256s)
                if result is not None:
                    found[result] = None
    return list(found)


def _records(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a JSON value, however deep."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _records(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _records(inner)


def _result(record: dict[str, Any], sha256s: Collection[str]) -> Result | None:
    encoder, test = record.get("encoder"), record.get("test")
    if not isinstance(encoder, dict) or not isinstance(test, dict) or encoder.get("sha256") not in sha256s:
        return None
    try:
        return Result(
            method=str(record["method"]),
            feature=str(encoder["feature"]),
            data=f"{Path(test['folder']).name} ({test['split']})",
            top1_ratio=float(record["top1_ratio"]),
            num_samples=int(test["num_samples"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
