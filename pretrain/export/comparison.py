"""Whether a consumer's network gives our features, for the proofs of the formats."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.export.parity import RELATIVE_TOLERANCE, ParityError
from pretrain.export.proof import Proof


@dataclass(frozen=True)
class Difference:
    """How far apart two networks are, over all features that were compared."""

    max_abs: float
    scale: float  # largest absolute feature of the reference
    tolerance: float  # allowed max_abs


def seeded_images(height_px: int, width_px: int, num_images: int = 2) -> Tensor:
    """Normalised images, the same on every call: float32 (B, 3, H, W)"""
    return torch.randn(num_images, 3, height_px, width_px, generator=torch.Generator().manual_seed(0))


def compare(
    consumer: str,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    relative: float = RELATIVE_TOLERANCE,
) -> Difference:
    """The difference between features of one name; more than the tolerance raises `ParityError`.

    relative: tolerance as a share of the largest feature, or of 1 where all features are smaller.
    """
    assert expected.keys() == found.keys()
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    tolerance = relative * max(1.0, scale)
    worst = 0.0
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape or not torch.isfinite(other).all():
            raise ParityError(
                f"{consumer}: {name} is {tuple(other.shape)} or not finite, not {tuple(tensor.shape)}"
            )
        difference = (tensor - other).abs().max().item()
        if difference > tolerance:
            raise ParityError(f"{consumer}: {name} differs by {difference:.3g}, more than {tolerance:.3g}")
        worst = max(worst, difference)
    return Difference(worst, scale, tolerance)


def refuse_strangers(consumer: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """A consumer that lacks a tensor, or was handed one that it does not know, has not been served."""
    if missing or unexpected:
        raise ParityError(
            f"{consumer}: {len(missing)} tensors are missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)})"
        )


def refuse_changes(consumer: str, written: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Names, shapes and values of what a consumer holds must be those of the file."""
    refuse_strangers(consumer, loaded.keys() - written.keys(), written.keys() - loaded.keys())
    changed = sorted(name for name, tensor in written.items() if not torch.equal(loaded[name], tensor))
    if changed:
        raise ParityError(f"{consumer} altered or skipped {len(changed)} tensors, such as '{changed[0]}'")


def conclude(
    format: str,
    consumer: str,
    files: Iterable[str],
    ours: Collection[str],
    difference: Difference | None,
    note: str,
    left_out: Mapping[str, str] | None = None,
) -> Proof:
    """The proof of a format whose comparison has passed, or is None where the consumer could not be asked.

    ours: names of all tensors of the backbone; left_out: those without a place, and why.
    """
    left_out = dict(left_out or {})
    return Proof(
        format=format,
        consumer=consumer if difference else f"{consumer} (not asked)",
        files=tuple(files),
        matched=tuple(sorted(set(ours) - left_out.keys())),
        missing=(),
        unexpected=(),
        left_out=left_out,
        max_abs_difference=difference.max_abs if difference else None,
        feature_scale=difference.scale if difference else None,
        tolerance=difference.tolerance if difference else None,
        note=note,
    )


def _some(names: Collection[str], limit: int = 5) -> str:
    return ", ".join(sorted(names)[:limit]) or "none"
