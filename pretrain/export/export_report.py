"""What an export tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.export.source import WeightsName


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
    model_sha256: str  # of model.safetensors
    num_parameters: int
    registers: tuple[str, ...]
    matched: tuple[str, ...]
    missing: tuple[str, ...]  # empty in a report: a missing or unexpected key fails the export
    unexpected: tuple[str, ...]
    max_abs_difference: float
    feature_scale: float
    tolerance: float
    versions: dict[str, str]

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.architecture}, {self.source_weights} of step {self.source_step}; timm "
            f"loads {len(self.matched)} of {len(self.matched)} tensors, features within "
            f"{self.max_abs_difference:.2g} (limit {self.tolerance:.2g})"
        )
