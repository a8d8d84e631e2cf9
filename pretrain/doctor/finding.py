"""What a check has found: how bad, what, by which numbers, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    cause: a few words that name it, always the same ones. evidence: numbers and lines of the run's own files.
    do: the remedy, with the settings to use.
    """

    severity: Severity
    cause: str
    what: str
    evidence: tuple[str, ...] = ()
    do: str = ""
    command: str = ""  # to be copied whole, after what `do` says


def most_severe_first(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each cause: the most severe, or the first of equals, with the evidence of them all."""
    joined: dict[str, Finding] = {}
    for finding in sorted(findings, key=lambda found: SEVERITIES.index(found.severity)):
        first = joined.get(finding.cause)
        if first is None:
            joined[finding.cause] = finding
            continue
        more = tuple(line for line in (finding.what, *finding.evidence) if line not in first.evidence)
        joined[finding.cause] = replace(first, evidence=(*first.evidence, *more))
    return list(joined.values())
