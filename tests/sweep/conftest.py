"""Lets these tests write scenes with the writer of tests/transfer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_study import calls

from pretrain.sweep import runs

__all__ = ["calls"]

sys.path.insert(0, str(Path(__file__).parents[1] / "transfer"))


@pytest.fixture(autouse=True)
def any_shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of the small study are only named, except where a test asks for `real_shards`."""
    if "real_shards" not in request.keywords and request.module.__name__ != "test_real_sweep":
        monkeypatch.setattr(runs, "find_split", lambda where, role: None)
