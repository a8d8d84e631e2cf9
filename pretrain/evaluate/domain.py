"""Whether an evaluation is on the data of the pretraining or on others: what the weights were made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pretrain.evaluate.shards import LabelledSplit

Normalization = Literal["of the weights", "of the data", "given"]


def domain_of(
    pretrained_on: Mapping[str, Any] | None, train: LabelledSplit, normalization: Normalization
) -> dict[str, Any]:
    """For a result. `is_transfer` is None where nobody wrote down what the weights were pretrained on."""
    return {
        "pretrained_on": list(pretrained_on["shards"]) if pretrained_on else None,
        "evaluated_on": str(train.manifest.folder),
        "is_transfer": _is_transfer(pretrained_on, train),
        "normalization": normalization,
    }


def _is_transfer(pretrained_on: Mapping[str, Any] | None, train: LabelledSplit) -> bool | None:
    if pretrained_on is None:
        return None
    if pretrained_on["manifest_hashes"]:
        return train.manifest.hash not in pretrained_on["manifest_hashes"]
    return _name(str(train.manifest.folder)) not in map(_name, pretrained_on["shards"])


def _name(folder: str) -> str:
    """Also of a folder that is known by a relative path here and by another one there."""
    return Path(folder.rstrip("/")).name


def told(domain: Mapping[str, Any]) -> str | None:
    """A few words for a table; None where the data are those of the pretraining."""
    if not domain["is_transfer"]:
        return None
    source = " and ".join(map(_name, domain["pretrained_on"]))
    return (
        f"transfer from {source} to {_name(domain['evaluated_on'])}, normalisation {domain['normalization']}"
    )
