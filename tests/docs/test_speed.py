"""The page about speed holds the table that the code gives."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "speed.md"


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "make_speed.py"))


def test_the_table_of_scaling_is_what_the_code_gives(program: dict[str, Any]) -> None:
    text = PAGE.read_text()
    written = program["page"](text, program["results_at"](program["RESULTS"]))
    assert written == text, "run python docs/make_speed.py"


def test_without_results_the_table_says_that_nothing_was_measured(program: dict[str, Any]) -> None:
    table = program["table"](None)
    assert table.startswith("**Prediction**")
    assert "Nothing in it was measured" in table
    standings = re.findall(r"\| (\*\*assumed\*\*|measured): ", table)
    assert standings
    assert set(standings) == {"**assumed**"}
    assert "| 1024 | " in table
