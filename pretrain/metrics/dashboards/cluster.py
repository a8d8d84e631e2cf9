"""The ranks beside each other, and the machines they are on."""

from typing import Any

from pretrain.metrics import names
from pretrain.metrics.dashboards.panels import (
    GREEN,
    RANK_LEGEND,
    RED,
    WINDOW,
    YELLOW,
    Dashboard,
    Panel,
    Query,
    Row,
    draw,
    legend_of,
    mean_seconds,
    rate,
    recorded,
    select,
    show,
)

ON_NODE = 'job="node",node=~"$node"'
ON_GPU = 'node=~"$node"'
GPU_LEGEND = "{{node}} GPU {{gpu}}"
BUCKETS = select(names.STEP_SECONDS, suffix="_bucket")
IDLE = f'rate(node_cpu_seconds_total{{{ON_NODE},mode="idle"}}{WINDOW})'


def of_node(title: str, unit: str, note: str, *queries: Query, **look: Any) -> Panel:
    return Panel(title, queries, unit, note, width=6, low=0, **look)


def traffic(metric: str, labels: str = "") -> str:
    """Bytes per second of each node."""
    return f"sum by (node) (rate({metric}{{{ON_NODE}{labels}}}{WINDOW}))"


RANKS = Row(
    "Ranks",
    (
        show(
            names.RANK_SPEED,
            "Speed beside the other ranks",
            width=12,
            low=0,
            limits=((0.6, YELLOW), (0.85, GREEN)),
            base=RED,
        ),
        draw(
            "Own work of a step",
            "s",
            [names.WORK_SECONDS],
            Query(select(names.WORK_SECONDS), legend_of(names.WORK_SECONDS)),
            width=12,
            low=0,
        ),
        draw(
            "Step time by rank",
            "s",
            [names.STEP_SECONDS],
            Query(recorded("rank:pretrain_step_seconds:mean5m"), RANK_LEGEND),
            note="Mean over 5 minutes. Ranks wait for each other, so all are as slow as the slowest.",
            low=0,
        ),
        draw(
            "Slowest rank over the mean",
            "none",
            [names.WORK_SECONDS],
            Query(recorded("run:pretrain_rank_work_seconds:spread5m"), "slowest / mean"),
            note="Of the own work. What lies above 1 is lost on every rank.",
            low=1,
            limits=((1.15, YELLOW), (1.6, RED)),
        ),
        draw(
            "Step times",
            "s",
            [names.STEP_SECONDS],
            Query(f"sum by (le) (increase({BUCKETS}{WINDOW}))", "{{le}}"),
            note="How many steps took how long.",
            kind="heatmap",
        ),
        draw(
            "Sections of a step",
            "s",
            [names.SECTION_SECONDS],
            Query(mean_seconds(names.SECTION_SECONDS, "section"), "{{section}}"),
            note="Mean time each time it is entered, over the chosen ranks.",
            width=12,
            low=0,
        ),
        draw(
            "Ranks that answer",
            "short",
            [],
            Query('sum(up{job="pretrain",run="$run"})', "answer"),
            Query('count(up{job="pretrain",run="$run"})', "should"),
            note="`up`: made by Prometheus for each of its targets.",
            kind="stat",
            width=6,
            low=0,
        ),
        draw(
            "Encoder passes",
            "suffix: /s",
            [names.BACKBONE_CALLS],
            Query(f"sum({rate(names.BACKBONE_CALLS)})", "all ranks"),
            width=6,
            low=0,
        ),
    ),
)

COMPUTE = Row(
    "Compute and memory",
    (
        draw(
            "FLOPs of the model",
            "flops",
            [names.MODEL_FLOPS, names.PEAK_FLOPS],
            Query(f"sum({rate(names.MODEL_FLOPS)})", "model"),
            Query(select(names.PEAK_FLOPS), "peak ({{source}})"),
            low=0,
        ),
        show(names.DEVICE_MEMORY, "GPU memory by torch", low=0),
        show(names.RESIDENT_MEMORY, "Host memory of the ranks", low=0),
    ),
)

GPUS = Row(
    "GPUs (DCGM exporter)",
    (
        of_node(
            "Tensor cores at work",
            "percentunit",
            "Share of the time in which the tensor cores worked: what the GPUs are for.",
            Query(f"DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{{ON_GPU}}}", GPU_LEGEND),
            high=1,
        ),
        of_node(
            "GPU utilisation",
            "percentunit",
            "Share of the time in which any kernel ran: a high one says little, a low one much.",
            Query(f"DCGM_FI_DEV_GPU_UTIL{{{ON_GPU}}} / 100", GPU_LEGEND),
            high=1,
        ),
        of_node(
            "GPU memory used",
            "bytes",
            "By all processes on the GPU.",
            Query(f"DCGM_FI_DEV_FB_USED{{{ON_GPU}}} * 1048576", GPU_LEGEND),
        ),
        of_node(
            "GPU power",
            "watt",
            "A GPU far below the others waits, or is held back.",
            Query(f"DCGM_FI_DEV_POWER_USAGE{{{ON_GPU}}}", GPU_LEGEND),
        ),
    ),
)

NODES = Row(
    "Nodes (node exporter)",
    (
        of_node(
            "CPU at work",
            "percentunit",
            "Share of all cores. At 100 % everything may wait for the decoding of images.",
            Query(f"1 - avg by (node) ({IDLE})", "{{node}}"),
            high=1,
            limits=((0.85, YELLOW), (0.95, RED)),
        ),
        of_node(
            "Memory left",
            "bytes",
            "What can be used without swapping.",
            Query(f"node_memory_MemAvailable_bytes{{{ON_NODE}}}", "{{node}}"),
        ),
        of_node(
            "Network",
            "Bps",
            "Of the kernel's interfaces, loopback left out. InfiniBand's own traffic is not in it.",
            Query(traffic("node_network_receive_bytes_total", ',device!="lo"'), "{{node}} in"),
            Query(traffic("node_network_transmit_bytes_total", ',device!="lo"'), "{{node}} out"),
        ),
        of_node(
            "Disk",
            "Bps",
            "Of local disks.",
            Query(traffic("node_disk_read_bytes_total"), "{{node}} read"),
            Query(traffic("node_disk_written_bytes_total"), "{{node}} written"),
        ),
    ),
)

CLUSTER = Dashboard(
    "cluster",
    "Cluster and stragglers",
    "The ranks beside each other, and the machines they are on.",
    (RANKS, COMPUTE, GPUS, NODES),
    has_nodes=True,
)
