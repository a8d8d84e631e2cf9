"""What would be lost if it stopped now, and how often it has."""

from pretrain.metrics import names
from pretrain.metrics.dashboards.panels import (
    GREEN,
    RED,
    WHOLE_RANGE,
    YELLOW,
    Dashboard,
    Query,
    Row,
    draw,
    gained,
    recorded,
    select,
    show,
)

SAVED = Row(
    "What is saved",
    (
        draw(
            "Steps since the last checkpoint",
            "short",
            [names.STEP, names.CHECKPOINT_STEP, names.CHECKPOINT_EVERY],
            Query(recorded("run:pretrain_checkpoint_lag:steps"), "since the last"),
            Query(select(names.CHECKPOINT_EVERY), "interval"),
            width=12,
            low=0,
        ),
        draw(
            "Age of the last checkpoint",
            "s",
            [names.CHECKPOINT_TIME],
            Query(recorded("run:pretrain_checkpoint_age:seconds"), "age"),
            width=6,
            low=0,
        ),
        show(names.CHECKPOINT_TIME, "Last checkpoint", kind="stat", width=3, legend="written"),
        show(names.CHECKPOINT_STEP, "Its step", kind="stat", width=3, legend="step"),
        show(names.CHECKPOINT_SECONDS, "Time to write one", width=6, low=0, legend="seconds"),
        show(
            names.CHECKPOINT_STALL_SECONDS, "Time it holds up the training", width=6, low=0, legend="seconds"
        ),
        show(names.CHECKPOINT_BYTES, "Size of one", width=6, low=0, legend="bytes"),
        draw(
            "Free space",
            "bytes",
            [names.DISK_FREE, names.CHECKPOINT_BYTES],
            Query(select(names.DISK_FREE), "free"),
            Query(f"3 * {select(names.CHECKPOINT_BYTES)}", "three checkpoints"),
            width=6,
            low=0,
        ),
    ),
)

FAILURES = Row(
    "Failures",
    (
        draw(
            "Checkpoints not written",
            "short",
            [names.CHECKPOINT_FAILURES],
            Query(gained(names.CHECKPOINT_FAILURES, WHOLE_RANGE), "failed"),
            note="Over all that is shown.",
            kind="stat",
            decimals=0,
            width=4,
            limits=((1, RED),),
        ),
        draw(
            "Mirror copies that failed",
            "short",
            [names.MIRROR_FAILURES],
            Query(gained(names.MIRROR_FAILURES, WHOLE_RANGE), "failed"),
            note="Over all that is shown.",
            kind="stat",
            decimals=0,
            width=4,
            limits=((1, YELLOW),),
        ),
        show(names.ATTEMPT, "Starts", kind="stat", width=4, legend="starts", limits=((2, YELLOW), (5, RED))),
        show(
            names.RESTARTS,
            "Starts after the first",
            kind="stat",
            width=4,
            legend="restarts",
            limits=((1, YELLOW), (4, RED)),
        ),
        show(names.PREEMPTIONS, "Ended on request", kind="stat", width=4, legend="preemptions"),
        draw(
            "Returns to a checkpoint",
            "short",
            [names.ROLLBACKS],
            Query(select(names.ROLLBACKS), "returns"),
            note="Of this start.",
            kind="stat",
            width=4,
            limits=((1, YELLOW), (2, RED)),
        ),
        show(
            names.GOODPUT,
            "Goodput",
            width=12,
            low=0,
            high=1,
            legend="goodput",
            limits=((0.7, YELLOW), (0.9, GREEN)),
            base=RED,
        ),
        draw(
            "Planned and done",
            "short",
            [names.STEP, names.PLANNED_STEPS],
            Query(select(names.STEP), "done"),
            Query(select(names.PLANNED_STEPS), "planned"),
            note="A line that falls back is a return to a checkpoint, or a start that takes steps again.",
            width=12,
            low=0,
        ),
    ),
)

CHECKPOINTS = Dashboard(
    "checkpoints",
    "Checkpoints and failures",
    "What would be lost if the run stopped now, and how often it has.",
    (SAVED, FAILURES),
)
