"""A diagnosis as text for people, and as JSON for programs."""

from __future__ import annotations

import json
import shlex
import textwrap

from pretrain.doctor.diagnosis import Diagnosis
from pretrain.doctor.finding import Finding

WIDTH = 100
INDENT = "    "


def as_text(diagnosis: Diagnosis) -> str:
    """The verdict, then each finding, most severe first; no line is longer than WIDTH unless a word is."""
    blocks = [_wrapped(diagnosis.verdict), *(_told(finding) for finding in diagnosis.findings)]
    return "\n\n".join([*blocks, _wrapped(f"looked at: {diagnosis.looked_at}")])


def as_json(diagnosis: Diagnosis) -> str:
    return json.dumps(diagnosis.as_dict(), indent=1)


def _told(finding: Finding) -> str:
    lines = [f"{finding.severity}: {finding.cause}", _wrapped(finding.what, INDENT)]
    lines += [_wrapped(line, f"{INDENT}- ", f"{INDENT}  ") for line in finding.evidence]
    if finding.do:
        lines.append(_wrapped(f"do: {finding.do}", INDENT, f"{INDENT}    "))
    if finding.command:
        lines.append(_copyable(finding.command))
    return "\n".join(lines)


def _copyable(command: str) -> str:
    """A command over several lines, as a shell takes it: broken between its words only."""
    lines = [INDENT + "   "]
    for word in map(shlex.quote, shlex.split(_printable(command))):
        if len(lines[-1]) + len(word) + 1 > WIDTH - 2:
            lines.append(INDENT + "     ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _wrapped(text: str, first: str = "", rest: str | None = None) -> str:
    return textwrap.fill(
        _printable(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_long_words=False,  # a path or a setting is to be copied whole
        break_on_hyphens=False,
    )


def _printable(text: str) -> str:
    """Names in shards and in other people's error messages may hold anything."""
    return "".join(c if c.isprintable() else " " for c in text)
