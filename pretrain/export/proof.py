"""The proof of one format: what its consumer's own library made of the files that were written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """Which tensors the consumer found, and how far its features are from the reference's.

    A missing or unexpected tensor fails the export, so both are empty in a proof that is handed out.
    """

    format: str
    consumer: str  # whose reading this is, such as "transformers 5.23.0 ViTModel"
    files: tuple[str, ...]  # names inside the folder
    matched: tuple[str, ...]  # our backbone's tensors that the consumer holds, by timm's names
    missing: tuple[str, ...]  # tensors that the consumer wants and the files lack, by its names
    unexpected: tuple[str, ...]  # tensors of the files that the consumer does not know, by its names
    left_out: dict[str, str]  # our tensors that the format has no place for -> why
    max_abs_difference: float | None  # None, like the next two, where the consumer is not installed here
    feature_scale: float | None  # largest absolute feature of the reference
    tolerance: float | None  # allowed max_abs_difference
    note: str  # one line for users: what to mind on loading, and what was not proved
