"""The manners of the command line: whole flags, errors in one line, overrides between the flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from pretrain.errors import EXIT_USER_ERROR


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and tells an error in one line."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {message}; `{self.prog} --help` lists what it takes\n")

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The arguments, or exit code 2 and one line on stderr. `overrides` may stand between the flags."""
        parsed, rest = self.parse_known_args(arguments)
        if rest:
            if not hasattr(parsed, "overrides") or any(argument.startswith("-") for argument in rest):
                self.error(f"unknown arguments: {' '.join(rest)}")
            parsed.overrides += rest
        return parsed
