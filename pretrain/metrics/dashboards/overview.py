"""The first page: does it run, how fast, how long yet, and is what it learns any good."""

from pretrain.metrics import names
from pretrain.metrics.dashboards.panels import (
    GREEN,
    OF_RUN,
    PER_SECOND,
    RED,
    YELLOW,
    Dashboard,
    Query,
    Row,
    draw,
    mean_seconds,
    quantile,
    rate,
    recorded,
    select,
    show,
)

UTILISATION = f"sum({rate(names.MODEL_FLOPS)}) / max({select(names.PEAK_FLOPS)} > 0)"

NOW = Row(
    "Now",
    (
        draw(
            "Run",
            "none",
            [names.RUN_INFO],
            Query(select(names.RUN_INFO), "{{name}}: {{model}}, {{tasks}} (pretrain {{version}})"),
            shows_name=True,
            kind="stat",
            width=6,
        ),
        draw(
            "Progress",
            "percentunit",
            [names.STEP, names.PLANNED_STEPS],
            Query(f"{select(names.STEP)} / {select(names.PLANNED_STEPS)}", "done"),
            kind="stat",
            width=3,
            low=0,
            high=1,
        ),
        show(names.STEP, "Step", kind="stat", width=3, legend="step"),
        draw(
            "Time left",
            "s",
            [names.STEP, names.PLANNED_STEPS, names.STEP_SECONDS, names.SECTION_SECONDS],
            Query(recorded("run:pretrain_time_left:seconds"), "time left"),
            note="At the pace of the last 15 minutes, what lies between steps included.",
            kind="stat",
            width=3,
        ),
        draw(
            "Since the last step",
            "s",
            [names.LAST_STEP_TIME],
            Query(recorded("run:pretrain_last_step_age:seconds"), "since the last step"),
            kind="stat",
            width=3,
            limits=((120, YELLOW), (600, RED)),
        ),
        draw(
            "Alerts that ring",
            "short",
            [],
            Query(f'count(ALERTS{{{OF_RUN},alertstate="firing"}}) or vector(0)', "alerts"),
            note="What each means is in docs/monitoring.md.",
            kind="stat",
            width=3,
            limits=((1, RED),),
        ),
        show(names.ATTEMPT, "Starts", kind="stat", width=3, limits=((2, YELLOW), (5, RED)), legend="starts"),
    ),
)

LEARNING = Row(
    "Learning",
    (
        draw(
            "Loss",
            "none",
            [names.LOSS],
            Query(select(names.LOSS, 'task="total"'), "{{task}}"),
            width=12,
        ),
        show(
            names.EVAL_ACCURACY, "Accuracy on the way", width=6, low=0, high=1, legend="{{eval}}, k = {{k}}"
        ),
        show(
            names.FEATURE_STD,
            "Spread of features",
            width=6,
            low=0,
            legend="spread",
            limits=((0.02, GREEN),),
            base=RED,
        ),
    ),
)

SPEED = Row(
    "Speed",
    (
        draw(
            "Images per second",
            PER_SECOND,
            [names.IMAGES_PER_SECOND, names.IMAGES],
            Query(select(names.IMAGES_PER_SECOND), "since the last log line"),
            Query(f"sum({rate(names.IMAGES)})", "what lies between steps included"),
            low=0,
        ),
        draw(
            "Step time",
            "s",
            [names.STEP_SECONDS],
            Query(mean_seconds(names.STEP_SECONDS, "run"), "mean"),
            Query(quantile(names.STEP_SECONDS, 0.95), "95 % are below"),
            low=0,
        ),
        draw(
            "Model FLOP utilisation",
            "percentunit",
            [names.MFU, names.MODEL_FLOPS, names.PEAK_FLOPS],
            Query(select(names.MFU), "since the last log line"),
            Query(UTILISATION, "what lies between steps included"),
            low=0,
        ),
        draw(
            "Where the time goes",
            "percentunit",
            [names.SECTION_SECONDS],
            Query(recorded("run_section:pretrain_section_seconds:share5m"), "{{section}}"),
            width=12,
            low=0,
            high=1,
            is_stacked=True,
        ),
        draw(
            "Waiting for data",
            "percentunit",
            [names.DATA_WAIT, names.STEP_SECONDS],
            Query(recorded("run:pretrain_data_wait:ratio5m"), "of the step time"),
            note="Above 20 % the run is bound by its data.",
            width=6,
            low=0,
            limits=((0.05, YELLOW), (0.2, RED)),
        ),
        show(names.GOODPUT, "Goodput", width=6, low=0, high=1, legend="goodput"),
    ),
)

OVERVIEW = Dashboard(
    "overview",
    "Run overview",
    "Does the run go on, how fast, how long yet, and is what it learns any good.",
    (NOW, LEARNING, SPEED),
)
