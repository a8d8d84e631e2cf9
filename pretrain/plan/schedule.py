"""How long the run is, and how often it should save: predictions."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.plan.recipe import Settings

HOST_COPY_BYTES_PER_SECOND = 10e9  # of a snapshot from the GPU into host memory; assumed


@dataclass(frozen=True)
class Saving:
    """Checkpoints against failures (Young, 1974; Daly, 2006)."""

    checkpoint_bytes: float
    write_seconds: float
    pause_seconds: float  # of the training
    mean_hours_to_failure: float  # of any node
    best_every_steps: int  # about sqrt(2 * pause * time to failure)
    lost_ratio: float  # of the time, saving at that interval: pauses and work done again
    every_steps: int  # as the config says
    lost_ratio_as_set: float  # saving so


def images_of(settings: Settings, given: int | None) -> int | None:
    """Images of the training data: as given, or from the indexes; None where neither tells."""
    if given is not None:
        return given
    data = settings["data"]
    sources = data["sources"] or [{"shards": data["shards"], "split": data["split"]}]
    counts = [_indexed(source["shards"], source["split"]) for source in sources]
    return None if None in counts else sum(count for count in counts if count is not None)


def _indexed(shards: str, split: str) -> int | None:
    """What a local index says; another is not fetched for a plan."""
    try:
        index: Any = json.loads((Path(shards) / "index.json").read_text())
        count = index["num_samples"][split]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if isinstance(count, int) else None


def num_steps(settings: Settings, num_images: int | None) -> int:
    """As `build.num_steps`; UserError where the length is in epochs of nobody knows how many images."""
    schedule = settings["schedule"]
    if schedule["steps"] is not None:
        return int(schedule["steps"])
    if schedule["epochs"] is None:
        raise UserError("schedule: gives no length; set schedule.epochs or schedule.steps")
    if num_images is None:
        data = settings["data"]
        where = data["shards"] or ", ".join(source["shards"] for source in data["sources"])
        raise UserError(
            f"data: {where} has no index.json here that tells how many images it holds; give --images N"
        )
    steps = round(float(schedule["epochs"]) * num_images / settings["batch"]["global_size"])
    return max(1, int(steps))


def saving_of(
    settings: Settings,
    checkpoint_bytes: float,
    step_seconds: float,
    *,
    nodes: int,
    disk_bytes_per_second: float,
    node_hours: float,
    host_bytes_per_second: float = HOST_COPY_BYTES_PER_SECOND,
) -> Saving:
    """node_hours: mean time to a failure of one node. host_bytes_per_second: of a copy from GPU to host."""
    write = checkpoint_bytes / disk_bytes_per_second
    is_aside = settings["checkpoint"]["asynchronous"]
    pause = checkpoint_bytes / host_bytes_per_second if is_aside else write
    failure = 3600 * node_hours / nodes

    def lost(steps: int) -> float:
        interval = steps * step_seconds
        return pause / interval + (interval / 2 + (write if is_aside else 0.0)) / failure

    # a checkpoint that is written aside counts when it is complete, so none is begun before the last is
    best = max(1, round(max(math.sqrt(2 * pause * failure), write) / step_seconds))
    return Saving(
        checkpoint_bytes,
        write,
        pause,
        failure / 3600,
        best,
        lost(best),
        settings["checkpoint"]["every_steps"],
        lost(settings["checkpoint"]["every_steps"]),
    )
