"""What the run keeps: checkpoints, their mirror, the export, the logs, and room on the disk."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from pretrain.doctor import series
from pretrain.doctor import thresholds as limit
from pretrain.doctor.finding import Finding
from pretrain.doctor.remedy import go_on, resume_command
from pretrain.doctor.run_files import CONFIG, LOG, METRICS, RunFiles

_NOT_WRITTEN = re.compile(r"the checkpoint of step (\d+) was not written to .*?: (.*?); ")
_WRITTEN = re.compile(r"checkpoint of step (\d+) written in ")
_MIRROR_BEHIND = re.compile(r"the mirror (\S+) is not up to date: (.*?);|(\S+) was not copied to (\S+): (.*)")
_MIRRORED = re.compile(r"checkpoint of step \d+ on the mirror in ")


def check_damage(files: RunFiles) -> Iterator[Finding]:
    """Checkpoints that are not whole."""
    damaged = [stored for stored in files.checkpoints if stored.problems]
    if not damaged:
        return
    whole = next((stored for stored in files.checkpoints if not stored.problems), None)
    evidence = tuple(f"{stored.name}: {'; '.join(stored.problems)}" for stored in damaged[:4])
    newest = damaged[0] is files.checkpoints[0]
    mirror = files.setting("checkpoint.mirror")
    if whole is None:
        back = (
            f"they may be whole on the mirror {mirror}, which `--resume auto` asks"
            if mirror
            else "bring one back"
        )
        yield Finding(
            "error",
            "damaged checkpoint",
            "No checkpoint of the run is whole: it cannot go on.",
            evidence,
            f"test the disk; {back}, or begin anew in another --output-dir",
        )
    elif newest:
        yield Finding(
            "error",
            "damaged checkpoint",
            f"The newest checkpoint is damaged; the run would go on from step {whole.step} in place of "
            f"{damaged[0].step}.",
            evidence,
            f"test the disk that holds {files.run}; nothing else is needed, a resume passes over it"
            + (f" and asks the mirror {mirror}" if mirror else ""),
        )
    else:
        yield Finding(
            "note", "damaged checkpoint", "An older checkpoint is damaged.", evidence, "test the disk"
        )


def check_failures(files: RunFiles) -> Iterator[Finding]:
    """Checkpoints that could not be written, as the log tells."""
    failed: list[tuple[int, str]] = []
    num_failed = 0
    for line in files.log:
        if found := _NOT_WRITTEN.match(line):
            failed.append((int(found[1]), found[2]))
            num_failed += 1
        elif _WRITTEN.match(line):
            failed.clear()
    if not num_failed:
        return
    if not failed:
        yield Finding(
            "note",
            "checkpoints not written",
            f"{num_failed} checkpoint{'s' * (num_failed > 1)} could not be written; the next one was.",
        )
        return
    allowed = int(files.setting("checkpoint.max_failures", 3))
    yield Finding(
        "error",
        "checkpoints not written",
        f"The last {len(failed)} checkpoint{'s' * (len(failed) > 1)} could not be written.",
        (
            *(f"step {step}: {reason}" for step, reason in failed[-3:]),
            f"{allowed} in a row end the run (checkpoint.max_failures)",
        ),
        f"make room on, or bring back, the disk of {files.run}"
        + ("" if files.state == "running" else f"; then {go_on(files)}:"),
        "" if files.state == "running" else resume_command(files),
    )


def check_age(files: RunFiles) -> Iterator[Finding]:
    """Too long without a checkpoint, in steps or in hours of work."""
    every = int(files.setting("checkpoint.every_steps", 1000))
    if files.state not in ("running", "unknown", "silent"):
        return
    saved = files.checkpoints[0].step if files.checkpoints else 0
    own = [record for record in files.records if record.get("step", 0) > saved]
    seconds = every * (series.mean(series.recent(files), "step_seconds") or 0.0)
    if files.step - saved > limit.LATE_CHECKPOINT * every and own:
        yield Finding(
            "error",
            "old checkpoint",
            f"The last {files.step - saved} steps are in no checkpoint, though one is due every {every}.",
            (f"the newest is of step {saved}" if files.checkpoints else "there is none at all",),
            f"look for 'checkpoint' in {files.run / LOG}, and at the disk",
        )
    elif seconds > limit.MAX_LOSS_SECONDS:
        yield Finding(
            "warning",
            "old checkpoint",
            f"A kill would cost up to {seconds / 3600:.1f} hours of work.",
            (f"checkpoint.every_steps={every}, at {seconds / every:.2f} s per step",),
            f"at the next start set checkpoint.every_steps={max(1, int(every * 1800 / seconds))} (30 min)",
        )


def check_disk(files: RunFiles) -> Iterator[Finding]:
    """Room for the next checkpoint, of a run that will write one."""
    if files.state == "done" or files.free_bytes is None or not files.checkpoints:
        return
    size = files.checkpoints[0].num_bytes
    if files.free_bytes >= 2 * size:
        return
    yield Finding(
        "error" if files.free_bytes < size else "warning",
        "disk full",
        "The disk has no room for the next checkpoint."
        if files.free_bytes < size
        else "The disk has room for one more checkpoint only.",
        (f"{files.free_bytes / 1e9:.2f} GB are free, a checkpoint takes {size / 1e9:.2f} GB",),
        f"free some, or lower checkpoint.keep_last={int(files.setting('checkpoint.keep_last', 3))}",
    )


def check_mirror(files: RunFiles) -> Iterator[Finding]:
    behind = None
    for line in files.log:
        if found := _MIRROR_BEHIND.match(line):
            behind = found
        elif _MIRRORED.match(line):
            behind = None
    if behind:
        yield Finding(
            "warning",
            "mirror behind",
            f"The mirror {behind[1] or behind[4]} lacks the newest checkpoints.",
            (f"train.log: {behind[0].rstrip(';')}",),
            "make it reachable and give it room; the next checkpoint tries again",
        )


def check_export(files: RunFiles) -> Iterator[Finding]:
    """A finished run whose weights are not there to be used."""
    if files.state != "done" or not files.setting("export.at_end", True):
        return
    told = [
        line for line in files.log if line.startswith("the run is done, but its weights were not exported")
    ]
    if told or not files.has_export:
        yield Finding(
            "warning",
            "no export",
            "The run is done, but its weights were not exported.",
            (f"train.log: {told[-1]}",) if told else (f"{files.run / 'exported'} is not there",),
            f"pretrain export {shlex.quote(str(files.run))}",
        )


def check_logs(files: RunFiles) -> Iterator[Finding]:
    """Parts of the folder that are missing, cannot be read or could not be written."""
    told = [line for line in files.whole_log if " cannot be written (" in line and "stopped: " not in line]
    broken = [*files.unreadable, *(f"train.log: {line}" for line in told)]
    if broken:
        yield Finding(
            "warning",
            "damaged records",
            "Parts of the run folder cannot be read, or could not be written.",
            tuple(dict.fromkeys(broken)),
            "look at the disk; the checkpoints are checked apart from this",
        )
    needed = [name for name in files.missing if name in (CONFIG, METRICS, LOG) and files.step > 0]
    if files.state == "unknown" and not files.starts:
        needed.append("attempts/")
    elif files.step > 0 and not files.checkpoints and "checkpoints" in files.missing:
        began = any(start.record and start.record.began_from for start in files.starts)
        if began:
            yield Finding(
                "error",
                "checkpoints gone",
                "The run has trained, and the folder of its checkpoints is not there.",
                (f"the last step that is logged is {files.step}",),
                f"bring its disk or folder back, then {go_on(files)}:",
                resume_command(files),
            )
    if needed:
        yield Finding(
            "note",
            "missing parts",
            f"The folder lacks {', '.join(needed)}: what they would tell was not looked at.",
        )
