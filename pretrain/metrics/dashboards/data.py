"""Whether images come fast enough, and whether they can be used."""

from pretrain.metrics import names
from pretrain.metrics.dashboards.panels import (
    PER_SECOND,
    RANK_LEGEND,
    RED,
    WHOLE_RANGE,
    YELLOW,
    Dashboard,
    Query,
    Row,
    draw,
    gained,
    legend_of,
    mean_seconds,
    rate,
    recorded,
    select,
    show,
)

WAITING = Row(
    "Waiting",
    (
        draw(
            "Waiting for data, by rank",
            "percentunit",
            [names.DATA_WAIT, names.STEP_SECONDS],
            Query(recorded("rank:pretrain_data_wait:ratio5m"), RANK_LEGEND),
            note="Share of the step time. One rank alone: its node or its storage. All alike: too few decode "
            "threads, or storage that is too slow.",
            width=12,
            low=0,
            limits=((0.05, YELLOW), (0.2, RED)),
        ),
        draw(
            "Wait of a step",
            "s",
            [names.DATA_WAIT],
            Query(
                f"{rate(names.DATA_WAIT)} / ({rate(names.STEP_SECONDS, suffix='_count')} > 0)",
                legend_of(names.DATA_WAIT),
            ),
            width=6,
            low=0,
        ),
        draw(
            "Data and transfer sections",
            "s",
            [names.SECTION_SECONDS],
            Query(
                mean_seconds(names.SECTION_SECONDS, "section", 'section=~"data|transfer|views"'),
                "{{section}}",
            ),
            note="Mean time of a step.",
            width=6,
            low=0,
        ),
    ),
)

FLOW = Row(
    "Flow",
    (
        draw(
            "Images per second",
            PER_SECOND,
            [names.IMAGES],
            Query(f"sum({rate(names.IMAGES)})", "images"),
            low=0,
        ),
        show(names.EPOCH, "Passes over the data", legend="epochs", low=0),
        draw(
            "Shards opened",
            PER_SECOND,
            [names.SHARDS_OPENED],
            Query(rate(names.SHARDS_OPENED), legend_of(names.SHARDS_OPENED)),
            low=0,
        ),
    ),
)

DAMAGE = Row(
    "Damage and storage",
    (
        draw(
            "Skipped samples",
            "short",
            [names.SKIPPED_SAMPLES],
            Query(gained(names.SKIPPED_SAMPLES, by="reason, rank"), "{{reason}}, rank {{rank}}"),
            note="Each one is listed in quarantine.jsonl.",
            low=0,
        ),
        draw(
            "Skipped, and how many may be",
            "short",
            [names.SKIPPED_SAMPLES, names.SAMPLES_ALLOWED],
            Query(f"sum({select(names.SKIPPED_SAMPLES)}) or vector(0)", "skipped by this start"),
            Query(select(names.SAMPLES_ALLOWED), "allowed in all"),
            low=0,
        ),
        draw(
            "Reads tried again",
            "short",
            [names.STORAGE_RETRIES],
            Query(gained(names.STORAGE_RETRIES, by="rank, node"), RANK_LEGEND),
            low=0,
        ),
        draw(
            "Shards from the node's cache",
            "percentunit",
            [names.CACHE_READS],
            Query(recorded("run:pretrain_cache_hits:ratio15m"), "found there"),
            note="Over 15 minutes. The first pass over the data misses; later ones hit, if it all fits.",
            low=0,
            high=1,
        ),
        draw(
            "Reads of the cache",
            "short",
            [names.CACHE_READS],
            Query(gained(names.CACHE_READS, WHOLE_RANGE, by="result"), "{{result}}"),
            note="Over all that is shown.",
            kind="stat",
            decimals=0,
        ),
        draw(
            "Memory of the loaders",
            "bytes",
            [names.RESIDENT_MEMORY],
            Query(select(names.RESIDENT_MEMORY, 'process="loader"'), RANK_LEGEND),
            low=0,
        ),
    ),
)

DATA = Dashboard("data", "Data", "Do images come fast enough, and can they be used.", (WAITING, FLOW, DAMAGE))
