"""Before a run: what was asked, what was found out, and whether it can start at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import build, checkpoint, cluster
from pretrain.check import check, check_lengths, check_tasks
from pretrain.config import RunConfig
from pretrain.data.loader import mixture_of, open_splits, pool_bytes, ring_bytes
from pretrain.data.manifest import Split
from pretrain.data.mixture import Mixture
from pretrain.data.streaming import check_shared_memory
from pretrain.errors import CheckpointError, UserError
from pretrain.views.plan import encoder_calls

# of an identity: what --allow-new-data lets a resumed run change
DATA_KEYS = ("manifest_hash", "weights", "split", "lanes", "shuffle_block", "resident")


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    config: RunConfig
    output_dir: Path
    resume: str  # "none", "auto", or the path of a checkpoint or run
    allow_new_data: bool = False  # continue a run on other shards, from their beginning


@dataclass(frozen=True)
class Inspected:
    """What was found out before anything was started."""

    splits: tuple[Split, ...]  # one of each source
    mixture: Mixture
    sizes: build.Sizes
    num_steps: int
    resume_from: Path | None
    data_start_step: int = 0  # the step at which these data began; not 0 where a run went on with new data


def inspect(request: Request, place: cluster.Cluster) -> Inspected:
    """Everything that can be wrong with the input is found here. Starts no process and touches no GPU.

    The run folder is looked at by rank 0 alone: it may already be writing there when another rank arrives.
    """
    config = request.config
    check(config, place.world_size)
    splits = open_splits(config.data)
    mixture = mixture_of(config.data, splits, config.seed, build.micro_step_batch(config))
    check_tasks(config, mixture.num_samples)
    check_lengths(config, mixture.num_samples)
    if place.is_first:  # a million shards are looked at once, not once a rank
        for manifest in {split.manifest.folder: split.manifest for split in splits}.values():
            manifest.check_shards()
        if config.tasks.classification is not None:
            _check_labels(splits, config.tasks.classification.num_classes)
    per = build.sizes(config, place.world_size)
    if not config.data.resident and config.data.decode_threads:
        of_a_rank = ring_bytes(config.data, list(config.views.values()), per.micro_batch)
        if config.tasks.cluster_labels is not None:
            of_a_rank *= 2  # a second loader reads all images between epochs
        check_shared_memory(place.local_world_size * of_a_rank)
    resume_from = _find_checkpoint(request) if place.is_first else None
    data_start_step = 0
    if resume_from is not None:
        found = json.loads((resume_from / checkpoint.STATE).read_text())
        is_new_data = checkpoint.check_identity(
            resume_from,
            found.get("identity", {}),
            identity(config, splits),
            DATA_KEYS,
            request.allow_new_data,
        )
        data_start_step = int(found["step"] if is_new_data else found.get("data_start_step", 0))
    return Inspected(
        splits,
        mixture,
        per,
        build.num_steps(config, mixture.num_samples),
        resume_from,
        data_start_step,
    )


def _check_labels(splits: Sequence[Split], num_classes: int) -> None:
    """The classes that the images are labelled with are those that the task knows."""
    largest = -1
    for split in splits:
        for place in range(split.num_shards):
            labels = split.samples(split.shard(place)).labels
            largest = max(largest, int(labels.max(initial=-1)))
    if largest < 0:
        raise UserError(
            "tasks.classification: no image of the training data has a label; index shards with .cls files, "
            "or leave the task out"
        )
    if largest >= num_classes:
        raise UserError(
            f"tasks.classification.num_classes: {num_classes}, but the data have label {largest}; "
            f"set it to {largest + 1} or more"
        )


def identity(config: RunConfig, splits: Sequence[Split]) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote the checkpoint: data, order, model and tasks.

    Learning rate, schedule, precision, ZeRO stage and ranks may change.
    """
    settings = config.model_dump(mode="json")
    return {
        "manifest_hash": [split.manifest.hash for split in splits],
        "weights": [source.weight for source in config.data.all_sources],
        "seed": config.seed,
        "lanes": config.data.lanes,
        "shuffle_block": config.data.shuffle_block,
        "split": [split.name for split in splits],
        "max_pixels": config.data.max_pixels,
        "resident": config.data.resident,  # its crops may differ from streamed ones by a grey level
        "global_batch": config.batch.global_size,
        "accumulation_steps": config.batch.accumulation_steps,
        "model": settings["model"],
        "views": settings["views"],
        "order_of_views": list(settings["views"]),  # it chooses the random numbers
        "tasks": settings["tasks"],
        "balance": settings["balance"],
        "normalization": settings["normalization"],
        "teacher": settings["teacher"],
        "optimizer": config.optim.name,  # whose state the checkpoint holds
    }


def _find_checkpoint(request: Request) -> Path | None:
    """The checkpoint to continue from. Never turns a wish to resume into a fresh start silently."""
    run, resume = request.output_dir, request.resume
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; choose another --output-dir")
    above = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{run}: {above} cannot be written to; choose another --output-dir")
    if resume == "none":
        if run.is_dir() and any(run.iterdir()):
            raise UserError(
                f"{run}: is not empty; continue it with --resume auto, or choose another --output-dir"
            )
        return None
    if resume == "auto":
        if not checkpoint.list_checkpoints(run):
            return None
        source = run
    else:
        source = Path(resume)
        if not source.is_dir():
            raise CheckpointError(
                f"--resume {source}: no such folder; give a run, a checkpoint, 'auto' or 'none'"
            )
        is_own = run.resolve() in (source.resolve(), *source.resolve().parents)
        if run.is_dir() and any(run.iterdir()) and not is_own:
            raise UserError(f"{run}: is not empty and not the run to resume; choose another --output-dir")
    if (source / checkpoint.MANIFEST).exists():
        problems = checkpoint.verify(source)
        if problems:
            raise CheckpointError(f"{source}: {'; '.join(problems)}; choose another checkpoint")
        return source
    found, rejected = checkpoint.newest_valid(source)
    for line in rejected:
        print(f"pretrain: checkpoint rejected: {line}", file=sys.stderr)  # noqa: T201
    if found is None:
        listed = f"all {len(rejected)} checkpoints are damaged" if rejected else "it holds no checkpoints"
        raise CheckpointError(f"{source}: cannot resume, {listed}; start anew with another --output-dir")
    return found


def describe(request: Request, inspected: Inspected, place: cluster.Cluster) -> str:
    """The resolved layout, the first thing a run prints."""
    config, mixture = request.config, inspected.mixture
    per = inspected.sizes
    nodes = f"{place.num_nodes} node{'s' * (place.num_nodes > 1)}"
    if config.engine.kind == "local":
        engine = "local"
    else:
        zero = config.engine.deepspeed.get("zero_optimization", {})
        engine = f"deepspeed ZeRO-{zero.get('stage', 0) if isinstance(zero, dict) else 0}"
    lines = [
        f"{nodes} x {place.local_world_size} ranks on {place.device.type} ({place.launcher}); {engine}, "
        f"{config.engine.precision}",
        f"global batch {per.global_batch} = micro {per.micro_batch} x accumulation {per.accumulation_steps} "
        f"x ranks {per.world_size}; {_rate(config, per.global_batch)}",
        *_sources(mixture),
        f"{mixture.lanes} lanes; "
        + (
            "resident on the device"
            if config.data.resident
            else _pool(config, mixture, per.world_size, place)
        ),
        f"{config.model.name} at {config.model.img_px} px, patch {config.model.patch_px} px; tasks "
        f"{', '.join(config.tasks.enabled())}; {_passes(config)}",
        f"{inspected.num_steps} steps = "
        f"{inspected.num_steps * per.global_batch / mixture.num_samples:.2f} epochs; "
        f"into {request.output_dir}",
    ]
    return "\n".join(lines)


def _rate(config: RunConfig, global_batch: int) -> str:
    optim = config.optim
    scaling = "for every batch" if optim.lr_batch is None else f"base {optim.base_lr:g} per {optim.lr_batch}"
    return f"{optim.name}, lr {optim.scaled_lr(global_batch):.3g} ({scaling})"


def _passes(config: RunConfig) -> str:
    """How often the networks run in a micro step."""
    num_calls = len(encoder_calls(build.views(config)))
    student = "one encoder pass" if num_calls == 1 else f"{num_calls} encoder passes"
    taught = {view for views in build.teacher_views(config).values() for view in views}
    teacher = f", {len(taught)} of them in one pass of the teacher" if taught else ""
    return f"{len(config.views)} view{'s' * (len(config.views) > 1)} in {student}{teacher}"


def _sources(mixture: Mixture) -> list[str]:
    """A line for each source."""
    return [
        f"data {source.num_samples} images in {source.split.num_shards} shards of '{source.split.name}' in "
        f"{source.split.manifest.folder}"
        + (f"; {share:.1%} of every batch" if len(mixture.sources) > 1 else "")
        for source, share in zip(mixture.sources, mixture.shares, strict=True)
    ]


def _pool(config: RunConfig, mixture: Mixture, world_size: int, place: cluster.Cluster) -> str:
    num_lanes = config.data.lanes * place.local_world_size // world_size
    return f"shuffle pool {pool_bytes(config.data, mixture, num_lanes) / 2**20:.0f} MiB per node"
