"""What every benchmark's result says of how and where it was measured."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def tell(measured: Mapping[str, Any], out: Path | None) -> None:
    """Print the result as JSON, and write it to a file if one is wanted."""
    result = {
        "command": " ".join(["python", *sys.argv]),
        **measured,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
