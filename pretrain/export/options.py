"""What a user may ask of an export, besides its format and its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pretrain.export.source import WeightsName

Pooling = Literal["token", "avg"]
POOLINGS: tuple[Pooling, ...] = ("token", "avg")  # no "map": it has weights that no run trains


@dataclass(frozen=True)
class ExportOptions:
    """Two exports of the same weights with equal options are the same export."""

    weights: WeightsName | None = None  # None: the teacher where the run has one
    img_px: int | None = None  # another side of the image than the run's
    grid: tuple[int, int] | None = None  # the same as rows and columns of patch tokens
    global_pool: Pooling | None = None  # None: class token where there is one, else mean of the patch tokens
    drop_registers: bool = False
    license: str = "other"  # identifier for the model card
    tag: str | None = None  # timm's name for the weights; None: <tasks>_<data>

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> ExportOptions:
        """What was asked for when an export was made; the defaults where its report does not tell."""
        try:
            values = dict(report["options"])
            return cls(**{**values, "grid": tuple(values["grid"]) if values["grid"] else None})
        except (KeyError, TypeError, ValueError):
            return cls()

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "grid": list(self.grid) if self.grid else None}
