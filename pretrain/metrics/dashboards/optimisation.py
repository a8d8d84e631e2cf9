"""What each task learns, and what the optimizer does."""

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
    select,
    show,
)

NOT_TOTAL = 'task!="total"'
WEIGHTED = f"abs({select(names.LOSS, NOT_TOTAL)} * on (run, task) {select(names.LOSS_WEIGHT)})"

TASKS = Row(
    "Tasks",
    (
        draw(
            "Loss of each task",
            "none",
            [names.LOSS],
            Query(select(names.LOSS, NOT_TOTAL), "{{task}}"),
            width=12,
        ),
        show(names.TASK_METRIC, "Pretext metrics", width=12, legend="{{task}} {{metric}}"),
        show(names.LOSS_WEIGHT, "Weights of the losses", low=0),
        draw(
            "Share of the total loss",
            "percentunit",
            [names.LOSS, names.LOSS_WEIGHT],
            Query(
                f"{WEIGHTED} / on (run) group_left () sum by (run) ({WEIGHTED})",
                "{{task}}",
            ),
            note="Weight times loss, over the sum of all.",
            low=0,
            high=1,
            is_stacked=True,
        ),
        draw(
            "Total loss",
            "none",
            [names.LOSS],
            Query(select(names.LOSS, 'task="total"'), "{{task}}"),
        ),
    ),
)

GRADIENTS = Row(
    "Gradients",
    (
        show(names.GRAD_NORM, "Gradient norm", legend="before clipping", low=0),
        show(names.TASK_GRAD_NORM, "Gradient norm of each task", low=0),
        show(
            names.TASK_GRAD_COSINE,
            "Do tasks pull the same way",
            low=-1,
            high=1,
            legend="{{task}}, {{other}}",
            limits=((-0.5, YELLOW), (-0.1, GREEN)),
            base=RED,
        ),
    ),
)

SCHEDULES = Row(
    "Schedules",
    (
        show(names.LEARNING_RATE, "Learning rate", legend="learning rate", low=0),
        show(names.WEIGHT_DECAY, "Weight decay", legend="weight decay", low=0),
        show(names.MOMENTUM, "Momentum of the teacher", legend="momentum"),
    ),
)

TROUBLE = Row(
    "Trouble",
    (
        draw(
            "Steps that were not finite",
            "short",
            [names.NONFINITE_STEPS],
            Query(gained(names.NONFINITE_STEPS, WHOLE_RANGE), "skipped"),
            note="Over all that is shown.",
            kind="stat",
            decimals=0,
            limits=((1, YELLOW), (10, RED)),
        ),
        draw(
            "Anomalies",
            "short",
            [names.ANOMALIES],
            Query(gained(names.ANOMALIES, WHOLE_RANGE, by="kind"), "{{kind}}"),
            note="Over all that is shown.",
            kind="stat",
            decimals=0,
            limits=((1, YELLOW), (10, RED)),
        ),
        draw(
            "Returns to a checkpoint",
            "short",
            [names.ROLLBACKS],
            Query(gained(names.ROLLBACKS, WHOLE_RANGE), "returns"),
            note="Over all that is shown.",
            kind="stat",
            decimals=0,
            limits=((1, YELLOW), (2, RED)),
        ),
    ),
)

OPTIMISATION = Dashboard(
    "optimisation",
    "Optimisation and tasks",
    "What each task learns, how much it weighs, and what the optimizer does.",
    (TASKS, GRADIENTS, SCHEDULES, TROUBLE),
)
