"""`python benchmarks/gpu`, whether `pretrain` is installed or only lies beside."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[0] = str(BENCHMARKS)  # this folder is a package there
sys.path.insert(1, str(BENCHMARKS.parent))

from gpu.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
