"""The training itself: finite, falling, and every task above chance?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretrain.doctor import series
from pretrain.doctor import thresholds as limit
from pretrain.doctor.finding import Finding
from pretrain.doctor.remedy import lower_lr
from pretrain.doctor.run_files import RunFiles

# what a task may call the number that tells how well it is solved; `chance` is in the same unit
HIGHER_IS_BETTER = ("accuracy", "agreement", "cosine")
LOWER_IS_BETTER = ("error", "error_x100")
# a teacher that changes moves the target: such a loss may rise in a run that is well
WITH_TEACHER = ("byol", "dino", "ijepa", "moby", "moco_v2", "moco_v3", "simsiam")


def headline(files: RunFiles, task: str) -> str | None:
    """The metric that the task's chance belongs to."""
    known = files.records[-1] if files.records else {}
    names = (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
    return next((name for name in names if f"{task}/{name}" in known and f"{task}/chance" in known), None)


def check_not_finite(files: RunFiles) -> Iterator[Finding]:
    """Steps that were skipped because a loss or gradient was not finite."""
    steps = [
        int(note["step"]) for note in files.anomalies if note.get("kind") == "not finite" and "step" in note
    ]
    if not steps and not files.num_rollbacks:
        return
    ratio = len(steps) / max(1, files.step)
    evidence = [f"{len(steps)} steps, the last is {steps[-1]}"] if steps else []
    evidence += [f"skipped: {', '.join(map(str, steps[-8:]))}"] if len(steps) > 1 else []
    if files.num_rollbacks:
        allowed = int(files.setting("guard.max_rollbacks", 2))
        evidence.append(f"the run went back to a checkpoint {files.num_rollbacks} of {allowed} times")
    often = ratio > limit.MAX_SKIPPED_RATIO and len(steps) >= limit.MIN_SKIPPED
    yield Finding(
        "warning" if often or files.num_rollbacks else "note",
        "not finite",
        "Steps were skipped because a loss or gradient was NaN or infinite.",
        tuple(evidence),
        f"set {lower_lr(files)}, a longer schedule.warmup_steps, or engine.precision=fp32; the samples of "
        "these steps are in anomalies.jsonl"
        if often or files.num_rollbacks
        else "nothing, unless it happens again: such steps change no weights",
    )


def check_spikes(files: RunFiles) -> Iterator[Finding]:
    steps = [
        int(note["step"]) for note in files.anomalies if note.get("kind") == "loss spike" and "step" in note
    ]
    if not steps:
        return
    often = len(steps) >= limit.MIN_SPIKES and len(steps) / max(1, files.step) > limit.MAX_SPIKES_RATIO
    yield Finding(
        "warning" if often else "note",
        "loss spike",
        f"The loss was far above the others {len(steps)} time{'s' * (len(steps) > 1)}.",
        (f"at step{'s' * (len(steps) > 1)} {', '.join(map(str, steps[-8:]))}, of {files.step}",),
        f"set {lower_lr(files)} or optim.clip_norm=1.0; guard.loss_spike.action=rollback goes back by itself"
        if often
        else "nothing, if the loss fell again; its samples are in anomalies.jsonl",
    )


def check_diverging(files: RunFiles) -> Iterator[Finding]:
    """Losses that rose above where they began."""
    recent, begin = series.recent(files), series.early(files)
    if series.steps_in(files.records) < limit.MIN_LOSS_STEPS or len(files.records) < 2 * len(recent):
        return
    risen = []
    for task in series.tasks_of(files):
        name = f"loss/{task}"
        first, now = series.last(files.records[:1], name), series.median(recent, name)
        level = series.median(begin, name)
        if task in WITH_TEACHER or first is None or level is None or now is None:
            continue
        if now > limit.MAX_LOSS_GROWTH * max(first, level) > 0:
            risen.append(f"{name}: {first:.4g} at first, {now:.4g} over {series.span(recent)}")
    if not risen:
        return
    norms = series.median(begin, "grad_norm"), series.median(recent, "grad_norm")
    if norms[0] is not None and norms[1] is not None:
        risen.append(f"gradient norm: {norms[0]:.3g} over {series.span(begin)}, {norms[1]:.3g} now")
    yield Finding(
        "error",
        "diverging",
        "The loss is higher than when the run began.",
        (*risen, _rate(files)),
        f"begin anew, or from a checkpoint before it rose, with {lower_lr(files)}; a longer "
        "schedule.warmup_steps and optim.clip_norm=1.0 help too",
    )


def _rate(files: RunFiles) -> str:
    rates = series.values(files.records, "lr")
    return f"highest learning rate so far: {max(rates):.3g}" if rates else "the learning rate was not logged"


def check_dead_tasks(files: RunFiles) -> Iterator[Finding]:
    """Tasks that are solved no better than by guessing, late in the run."""
    recent = series.recent(files)
    late = limit.MIN_TASK_RATIO * (files.num_steps or math.inf)
    if files.step < max(limit.MIN_TASK_STEPS, late) or len(recent) < 2:
        return
    dead = [told for task in series.tasks_of(files) if (told := _at_chance(files, task))]
    if not dead:
        return
    every = len(dead) == len(series.tasks_of(files))
    yield Finding(
        "error" if every else "warning",
        "nothing learned" if every else "dead task",
        "No task is solved better than by guessing."
        if every
        else f"{len(dead)} of {len(series.tasks_of(files))} tasks are solved no better than by guessing.",
        (*dead, _rate(files)),
        f"set {lower_lr(files)}; see with `pretrain report {files.run}` what the model is shown"
        if every
        else "raise its weight (tasks.NAME.weight), see with "
        f"`pretrain report {files.run}` whether its views can be told apart at all, or leave it out",
    )


def _at_chance(files: RunFiles, task: str) -> str | None:
    """What tells that a task is dead; None if it is not, or cannot be judged."""
    recent, name = series.recent(files), headline(files, task)
    first, now = series.last(files.records[:1], f"loss/{task}"), series.median(recent, f"loss/{task}")
    if name is None or task in WITH_TEACHER or first is None or now is None:
        return None
    value, chance = series.mean(recent, f"{task}/{name}"), series.mean(recent, f"{task}/chance")
    # fresh weights are worse than guessing, which is unlearned at once
    begin = min(first, series.median(series.early(files), f"loss/{task}") or first)
    if value is None or chance is None or now < limit.FLAT_LOSS_RATIO * begin:
        return None
    if name in LOWER_IS_BETTER:
        dead = value >= chance
    else:
        images = series.steps_in(recent) * float(files.setting("batch.global_size", 1))
        spread = math.sqrt(max(0.0, chance * (1 - chance)) / max(1.0, images))
        dead = value <= max(chance + limit.SOLVED_STDS * spread, limit.SOLVED_RATIO * chance)
    if not dead:
        return None
    return (
        f"{task}: {name} {value:.3g}, by guessing {chance:.3g}; loss {first:.4g} at first, {now:.4g} over "
        f"{series.span(recent)}"
    )


def check_weights(files: RunFiles) -> Iterator[Finding]:
    """A learned balance that has all but switched a task off."""
    if files.setting("balance.kind") != "uncertainty" or not files.records:
        return
    gone = []
    for task in series.tasks_of(files):
        first = series.last(files.records[:1], f"weight/{task}")
        now = series.median(series.recent(files), f"weight/{task}")
        if first and now is not None and now < limit.MIN_WEIGHT_RATIO * first:
            gone.append(f"weight/{task}: {first:.3g} at first, {now:.3g} now")
    if gone:
        yield Finding(
            "warning",
            "task switched off",
            "The learned balance gives a task almost no weight: its loss is large and does not fall.",
            tuple(gone),
            "set balance.kind=fixed with weights of your own, or a larger tasks.NAME.weight",
        )


def check_conflict(files: RunFiles) -> Iterator[Finding]:
    """Tasks whose gradients point against each other."""
    marker = "gradient_cosine/"
    names = sorted({name for record in files.records for name in record if name.startswith(marker)})
    found = []
    for name in names:
        measured = series.values(files.records, name)[-limit.MAX_RECENT :]
        if (
            len(measured) >= limit.MIN_COSINE_RECORDS
            and sum(measured) / len(measured) < limit.MIN_GRADIENT_COSINE
        ):
            pair = name.removeprefix(marker).replace(":", " and ")
            found.append(
                f"{pair}: mean cosine {sum(measured) / len(measured):.2f} over {len(measured)} looks"
            )
    if found:
        yield Finding(
            "warning",
            "gradient conflict",
            "Two tasks pull the backbone in opposite directions.",
            tuple(found),
            "train each alone for a while and compare: if one loses, lower the weight of the other "
            "(tasks.NAME.weight), or use balance.kind=uncertainty",
        )


def check_learning_rate(files: RunFiles) -> Iterator[Finding]:
    """A rate of 0, and a warm-up that never ends."""
    num_steps, warmup = files.num_steps, files.setting("schedule.warmup_steps")
    if num_steps and warmup and int(warmup) >= num_steps:
        yield Finding(
            "warning",
            "learning rate",
            "The warm-up is as long as the whole run: the full learning rate is never reached.",
            (f"schedule.warmup_steps is {warmup}, the run has {num_steps} steps",),
            f"set schedule.warmup_steps={max(1, num_steps // 10)}",
        )
    recent = series.own_records(files)[-limit.MIN_RECENT :]
    rates = series.values(recent, "lr")
    ends = num_steps is not None and files.step >= num_steps
    if len(rates) >= limit.MIN_RECENT and max(rates) == 0 and not ends:
        yield Finding(
            "error",
            "learning rate",
            "The learning rate is 0: nothing is learned.",
            (f"over {series.span(recent)}",),
            "set optim.base_lr, and see schedule.* for how long it is meant to last",
        )
