"""What the doctor answers, as the tests read it."""

from __future__ import annotations

import json
from typing import Any


class Answer:
    """What `pretrain doctor RUN --json` prints, and its exit code."""

    def __init__(self, code: int, printed: str) -> None:
        self.code = code
        self.whole: dict[str, Any] = json.loads(printed)
        self.verdict: str = self.whole["verdict"]
        self.findings: list[dict[str, Any]] = self.whole["findings"]

    @property
    def causes(self) -> dict[str, str]:
        """Cause -> severity."""
        return {finding["cause"]: finding["severity"] for finding in self.findings}

    def of(self, cause: str) -> str:
        """Everything that is said of one cause."""
        [found] = [finding for finding in self.findings if finding["cause"] == cause]
        return "\n".join([found["what"], *found["evidence"], found["do"], found["command"]])
