"""Before a run: what was asked, what was found out, and whether it can start at all.

Everything is looked at in one pass, so that one attempt tells all that is to be mended.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import Tensor

from pretrain import attempts, build, changes, checkpoint, cluster
from pretrain.check import check_lengths, check_tasks, told
from pretrain.check import find_problems as problems_of_settings
from pretrain.config import RunConfig
from pretrain.data.loader import DataConfig, mixture_of, open_splits, pool_bytes, ring_bytes
from pretrain.data.manifest import Split
from pretrain.data.mixture import Mixture
from pretrain.data.streaming import check_shared_memory
from pretrain.errors import CheckpointError, UserError
from pretrain.metrics.exporter import PORT_TRIES, PrometheusConfig
from pretrain.models.compiled import missing_tool
from pretrain.online_knn import choose_images
from pretrain.views.plan import encoder_calls

T = TypeVar("T")

# the oldest versions that work, as in pyproject.toml
OLDEST = {"torch": (2, 10), "deepspeed": (0, 19, 3), "timm": (1, 0, 16)}
NUM_CHECKPOINTS = 2  # there must be room for: the last one, and the one being written
# open files of a trainer and of its loader: 28 and 11 were seen on two CPU ranks; the rest is for GPUs
FILES_OF_TRAINER = 128
FILES_PER_PEER = 2  # its connections
FILES_OF_LOADER = 64  # and a compressed shard stays open for each lane


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    config: RunConfig
    output_dir: Path
    resume: str  # "none", "auto", or the path of a checkpoint or run
    allow_new_data: bool = False  # continue a run on other shards, from their beginning
    allow_changes: tuple[str, ...] = ()  # names of `changes.ALLOWED_KEYS` that may differ on resume
    mirror_was_asked: bool = False  # so that what the run folder has now is all there is


@dataclass(frozen=True)
class Inspected:
    """What was found out before anything was started."""

    splits: tuple[Split, ...]  # one of each source
    mixture: Mixture
    sizes: build.Sizes
    num_steps: int
    resume_from: Path | None
    data_start_step: int = 0  # the step at which these data began; not 0 where a run went on with new data
    changes: changes.Changes | None = None  # since the checkpoint to resume from was written
    warnings: tuple[str, ...] = ()  # a line each


@dataclass(frozen=True)
class Problem:
    """Something that a run cannot start with, or, as a warning, that it would suffer from."""

    error: UserError
    is_warning: bool = False

    @property
    def line(self) -> str:
        """What is wrong, where, and the remedy."""
        return str(self.error)


@dataclass
class _Findings:
    """Problems as they are found. A look that fails does not keep the next from being taken."""

    problems: list[Problem] = field(default_factory=list)

    def look(self, at: Callable[[], T]) -> T | None:
        try:
            return at()
        except UserError as error:
            self.problems.append(Problem(error))
            return None

    def warn(self, line: str | None) -> None:
        if line is not None:
            self.problems.append(Problem(UserError(line), is_warning=True))

    @property
    def errors(self) -> list[UserError]:
        return [problem.error for problem in self.problems if not problem.is_warning]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(problem.line for problem in self.problems if problem.is_warning)


def inspect(request: Request, place: cluster.Cluster) -> Inspected:
    """Everything that can be wrong with the input is found here. Starts no process and touches no GPU.

    Several problems are one UserError of several lines. The run folder is looked at by rank 0 alone: it may
    already be writing there when another rank arrives.
    """
    findings = _Findings()
    inspected = _examine(request, place, findings)
    errors = findings.errors
    if errors:
        raise errors[0] if len(errors) == 1 else UserError(told(errors))
    assert inspected is not None, "a look has failed without a word"
    return inspected


def find_problems(request: Request, place: cluster.Cluster) -> list[Problem]:
    """Everything that is or may be wrong with a run that would start now and here, in one pass."""
    findings = _Findings()
    _examine(request, place, findings)
    if place.is_first:
        findings.warn(busy_port(request.config.log.prometheus))
    findings.look(lambda: check_rendezvous(place))
    return findings.problems


def find_problems_of_machine(place: cluster.Cluster) -> list[Problem]:
    """Those that do not depend on the settings, for when these cannot be read."""
    findings = _Findings()
    _examine_machine(place, findings, "deepspeed", num_lanes=0)
    findings.look(lambda: check_rendezvous(place))
    return findings.problems


def _examine_machine(place: cluster.Cluster, findings: _Findings, engine: str, num_lanes: int) -> None:
    for package in OLDEST:
        if package != "deepspeed" or engine == "deepspeed":
            findings.look(lambda package=package: check_version(package))  # type: ignore[misc]
    findings.look(lambda: check_open_files(place.world_size, num_lanes))


def _examine(request: Request, place: cluster.Cluster, findings: _Findings) -> Inspected | None:
    """All looks in turn; one that another has made pointless is left out. None if one has failed."""
    config, look = request.config, findings.look
    of_settings = problems_of_settings(config, place.world_size)
    findings.problems += [Problem(error) for part in of_settings.values() for error in part]
    _examine_machine(place, findings, config.engine.kind, config.data.lanes // place.world_size)
    look(lambda: check_compiler(config, place.device.type))
    per = build.sizes(config, place.world_size)
    mixture, num_samples = None, 0
    splits = look(lambda: open_splits(config.data))
    if splits is not None:
        num_samples = sum(split.num_samples for split in splits)
        # a wrong batch is told already; one sample of each lane shows what is wrong with the lanes themselves
        of_step = config.data.lanes if "batch" in of_settings else build.micro_step_batch(config)
        mixture = look(lambda: mixture_of(config.data, splits, config.seed, of_step))
        if of_settings.keys().isdisjoint(("tasks", "model", "views", "names")):
            look(lambda: check_tasks(config, num_samples))
        if "schedule" not in of_settings:
            look(lambda: check_lengths(config, num_samples))
        if place.is_first:  # a million shards are looked at once, not once a rank
            for manifest in {split.manifest.folder: split.manifest for split in splits}.values():
                look(manifest.check_shards)
            look(lambda: _check_labels(splits, config))
            online_knn = config.online_knn
            if online_knn is not None:
                look(lambda: choose_images(online_knn, config.data))
            share = place.local_world_size / place.world_size
            findings.warn(look(lambda: small_cache(config.data, splits, share)))
    if of_settings.keys().isdisjoint(("views", "batch")):
        look(lambda: _check_ring(config, per.micro_batch, place.local_world_size))
    resume_from, found = None, None
    if place.is_first:
        look(lambda: changes.check_names(request.allow_changes))
        resume_from = look(lambda: _find_checkpoint(request))
        files = None
        if of_settings.keys().isdisjoint(("tasks", "model", "views", "names", "teacher", "patches")):
            files = look(lambda: changes.outline(config, num_samples))
            if files is not None:
                num_bytes = changes.num_bytes(files)
                goes_on = request.resume == "auto" and (request.output_dir / attempts.FOLDER).is_dir()
                _look_at_disk(request.output_dir, num_bytes, findings, goes_on)
        if resume_from is not None and splits is not None:
            folder = resume_from
            found = look(lambda: _check_changes(request, folder, splits, files))
    if findings.errors:
        return None
    assert splits is not None
    assert mixture is not None
    data_start_step, differing = found or (0, None)
    return Inspected(
        splits,
        mixture,
        per,
        build.num_steps(config, num_samples),
        resume_from,
        data_start_step,
        differing,
        findings.warnings,
    )


def _check_changes(
    request: Request,
    folder: Path,
    splits: Sequence[Split],
    files: Mapping[str, Mapping[str, Tensor]] | None,
) -> tuple[int, changes.Changes]:
    """The step at which the data of the run began, and what has changed since the checkpoint."""
    state = json.loads((folder / checkpoint.STATE).read_text())
    saved_config = yaml.safe_load((folder / checkpoint.CONFIG).read_text())
    own_identity = identity(request.config, splits)
    differing = changes.compare(saved_config, state.get("identity", {}), request.config, own_identity)
    changes.check_allowed(folder, differing, request.allow_changes, request.allow_new_data)
    if differing.keys and files is not None:
        changes.check_fit(folder, differing, files)
    start = state["step"] if differing.moves_data else state.get("data_start_step", 0)
    return int(start), differing


def _check_labels(splits: Sequence[Split], config: RunConfig) -> None:
    """The classes that the images are labelled with are those that the task knows."""
    if config.tasks.classification is None:
        return
    num_classes, largest = config.tasks.classification.num_classes, -1
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


def _check_ring(config: RunConfig, micro_batch: int, num_local_ranks: int) -> None:
    """The shared memory of a node holds the finished batches of its ranks."""
    if config.data.resident or not config.data.decode_threads:
        return
    of_a_rank = ring_bytes(config.data, list(config.views.values()), micro_batch)
    if config.tasks.cluster_labels is not None:
        of_a_rank *= 2  # a second loader reads all images between epochs
    check_shared_memory(num_local_ranks * of_a_rank)


def check_version(package: str) -> None:
    oldest = OLDEST[package]
    wanted = ".".join(str(number) for number in oldest)
    remedy = f"install {package}>={wanted}"
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{package}: is not installed; {remedy}") from None
    release = re.match(r"\d+(\.\d+)*", installed)
    numbers = tuple(int(number) for number in release.group().split(".")) if release else ()
    if numbers < oldest:
        raise UserError(f"{package}: {installed} is installed, too old to work; {remedy}")


def check_open_files(world_size: int, num_lanes: int) -> None:
    """The limits are high enough for a rank that talks to all others, and for its loader.

    num_lanes: of the rank. The loader raises its own limit as far as it may.
    """
    allowed, at_most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = {
        "-n": (allowed, FILES_OF_TRAINER + FILES_PER_PEER * world_size),
        "-Hn": (at_most, FILES_OF_LOADER + num_lanes),
    }
    for flag, (limit, needed) in limits.items():
        if limit != resource.RLIM_INFINITY and limit < needed:
            raise UserError(
                f"open files: {limit} are allowed (`ulimit {flag}`), and a rank needs up to {needed}; raise "
                "the limit where the run is started"
            )


def check_compiler(config: RunConfig, device_type: str) -> None:
    """Where blocks are to be compiled, there is something to compile them with."""
    missing = missing_tool(device_type) if build.compiles(config, device_type) else None
    if missing is not None:
        raise UserError(
            f"engine.compile: '{config.engine.compile}' needs {missing}, which this machine lacks; "
            "install it, or set engine.compile=off"
        )


def _look_at_disk(output_dir: Path, num_bytes: int, findings: _Findings, goes_on: bool) -> None:
    """A run that goes on may do so on a full disk: room may come, and it ends by itself if none does."""
    try:
        check_disk(output_dir, num_bytes)
    except UserError as error:
        findings.problems.append(Problem(error, is_warning=goes_on))


def check_disk(output_dir: Path, checkpoint_bytes: int) -> None:
    """There is room for checkpoints where they will be written; a user's quota cannot be seen from here."""
    missing = max(1, NUM_CHECKPOINTS - len(checkpoint.list_checkpoints(output_dir)))
    status = os.statvfs(_existing(output_dir))
    free = status.f_bavail * status.f_frsize
    if free < missing * checkpoint_bytes:
        raise UserError(
            f"{output_dir}: {_size(free)} are free, and a checkpoint takes {_size(checkpoint_bytes)}: there "
            f"must be room for {missing}; free some, or choose another --output-dir"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def small_cache(config: DataConfig, splits: Sequence[Split], share: float) -> str | None:
    """Whether a node's cache is too small for what is read at one time. share: of the lanes, on this node.

    UserError if it cannot even hold the largest shard. Each lane reads a shard of its own, a block at a time:
    one that was evicted meanwhile is fetched again for every block.
    """
    if config.cache is None:
        return None
    room = int(config.cache.max_gib * 2**30)
    sizes = [split.manifest.shard_columns["num_bytes"][split.indices] for split in splits]
    largest = max(int(of_split.max(initial=0)) for of_split in sizes)
    where = f"data.cache.max_gib: {config.cache.max_gib:g}"
    if largest > room:
        raise UserError(
            f"{where} cannot hold the largest shard of {_size(largest)}; set it to "
            f"{_gib(largest)} or more, or do without the cache"
        )
    num_shards, all_bytes = sum(len(of_split) for of_split in sizes), sum(int(s.sum()) for s in sizes)
    num_open = min(num_shards, round(config.lanes * share))
    needed = all_bytes * num_open // max(1, num_shards)
    if room >= needed:
        return None
    return (
        f"{where} holds less than the {num_open} shards that the lanes of a node read at one time "
        f"({_size(needed)}), so shards are fetched many times over; set it to {_gib(needed)} or more, use "
        "fewer data.lanes, or do without the cache"
    )


def _gib(num_bytes: int) -> str:
    """Rounded up, as a setting in GiB."""
    return f"{-(-num_bytes * 100 // 2**30) / 100:g}"


def busy_port(config: PrometheusConfig) -> str | None:
    """Whether the metrics will be served elsewhere than asked, or not at all: no reason not to train."""
    if not config.enabled or config.port == 0:
        return None
    reason = _why_not_bound(config.address, config.port)
    if reason is None:
        return None
    for port in range(config.port + 1, min(config.port + PORT_TRIES, 65536)):
        if _why_not_bound(config.address, port) is None:
            return (
                f"log.prometheus.port: {config.address}:{config.port} cannot be had ({reason}), so metrics "
                f"will be at {port}; set it to a free one"
            )
    return (
        f"log.prometheus: {config.address}:{config.port} cannot be had ({reason}), nor the ports after it, "
        "so metrics will not be served; set another address or port"
    )


def _why_not_bound(address: str, port: int) -> str | None:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def check_rendezvous(place: cluster.Cluster, variables: Mapping[str, str] = os.environ) -> None:
    """The ranks can find rank 0: its address has a meaning here and, on rank 0 itself, its port is free."""
    if place.world_size == 1 or "MASTER_ADDR" not in variables or "MASTER_PORT" not in variables:
        return  # no launcher yet
    address, port = variables["MASTER_ADDR"], variables["MASTER_PORT"]
    try:
        socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(
            f"MASTER_ADDR: '{address}' with MASTER_PORT {port} cannot be resolved ({reason}); set them to a "
            "name or number that every node knows, and a port"
        ) from None
    # the agent of torchrun itself answers there
    if place.is_first and place.launcher != "torchrun":
        reason_not = _why_not_bound("0.0.0.0", int(port)) if int(port) else None
        if reason_not is not None:
            raise UserError(f"MASTER_PORT: {port} cannot be had ({reason_not}); set it to a free port")


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
    above = _existing(run)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{run}: {above} cannot be written to; choose another --output-dir")
    if resume == "none":
        if run.is_dir() and any(run.iterdir()):
            raise UserError(
                f"{run}: is not empty; continue it with --resume auto, or choose another --output-dir"
            )
        return None
    may_be_elsewhere = request.config.checkpoint.mirror is not None and not request.mirror_was_asked
    if resume == "auto":
        if not checkpoint.list_checkpoints(run):
            lost = attempts.progress_lost(run, has_folder=(run / checkpoint.FOLDER).is_dir())
            if lost and not may_be_elsewhere:
                raise CheckpointError(
                    f"{run}: {lost}; bring it back, or start anew with another --output-dir"
                )
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
    if found is None and resume == "auto" and may_be_elsewhere:
        return None
    if found is None:
        listed = f"all {len(rejected)} checkpoints are damaged" if rejected else "it holds no checkpoints"
        raise CheckpointError(f"{source}: cannot resume, {listed}; start anew with another --output-dir")
    return found


def _existing(path: Path) -> Path:
    """The path, or what there is of it."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


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
        f"{config.engine.precision}{', blocks compiled' * build.compiles(config, place.device.type)}",
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
