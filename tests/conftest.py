"""Settings of every test and of the processes that it starts."""

from __future__ import annotations

import os

# tiny models gain nothing from a second thread, and lose much where several processes share few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
