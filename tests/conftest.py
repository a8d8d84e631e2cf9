"""Settings of every test and of the processes that it starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# tiny models gain nothing from a second thread, and lose much where several processes share few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch's compiler would start as many processes as there are cores beside those of the tests
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """The command line sets up the package's logger, and some tests listen to it."""
    logger = logging.getLogger("pretrain")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before
