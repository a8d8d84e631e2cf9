"""Files of torch.save with nothing but tensors in them, for consumers that read no safetensors.

The only place of the package that calls torch.load, always with `weights_only=True`: nothing in the file is
run, and only files that this process has just written are opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_tensors(content: dict[str, Any], path: Path) -> None:
    """content: names -> tensors, or one more level of such dictionaries."""
    torch.save(_compact(content), path)


def load_tensors(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _compact(content: Any) -> Any:
    """Tensors of their own storage: a view would be saved with all of the tensor that it looks at."""
    if isinstance(content, dict):
        return {name: _compact(value) for name, value in content.items()}
    return content.detach().clone().contiguous()
