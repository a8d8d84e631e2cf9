"""The representation: do features of different images still differ?"""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.doctor import series
from pretrain.doctor import thresholds as limit
from pretrain.doctor.finding import Finding
from pretrain.doctor.remedy import lower_lr
from pretrain.doctor.run_files import RunFiles


def check_collapse(files: RunFiles) -> Iterator[Finding]:
    """Every sign that a run has for a collapse, as one finding."""
    evidence = [*_narrow(files), *_few_directions(files), *_teacher(files)]
    noted = [note for note in files.anomalies if note.get("kind") == "collapse"]
    if not evidence and not noted:
        return
    for note in noted[-1:]:
        std = note.get("feature_std")
        told = f", feature_std {std:.4f}" if isinstance(std, float) else ""
        evidence.append(f"the run noticed it at step {note.get('step')}{told}")
    last = series.last(files.records, "feature_std")
    lowest = float(files.setting("guard.collapse.min_feature_std", 0.02))
    recovered = len(evidence) == len(noted[-1:]) and last is not None and last >= lowest
    if recovered:
        yield Finding(
            "note",
            "collapse",
            "The features of all images were nearly the same for a while, and differ again.",
            (*evidence, f"feature_std is {last:.3f} now"),
        )
        return
    ways = [f"begin anew, or from a checkpoint before it, with {lower_lr(files)}"]
    if files.setting("teacher") is not None:
        ways.append("a teacher.momentum nearer to 1")
    if files.setting("tasks.dino") is not None:
        ways.append(
            "a lower tasks.dino.teacher_temperature if its entropy is near ln K, a higher one if near 0"
        )
    yield Finding(
        "error",
        "collapse",
        "Features of different images are nearly the same: the backbone tells images apart no longer.",
        tuple(evidence),
        "; ".join([*ways, "guard.collapse.action=stop ends such a run by itself"]),
    )


def _narrow(files: RunFiles) -> Iterator[str]:
    """feature_std, which the guard watches."""
    recent = series.recent(files)
    found = series.values(recent, "feature_std")
    patience = int(files.setting("guard.collapse.patience_steps", 100))
    lowest = float(files.setting("guard.collapse.min_feature_std", 0.02))
    highest = max(series.values(files.records, "feature_std"), default=0.0)
    if not found or series.steps_in(recent) < min(patience, limit.MIN_TIMED_STEPS):
        return
    now = sum(found) / len(found)
    if max(found) < lowest:
        yield (
            f"feature_std {now:.4f} over {series.span(recent)}: below guard.collapse.min_feature_std="
            f"{lowest:g}"
        )
    elif files.step >= limit.MIN_FEATURE_STEPS and now < min(
        limit.LOW_FEATURE_STD, limit.MAX_STD_FALL * highest
    ):
        yield f"feature_std fell from {highest:.3f} to {now:.4f} over {series.span(recent)}"


def _few_directions(files: RunFiles) -> Iterator[str]:
    recent = series.recent(files)
    if files.step < limit.MIN_FEATURE_STEPS:
        return
    ranks = series.values(series.own_records(files), "effective_rank")[
        -limit.MIN_RECENT :
    ]  # not of each step
    if ranks and max(ranks) < limit.MIN_EFFECTIVE_RANK:
        now = sum(ranks) / len(ranks)
        yield f"effective_rank {now:.2f} when it was last measured: one direction holds nearly all"
    for task in series.tasks_of(files):
        found = series.values(files.records, f"{task}/embedding_std")
        if found and max(found[-limit.MIN_RECENT :]) < limit.MAX_STD_FALL * max(found):
            yield f"{task}/embedding_std fell from {max(found):.3g} to {found[-1]:.3g}, into a point"
    same, different = series.mean(recent, "similarity/same"), series.mean(recent, "similarity/different")
    if same is None or different is None:
        return
    if different > limit.HIGH_SIMILARITY and same - different < limit.MIN_SIMILARITY_GAP:
        yield (
            f"two views of an image are as similar ({same:.3f}) as two images are ({different:.3f}) over "
            f"{series.span(recent)}"
        )


def _teacher(files: RunFiles) -> Iterator[str]:
    """Of DINO: a teacher that gives all images the same answer, or none."""
    recent = series.recent(files)
    if files.step < limit.MIN_TEACHER_STEPS:
        return
    entropy, bound = series.mean(recent, "dino/teacher_entropy"), series.mean(recent, "dino/entropy_bound")
    if entropy is not None and bound and not limit.ENTROPY_LOW < entropy / bound < limit.ENTROPY_HIGH:
        share = series.mean(recent, "dino/chance") or 0.0
        if entropy / bound >= limit.ENTROPY_HIGH or share > limit.ONE_PROTOTYPE_RATIO:
            yield (
                f"the teacher's entropy is {entropy:.3f} nats of at most {bound:.3f} (ln K) over "
                f"{series.span(recent)}"
            )
