"""How the starts of a run ended: asked to, failed, killed without a word, hanging, or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pretrain.doctor import series
from pretrain.doctor import thresholds as limit
from pretrain.doctor.finding import Finding
from pretrain.doctor.pace import memory_growth
from pretrain.doctor.remedy import go_on, lower_lr, lower_lr_setting, resume_command, verify_shards
from pretrain.doctor.run_files import RunFiles
from pretrain.doctor.series import told_span

STOPPED = "stopped: "
_ASKED = re.compile(r": saved at step \d+ of \d+")


@dataclass(frozen=True)
class _Failure:
    """What the last words of a run that failed mean."""

    pattern: str
    cause: str
    what: str
    do: Callable[[RunFiles], str]
    settings: Callable[[RunFiles], tuple[str, ...]] = lambda files: ()  # of the command that goes on


def _smaller(files: RunFiles) -> str:
    told = [part for part in last_words(files).split("; ") if part.startswith("set ")]
    doubled = f"batch.accumulation_steps={2 * int(files.setting('batch.accumulation_steps', 1))}"
    return f"{told[-1] if told else f'set {doubled}, or engine.recompute=true'}; then {go_on(files)}:"


# the first that fits; in the words that the run itself uses
_FAILURES = (
    _Failure(
        r"memory (of \S+ )?ran out",
        "out of memory",
        "A rank needed more memory than there was.",
        _smaller,
        lambda files: ("engine.recompute=true",),
    ),
    _Failure(
        r"were not finite|no checkpoint to go back to|in '?\S+ is not finite|is not finite; lower",
        "not finite",
        "Losses or gradients were NaN or infinite, step after step.",
        lambda files: f"set {lower_lr(files)} or engine.precision=fp32; then {go_on(files)}:",
        lower_lr_setting,
    ),
    _Failure(
        r"features of different images have been nearly the same",
        "collapse",
        "The features of all images have become nearly the same, and guard.collapse.action is 'stop'.",
        lambda files: (
            f"set {lower_lr(files)}, or check the teacher and the balance of the losses; begin anew"
        ),
    ),
    _Failure(
        r"the loss is .* scaled deviations above",
        "loss spike",
        "One loss was far above the others, and guard.loss_spike.action asks to stop or to go back.",
        lambda files: f"look at its samples in anomalies.jsonl; set {lower_lr(files)}; then {go_on(files)}:",
        lower_lr_setting,
    ),
    _Failure(
        r"checkpoints? (in a row )?could not be written|cannot be written \(",
        "checkpoints not written",
        "The run stopped because it could not save its state.",
        lambda files: f"make room on, or bring back, the disk of {files.run}; then {go_on(files)}:",
    ),
    _Failure(
        r"are not those of the others",
        "faulty device",
        "The weights of one rank differ from those of all others: its device or memory is likely broken.",
        lambda files: f"keep the run off that node or device, have it tested; then {go_on(files)}:",
    ),
    _Failure(
        r"another rank has ended or does not answer",
        "a rank died",
        "Another rank ended or became unreachable, so the rest could not go on.",
        lambda files: (
            "look for the first message of that rank in the output of the job, and at `dmesg` of its node "
            f"for 'Out of memory'; then {go_on(files)}:"
        ),
    ),
    _Failure(
        r"samples do not decode|is damaged|does not match its index|has changed since",
        "bad shards",
        "The data has more bad samples than data.max_bad_ratio allows, or is not what was indexed.",
        lambda files: (
            f"find with `{verify_shards(files)}`, mend with `{verify_shards(files, repair=True)}`, or raise "
            "data.max_bad_ratio"
        ),
    ),
    _Failure(
        r"differs between ranks",
        "ranks differ",
        "The ranks were not given the same software, settings or data.",
        lambda files: f"install the same versions on every node and start all ranks alike: {go_on(files)}",
    ),
    _Failure(
        r"wrote no checkpoint beyond",
        "no progress",
        "The run was started again and again without coming further, and refuses to go on so.",
        lambda files: "mend what ended the starts before (their last words are in train.log)",
    ),
)


def last_words(files: RunFiles) -> str:
    """What follows 'stopped: ' in the last such line of the log."""
    told = [line.removeprefix(STOPPED) for line in files.whole_log if line.startswith(STOPPED)]
    if not told or (files.state == "failed" and _ASKED.search(told[-1])):
        return ""  # those are of a start before, that was asked to stop
    return told[-1]


def _error(
    files: RunFiles, cause: str, what: str, evidence: tuple[str, ...], do: str, *settings: str
) -> Finding:
    """A remedy that ends with a colon ends with the command that goes on with the run."""
    command = resume_command(files, *settings) if do.endswith(":") else ""
    return Finding("error", cause, what, evidence, do, command)


def check_failure(files: RunFiles) -> Iterator[Finding]:
    """The newest start has failed, and says why."""
    if files.state != "failed" and not (files.state == "unknown" and _ends_with_stop(files)):
        return
    said = last_words(files)
    if not said:
        yield _error(
            files,
            "failed",
            "The run failed and its log does not say why.",
            (f"the last line of train.log: {files.whole_log[-1] if files.whole_log else '(there is none)'}",),
            f"look at the output of the job; then {go_on(files)}:",
        )
        return
    for failure in _FAILURES:
        if re.search(failure.pattern, said):
            yield _error(
                files,
                failure.cause,
                failure.what,
                (f"train.log: stopped: {said}",),
                failure.do(files),
                *failure.settings(files),
            )
            return
    thrown = [line for line in files.whole_log if re.match(r"[A-Za-z_.]+(Error|Exception): ", line)]
    yield _error(
        files,
        "failed",
        "The run ended with an error.",
        (f"train.log: stopped: {said}", *(thrown[-1:] if said not in "".join(thrown[-1:]) else ())),
        f"mend what that line says; then {go_on(files)}:",
    )


def _ends_with_stop(files: RunFiles) -> bool:
    return any(line.startswith(STOPPED) for line in files.log[-60:])


def check_killed(files: RunFiles) -> Iterator[Finding]:
    """The newest start is dead, or silent, and has not said how it ended."""
    newest = files.newest
    if files.state not in ("killed", "silent") or newest is None or newest.number in files.hangs:
        return
    saved = files.checkpoints[0].step if files.checkpoints else 0
    lost = max(0, files.step - saved)
    evidence = [
        f"start {newest.number} has no outcome in attempts/, and its last logged step is {files.step}"
    ]
    if files.half_written:
        evidence.append(f"it died while it wrote a checkpoint: {files.half_written[-1]} is not complete")
    grown = memory_growth(files)
    if grown:
        evidence.append(grown)
    evidence.append(
        f"{lost} steps after the checkpoint of step {saved} are lost and will be taken again"
        if saved
        else "there is no checkpoint: it will begin anew"
    )
    if files.state == "silent":
        record = newest.record
        silent = told_span(files.silent_seconds or 0)
        where = f"{record.owner.host} (pid {record.owner.pid})" if record else "its machine"
        yield _error(
            files,
            "no sign of life",
            f"The run ran on {where} and has given no sign of life for {silent}.",
            tuple(evidence),
            f"see on that machine whether it still runs; if not, {go_on(files)}:",
        )
        return
    cause = "out of memory" if grown else "killed"
    what = "The process ended without a word: killed by SIGKILL, by the kernel's out-of-memory killer or with"
    yield _error(
        files,
        cause,
        f"{what} its machine.",
        tuple(evidence),
        "look at `dmesg -T | grep -i -E 'killed process|out of memory'` on its machine and at what the "
        f"scheduler has on record of the job; then {go_on(files)}:",
    )


def check_hang(files: RunFiles) -> Iterator[Finding]:
    """The watchdog ended a start, or a live one stands still."""
    newest = files.newest
    if newest and newest.number in files.hangs and files.state != "running":
        folder = f"health/attempt-{newest.number:04d}"
        yield _error(
            files,
            "hang",
            "A rank stood still, and the watchdog ended the run.",
            (files.hangs[newest.number], f"what every rank was doing: {folder}/rank-*.stacks.txt"),
            f"read the stacks of the rank that is named; if it was in 'data', test its storage; else keep "
            f"the run off its node. If it was only slow, raise the limit that is named. Then {go_on(files)}:",
        )
    if files.state != "running" or files.pause_seconds is None:
        return
    recent = series.recent(files)
    every = series.steps_in(recent) / max(1, len(recent) - 1)
    usual = every * (series.mean(recent, "step_seconds") or 0.0)
    allowed = max(limit.MIN_PAUSE_SECONDS, limit.MAX_PAUSE * usual)
    if recent and files.pause_seconds > allowed:
        pid = newest.record.owner.pid if newest and newest.record else "PID"
        yield Finding(
            "warning",
            "standing still",
            f"The run lives and has written nothing for {told_span(files.pause_seconds)}.",
            (f"step {files.step} was its last; before, a log line came every {told_span(usual)}",),
            "wait for the watchdog (watchdog.*_seconds), which ends it and names the rank; or look now, on "
            f"its machine: py-spy dump --pid {pid}",
        )


def check_preempted(files: RunFiles) -> Iterator[Finding]:
    if files.state != "preempted":
        return
    yield Finding(
        "note",
        "preempted",
        "The run was asked to stop, has saved its state and can go on. That is no fault.",
        tuple(f"train.log: stopped: {last_words(files)}" for _ in [0] if last_words(files)),
        f"{go_on(files)}:",
        resume_command(files),
    )
