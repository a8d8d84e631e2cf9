"""What an export tells about itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pretrain.export.results import Result
from pretrain.export.source import WeightsName

REPORT = "export_report.json"
CARD = "README.md"


@dataclass(frozen=True)
class ExportReport:
    """What was exported, from where, and how it was proved; also written as export_report.json."""

    folder: str
    format: str
    architecture: str
    source_checkpoint: str
    source_weights: WeightsName
    source_step: int
    source_sha256: str
    options: dict[str, Any]  # what was asked for
    changes: list[dict[str, Any]]  # in what the model is not the run's
    files: dict[str, str]  # name -> sha256, of all but this report
    model_sha256: str  # of the largest of them, which holds the weights
    num_parameters: int
    registers: tuple[str, ...]
    consumer: str  # whose reading is proved
    matched: tuple[str, ...]
    missing: tuple[str, ...]  # empty in a report: a missing or unexpected key fails the export
    unexpected: tuple[str, ...]
    left_out: dict[str, str]  # tensors that the format has no place for -> why
    max_abs_difference: float | None  # None, like the next two: the consumer is not installed here
    feature_scale: float | None
    tolerance: float | None
    note: str
    results: list[Result]  # of evaluations of these weights that were there
    versions: dict[str, str]

    @property
    def num_tensors(self) -> int:
        return len(self.matched) + len(self.left_out)

    @property
    def mapping(self) -> str:
        """Matched, missing and unexpected, in a few words."""
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        return (
            f"{len(self.matched)} of {self.num_tensors} tensors matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected{left_out}"
        )

    @property
    def agreement(self) -> str:
        if self.max_abs_difference is None or self.tolerance is None:
            return "features not compared"
        return f"features within {self.max_abs_difference:.2g} (limit {self.tolerance:.2g})"

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.architecture}, {self.source_weights} of step {self.source_step}; "
            f"{self.consumer}: {self.mapping}; {self.agreement}"
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def left_out_of(reasons: dict[str, str]) -> str:
    """`a, b (why); c (why)`"""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(group)} ({why})" for why, group in names.items())


def read_report(folder: Path) -> dict[str, Any] | None:
    """What the report of an exported folder says; None where there is none of ours."""
    try:
        record = json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(record, dict) and {"format", "source_sha256", "model_sha256"} <= record.keys()
    return record if is_ours else None


def full_report(record: dict[str, Any]) -> ExportReport | None:
    """None for the report of another version."""
    try:
        return _REPORT.validate_python(record, strict=False)
    except ValidationError:
        return None


_REPORT = TypeAdapter(ExportReport)
