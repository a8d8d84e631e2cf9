"""Pretrained weights in detectors and segmenters: ours, or anyone's through `backbone`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.transfer.hooks import backbone

__all__ = ["backbone"]


def __getattr__(name: str) -> Any:
    """torch and timm are imported when the function is asked for, not with the package."""
    if name != "backbone":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from pretrain.transfer.hooks import backbone

    return backbone
