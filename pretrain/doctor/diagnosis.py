"""Every check over one run folder, and the verdict in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pretrain.doctor import ending, features, keeping, learning, pace, reading, restarts, series
from pretrain.doctor.finding import Finding, Severity, most_severe_first
from pretrain.doctor.run_files import RunFiles
from pretrain.doctor.thresholds import MIN_TIMED_STEPS

Check = Callable[[RunFiles], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (
    ending.check_failure,
    ending.check_hang,
    ending.check_killed,
    ending.check_preempted,
    restarts.check_restarts,
    features.check_collapse,
    learning.check_diverging,
    learning.check_not_finite,
    learning.check_spikes,
    learning.check_dead_tasks,
    learning.check_weights,
    learning.check_conflict,
    learning.check_learning_rate,
    keeping.check_damage,
    keeping.check_failures,
    keeping.check_age,
    keeping.check_disk,
    keeping.check_mirror,
    keeping.check_export,
    keeping.check_logs,
    reading.check_data_bound,
    reading.check_bad_samples,
    reading.check_retries,
    pace.check_straggler,
    pace.check_slowing,
    pace.check_memory,
    restarts.check_changes,
)


@dataclass(frozen=True)
class Diagnosis:
    """verdict: one line. looked_at: what it rests on, one line."""

    verdict: str
    state: str
    step: int
    num_steps: int | None
    findings: tuple[Finding, ...]
    looked_at: str

    @property
    def is_healthy(self) -> bool:
        return not (self.num_of("error") or self.num_of("warning"))

    def num_of(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `findings` stand as they are printed, most severe first."""
        return {
            "verdict": self.verdict,
            "healthy": self.is_healthy,
            "state": self.state,
            "step": self.step,
            "num_steps": self.num_steps,
            "findings": [vars(finding) for finding in self.findings],
            "looked_at": self.looked_at,
        }


def diagnose(files: RunFiles) -> Diagnosis:
    found = tuple(most_severe_first(finding for check in CHECKS for finding in check(files)))
    return Diagnosis(
        _verdict(files, found), files.state, files.step, files.num_steps, found, _looked_at(files)
    )


def _verdict(files: RunFiles, findings: tuple[Finding, ...]) -> str:
    """'running, healthy: step 1200 of 5000, ...', 'failed: out of memory (step 4 of 12)'"""
    bad = [finding for finding in findings if finding.severity != "note"]
    at = f"step {files.step}" + (f" of {files.num_steps}" if files.num_steps else "")
    if files.state in ("failed", "killed", "silent"):
        return f"{_ENDED[files.state]}: {bad[0].cause if bad else 'the reason is not known'} ({at})"
    if not bad:
        return f"{_WELL[files.state]}{at}{_pace(files)}{_short(files)}"
    return f"{_SICK[files.state]}: {', '.join(_counted(findings))} ({at}{_pace(files)})"


_ENDED = {"failed": "failed", "killed": "failed", "silent": "not running"}
_WELL = {
    "running": "running, healthy: ",
    "done": "healthy: finished, ",
    "preempted": "healthy: stopped on request, saved and resumable at ",
    "unknown": "healthy, as far as can be told: ",
}
_SICK = {
    "running": "running, not well",
    "done": "finished, not well",
    "preempted": "stopped on request, not well",
    "unknown": "not well",
}


def _counted(findings: tuple[Finding, ...]) -> list[str]:
    """The causes, worst first."""
    causes = [finding.cause for finding in findings if finding.severity != "note"]
    return causes if len(causes) <= 3 else [*causes[:3], f"{len(causes) - 3} more"]


def _pace(files: RunFiles) -> str:
    """Speed and time left of a run that is under way."""
    recent = series.recent(files)
    seconds, rate = series.mean(recent, "step_seconds"), series.mean(recent, "images_per_second")
    if files.state != "running" or not seconds or not rate or not files.num_steps:
        return ""
    left = (files.num_steps - files.step) * seconds
    return (
        f", {rate:.0f} images/s, {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d} left"
    )


def _short(files: RunFiles) -> str:
    """What a run of few steps cannot tell."""
    if files.state == "running" and not files.records:
        return "; too early to tell, no step is logged yet"
    if series.steps_in(files.records) < MIN_TIMED_STEPS:
        return "; too early to tell how fast and how well it learns"
    return ""


def _looked_at(files: RunFiles) -> str:
    stored = files.checkpoints
    hashed = sum(checkpoint.hashed for checkpoint in stored)
    parts = [
        f"{len(files.records)} metric lines",
        f"{len(files.whole_log)} log lines",
        f"{len(files.starts)} start{'s' * (len(files.starts) != 1)}",
        f"{len(stored)} checkpoint{'s' * (len(stored) != 1)}"
        + (f" (checksums of {hashed}; of all with --verify)" if hashed < len(stored) else ""),
    ]
    return ", ".join(parts)
