"""Tables that carry timm's names of tensors over to another library's.

In a pattern `N` stands for a number and `*`, at its end, for what follows (`weight`, `bias`); a target
repeats them in the same order. A table whose target is a triple cuts the tensor into three equal parts: the
fused query, key and value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from pretrain.export.parity import ParityError

Table: TypeAlias = Mapping[str, str | tuple[str, str, str]]


def rename(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Every tensor under its new name; one that no pattern knows, or two for one name, fail the export."""
    compiled = [(re.compile(_expression(pattern)), targets) for pattern, targets in table.items()]
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        matches = [(match, targets) for known, targets in compiled if (match := known.fullmatch(name))]
        if len(matches) != 1:
            raise ParityError(f"'{name}' has {len(matches)} places in the other format, not one")
        match, targets = matches[0]
        parts = (tensor,) if isinstance(targets, str) else tensor.chunk(3, dim=0)
        for target, part in zip((targets,) if isinstance(targets, str) else targets, parts, strict=True):
            new = _fill(target, match.groups())
            if new in renamed:
                raise ParityError(f"two tensors would be '{new}'; the second is '{name}'")
            renamed[new] = part
    return renamed


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace("N", r"(\d+)").replace(r"\*", r"(.+)")


def _fill(target: str, groups: tuple[str, ...]) -> str:
    for group in groups:
        target = re.sub(r"[N*]", group, target, count=1)
    return target
