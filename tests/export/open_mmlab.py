"""OpenMMLab's libraries beside a newer torch, where a developer has put them on PYTHONPATH.

Their backbones run as they are. mmcv-lite lacks the compiled operators, which other parts of them import by
name, and mmpretrain's language models derive from classes that transformers 5 has no more; backbones use
neither.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from pretrain.export.quiet import quiet


def fill_gaps() -> None:
    """Before anything imports them: mmcv tries once for its operators and remembers."""
    if find_spec("mmcv") is None:
        return
    with quiet():
        if "mmcv._ext" not in sys.modules and find_spec("mmcv._ext") is None:
            operators = ModuleType("mmcv._ext")
            operators.__getattr__ = _absent_operator  # type: ignore[method-assign]
            sys.modules["mmcv._ext"] = operators
    sys.modules.setdefault("mmpretrain.models.multimodal", ModuleType("mmpretrain.models.multimodal"))


def require(library: str) -> None:
    """Skip the test where the library is absent; one that is there has to work."""
    if find_spec(library) is None or find_spec("mmcv") is None:
        pytest.skip(f"{library} is not installed")


def _absent_operator(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def operator(*_arguments: Any) -> None:
        raise RuntimeError(f"mmcv-lite has no {name}")

    return operator
