"""Whether the representation is alive: the numbers that a falling loss hides."""

from pretrain.metrics import names
from pretrain.metrics.dashboards.panels import (
    GREEN,
    RANK_LEGEND,
    RED,
    YELLOW,
    Dashboard,
    Query,
    Row,
    draw,
    rate,
    recorded,
    show,
)

STEPS_OF_RANK = f"({rate(names.STEP_SECONDS, suffix='_count')} > 0)"

COLLAPSE = Row(
    "Signs of a collapse",
    (
        show(
            names.FEATURE_STD,
            "Spread of features",
            legend="spread",
            low=0,
            limits=((0.02, YELLOW), (0.1, GREEN)),
            base=RED,
        ),
        show(
            names.EFFECTIVE_RANK,
            "Effective rank",
            legend="directions",
            low=0,
            limits=((2, YELLOW), (5, GREEN)),
            base=RED,
        ),
        show(
            names.TEACHER_ENTROPY,
            "Entropy of the teacher",
            low=0,
            high=1,
            limits=((0.05, GREEN), (0.995, RED)),
            base=RED,
        ),
        show(names.FEATURE_SIMILARITY, "Similarity of features", low=-1, high=1, legend="{{images}} image"),
        draw(
            "Same image less different images",
            "none",
            [names.FEATURE_SIMILARITY],
            Query(recorded("run:pretrain_feature_similarity:gap"), "gap"),
            note="Near 0, views of one image are no more alike than any two images.",
            limits=((0.02, YELLOW), (0.1, GREEN)),
            base=RED,
        ),
        show(names.EVAL_ACCURACY, "Accuracy on the way", low=0, high=1, legend="{{eval}}, k = {{k}}"),
    ),
)

PASSES = Row(
    "Passes of the encoders",
    (
        draw(
            "Encoder passes of a step",
            "short",
            [names.BACKBONE_CALLS, names.STEP_SECONDS],
            Query(
                f"{rate(names.BACKBONE_CALLS)} / {STEPS_OF_RANK}",
                RANK_LEGEND,
            ),
            note="What the config's views need and no more; accumulation multiplies it.",
            width=12,
            low=0,
        ),
        draw(
            "Teacher passes of a step",
            "short",
            [names.TEACHER_CALLS, names.STEP_SECONDS],
            Query(
                f"{rate(names.TEACHER_CALLS)} / {STEPS_OF_RANK}",
                RANK_LEGEND,
            ),
            width=12,
            low=0,
        ),
    ),
)

HEALTH = Dashboard(
    "health",
    "Representation health",
    "Is the representation alive: what a falling loss does not tell.",
    (COLLAPSE, PASSES),
)
