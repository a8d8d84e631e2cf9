"""All starts of a run together: how many, whether they came further, and what was changed between them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pretrain.doctor import series
from pretrain.doctor import thresholds as limit
from pretrain.doctor.finding import Finding
from pretrain.doctor.remedy import resume_command
from pretrain.doctor.run_files import RunFiles, Start
from pretrain.doctor.series import told_span


def check_restarts(files: RunFiles) -> Iterator[Finding]:
    """Starts in a row without progress, and how often there was one."""
    idle = _idle_starts(files)
    most = int(files.setting("guard.max_idle_attempts", 3))
    if len(idle) >= 2:
        saved = files.checkpoints[0].step if files.checkpoints else 0
        yield Finding(
            "error" if most and len(idle) >= most else "warning",
            "no progress",
            f"The last {len(idle)} starts wrote no checkpoint beyond step {saved}: the run goes in circles.",
            (
                *(f"start {start.number}: {_ended(start, files)}" for start in idle),
                f"guard.max_idle_attempts={most} such starts in a row are allowed (0: any number)",
            ),
            "mend what ends it at the same place each time (the end of train.log, the output of the job), or "
            "save earlier with a smaller checkpoint.every_steps; then allow it once more:",
            resume_command(files, f"guard.max_idle_attempts={len(idle) + 1}"),
        )
    goodput = series.last(files.records, "goodput_ratio")
    seconds = _since_first(files)
    if goodput is not None and goodput < limit.MIN_GOODPUT_RATIO and seconds > limit.MIN_GOODPUT_SECONDS:
        yield Finding(
            "warning",
            "low goodput",
            f"Of all time since the run first began, {goodput:.0%} went into steps that count.",
            (f"{len(files.starts)} starts in {told_span(seconds)}", *_taken_again(files)),
            "restarts, waiting in a queue and steps taken again cost the rest: save more often, with a "
            "smaller checkpoint.every_steps, and ask for longer jobs",
        )
    elif len(files.starts) > 1:
        yield Finding(
            "note",
            "restarts",
            f"The run was started {len(files.starts)} times.",
            (
                *(f"start {start.number}: {_ended(start, files)}" for start in files.starts[-6:]),
                *_taken_again(files),
            ),
        )


def check_changes(files: RunFiles) -> Iterator[Finding]:
    marker = "changed since then: "
    changed = [line.removeprefix(marker) for line in files.whole_log if line.startswith(marker)]
    if changed:
        yield Finding(
            "note",
            "settings changed",
            "Settings were changed between starts; numbers before and after may not compare.",
            tuple(dict.fromkeys(changed)),
        )


def _idle_starts(files: RunFiles) -> list[Start]:
    """Those in a row, up to the newest that is over, that wrote no checkpoint beyond where they began."""
    saved = files.checkpoints[0].step if files.checkpoints else 0
    idle: list[Start] = []
    for start in reversed(files.starts):
        record = start.record
        if record is None or (files.state == "running" and start is files.newest):
            continue
        if record.outcome in ("done", "preempted") or (record.began_from and record.began_from.step < saved):
            break
        idle.insert(0, start)
    return idle


def _ended(start: Start, files: RunFiles) -> str:
    record = start.record
    if record is None:
        return "its file is damaged"
    began = f"from step {record.began_from.step}" if record.began_from else "over before it began"
    if record.outcome is None:
        lives = start is files.newest and files.state in ("running", "silent")
        return f"{began}, {files.state if lives else 'killed'}"
    return f"{began}, {record.outcome}" + (f" at step {record.step}" if record.outcome != "failed" else "")


def _taken_again(files: RunFiles) -> tuple[str, ...]:
    found = [
        re.fullmatch(r"(\d+) steps beyond the checkpoint are taken again", line) for line in files.whole_log
    ]
    num = sum(int(match[1]) for match in found if match)
    return (f"{num} steps were taken again after them",) if num else ()


def _since_first(files: RunFiles) -> float:
    times, began = series.values(files.records, "unix_time"), series.values(files.records, "began_unix_time")
    return max(0.0, times[-1] - [*began[-1:], times[0]][0]) if times else 0.0
