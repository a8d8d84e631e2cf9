"""A training run, top to bottom: prepare the folder, build the parts, loop."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import build, checkpoint, cluster
from pretrain.checkpoint import Checkpoint
from pretrain.config import RunConfig
from pretrain.data.loader import Batch, Batches, open_batches, pool_bytes
from pretrain.data.manifest import Manifest, Split
from pretrain.engine.engine import Engine, OptimizerState
from pretrain.errors import CheckpointError, TrainingError, UserError
from pretrain.metrics import names
from pretrain.metrics.exporter import open_exporter
from pretrain.metrics.meter import JsonLines, Meter
from pretrain.models.teacher import Teacher
from pretrain.randomness import bits
from pretrain.schedules import Schedule, cosine_momentum
from pretrain.tasks.multitask import BACKBONE_PREFIX
from pretrain.views.prepare import Inputs, Recipe, prepare

logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    config: RunConfig
    output_dir: Path
    resume: str  # "none", "auto", or the path of a checkpoint or run


@dataclass(frozen=True)
class Inspected:
    """What was found out before anything was started."""

    manifest: Manifest
    split: Split
    sizes: build.Sizes
    num_steps: int
    resume_from: Path | None


def inspect(request: Request, place: cluster.Cluster) -> Inspected:
    """Everything that can be wrong with the input is found here. Starts no process and touches no GPU.

    The run folder is looked at by rank 0 alone: it may already be writing there when another rank arrives.
    """
    config = request.config
    build.check(config, place.world_size)
    manifest = Manifest.load(config.data.shards)
    split = manifest.split(config.data.split)
    build.check_order(config, split)
    resume_from = _find_checkpoint(request) if place.is_first else None
    if resume_from is not None:
        found = json.loads((resume_from / checkpoint.STATE).read_text())
        checkpoint.check_identity(resume_from, found.get("identity", {}), identity(config, manifest))
    return Inspected(
        manifest,
        split,
        build.sizes(config, place.world_size),
        build.num_steps(config, split.num_samples),
        resume_from,
    )


def identity(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote the checkpoint: data, order, model and tasks.

    Learning rate, schedule, precision, ZeRO stage and ranks may change.
    """
    settings = config.model_dump(mode="json")
    return {
        "manifest_hash": manifest.hash,
        "seed": config.seed,
        "lanes": config.data.lanes,
        "shuffle_block": config.data.shuffle_block,
        "split": config.data.split,
        "global_batch": config.batch.global_size,
        "accumulation_steps": config.batch.accumulation_steps,
        "model": settings["model"],
        "views": settings["views"],
        "tasks": settings["tasks"],
        "balance": settings["balance"],
        "normalization": settings["normalization"],
        "teacher": settings["teacher"],
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
    config, split = request.config, inspected.split
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
        f"x ranks {per.world_size}; lr {config.optim.scaled_lr(per.global_batch):.3g} "
        f"(base {config.optim.base_lr:g} per {config.optim.lr_batch})",
        f"data {split.num_samples} images in {len(split.shards)} shards of '{config.data.split}'; "
        + ("resident on the device" if config.data.resident else _pool(config, split, per.world_size, place)),
        f"{config.model.name} at {config.model.img_px} px, patch {config.model.patch_px} px; tasks "
        f"{', '.join(config.tasks.enabled())}; {len(config.views)} views in one encoder pass",
        f"{inspected.num_steps} steps = "
        f"{inspected.num_steps * per.global_batch / split.num_samples:.2f} epochs; into {request.output_dir}",
    ]
    return "\n".join(lines)


def _pool(config: RunConfig, split: Split, world_size: int, place: cluster.Cluster) -> str:
    num_lanes = config.data.lanes * place.local_world_size // world_size
    return f"shuffle pool {pool_bytes(config.data, split, num_lanes) / 2**20:.0f} MiB per node"


def run(request: Request, inspected: Inspected, place: cluster.Cluster) -> None:
    """Train to the end. Every rank calls this."""
    log = open_folder(request, inspected) if place.is_first else None
    try:
        with cluster.connected(place):
            _run(request, inspected, place)
    finally:
        if log:
            logger.removeHandler(log)
            log.close()


def _run(request: Request, inspected: Inspected, place: cluster.Cluster) -> None:
    config, run_dir, device = request.config, request.output_dir, place.device
    inspected = replace(inspected, resume_from=cluster.from_first(inspected.resume_from))
    logger.info(describe(request, inspected, place))
    peers = cluster.peers(place)
    saved = checkpoint.read_checkpoint(inspected.resume_from) if inspected.resume_from else None
    step = int(saved.state["step"]) if saved else 0
    batches = open_batches(
        config.data,
        inspected.manifest,
        list(config.views.values()),
        seed=config.seed,
        batch_size=build.micro_step_batch(config),
        rank=place.rank,
        world_size=place.world_size,
        start_micro_step=step * config.batch.accumulation_steps,
        device=device,
        quarantine_path=run_dir / "quarantine.jsonl",
    )
    try:
        module = build.module(config, peers, device)
        if saved:
            load_weights(module, saved)
        teacher = Teacher(module.backbone) if config.teacher else None
        if teacher and saved and saved.teacher:
            teacher.load_state_dict(_without_prefix(saved.teacher))
        engine = build.engine(config, module, peers)
        if saved:
            restore_optimizer(engine, saved)
            logger.info("resumed from %s at step %d", saved.folder, step)
        elif request.resume == "auto":
            logger.info("nothing to resume in %s: starting at step 0", run_dir)
        meter = open_meter(request, inspected, place, step)
        loop = Loop(request, inspected, place, engine, teacher, batches, meter)
        loop.train(step)
    finally:
        batches.close()


class Loop:
    """The loop and what it keeps between steps."""

    def __init__(
        self,
        request: Request,
        inspected: Inspected,
        place: cluster.Cluster,
        engine: Engine,
        teacher: Teacher | None,
        batches: Batches,
        meter: Meter | None,
    ) -> None:
        config = request.config
        self.config = config
        self.run_dir = request.output_dir
        self.inspected = inspected
        self.place = place
        self.engine = engine
        self.teacher = teacher
        self.batches = batches
        self.meter = meter
        self.recipe: Recipe = build.recipe(config)
        self.num_steps = inspected.num_steps
        self.lr: Schedule = build.lr_schedule(config, inspected.split.num_samples)
        self.momentum = cosine_momentum(config.teacher.momentum, self.num_steps) if config.teacher else None
        self.identity = identity(config, inspected.manifest)
        self.nonfinite_in_a_row = 0

    def train(self, step: int) -> None:
        last_saved = step
        while step < self.num_steps:
            self.train_step(step)
            step += 1
            if step % self.config.checkpoint.every_steps == 0 or step == self.num_steps:
                self.save(step)
                last_saved = step
        assert last_saved == step

    def train_step(self, step: int) -> None:
        """Take the step that follows `step` finished ones."""
        started, waited = time.perf_counter(), self.batches.wait_seconds
        # dropout and drop path, if a model has them, draw the same numbers after a resume
        torch.manual_seed(int(bits(self.config.seed, step, self.place.rank, 0, 1)))
        inputs, tally = self._micro_inputs(step)
        lr = self.lr(step)
        output = self.engine.train_step(inputs, lr, tally)
        values = {**output.values, "grad_norm": output.grad_norm, "lr": lr}
        values["samples"], values["bad_samples"] = values.pop("extra/0"), values.pop("extra/1")
        values["backbone_calls"] = float(self.engine.module.num_backbone_calls)
        if self.teacher and self.momentum and not output.skipped:
            values["momentum"] = self.momentum(step)
            student = self.engine.student(self.engine.module.backbone, BACKBONE_PREFIX)
            self.teacher.update(student, values["momentum"])
        if self.meter:
            self.meter.record(
                step + 1,
                values,
                skipped=output.skipped,
                seconds=time.perf_counter() - started,
                wait_seconds=self.batches.wait_seconds - waited,
            )
        self._guard(step + 1, output.skipped)

    def _micro_inputs(self, step: int) -> tuple[Iterator[Inputs], Callable[[], Tensor]]:
        """Inputs of the micro steps, made one at a time, and what they add up to once they are all made."""
        device = self.place.device
        digests: list[Tensor] = []

        def generate() -> Iterator[Inputs]:
            for micro in range(self.config.batch.accumulation_steps):
                batch = next(self.batches)
                micro_step = step * self.config.batch.accumulation_steps + micro
                digests.append(samples_digest(batch, micro_step, self.place.rank))
                epochs, ids = batch.epochs.to(device), batch.sample_ids.to(device)
                yield prepare(self.recipe, self.config.seed, batch.crops[0].to(device), epochs, ids)

        def tally() -> Tensor:
            bad = torch.tensor(float(self.batches.num_bad), dtype=torch.float64)
            return torch.stack([torch.stack(digests).sum(), bad]).to(device)

        return generate(), tally

    def _guard(self, step: int, skipped: bool) -> None:
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if skipped else 0
        if skipped:
            logger.warning("step %d: a loss or gradient was not finite on some rank; skipped on all", step)
        if self.nonfinite_in_a_row >= self.config.guard.max_nonfinite_steps:
            raise TrainingError(
                f"step {step}: {self.nonfinite_in_a_row} steps in a row were not finite; lower "
                "optim.base_lr or set engine.precision=fp32, and continue from a checkpoint in "
                f"{self.run_dir / checkpoint.FOLDER}"
            )

    def save(self, step: int) -> None:
        """Gather the state on rank 0, which writes it while the others wait."""
        started = time.perf_counter()
        student = self.engine.weights()
        optimizer = self.engine.optimizer_state()
        problem = None
        if self.place.is_first:
            state = {
                "step": step,
                "optimizer_steps": optimizer.num_steps,
                "world_size": self.place.world_size,
                "registers": list(self.engine.module.layout.registers),
                "identity": self.identity,
            }
            tensors: dict[str, Mapping[str, Tensor]] = {
                checkpoint.STUDENT: student,
                checkpoint.OPTIMIZER: optimizer.tensors,
            }
            if self.teacher:
                kept = {f"{BACKBONE_PREFIX}{k}": v.cpu() for k, v in self.teacher.state_dict().items()}
                tensors[checkpoint.TEACHER] = kept
            try:
                checkpoint.write_checkpoint(self.run_dir, step, tensors, state, self.config.to_yaml())
                keep = self.config.checkpoint
                checkpoint.prune(self.run_dir, keep.keep_last, keep.keep_every_steps)
            except OSError as error:
                problem = f"the checkpoint of step {step} could not be written: {error}"
        problem = cluster.from_first(problem)
        if problem:
            raise TrainingError(problem)
        if self.meter:
            seconds = time.perf_counter() - started
            self.meter.exporter.set(names.CHECKPOINT_SECONDS, seconds)
            self.meter.exporter.set(names.CHECKPOINT_STEP, step)
            logger.info("checkpoint of step %d written in %.1f s", step, seconds)


def samples_digest(batch: Batch, micro_step: int, rank: int) -> Tensor:
    """A number that depends on every sample, its epoch and its place in the global batch: float64 ().

    The sum over ranks is the same however many ranks share the batch, and exact: 32 bits a sample.
    """
    first = rank * len(batch.sample_ids)
    places = torch.arange(first, first + len(batch.sample_ids))
    state = bits(micro_step, batch.epochs, batch.sample_ids * (1 << 20) + places, 0, 1)
    return ((state >> 32) & 0xFFFFFFFF).double().sum()


def load_weights(module: torch.nn.Module, saved: Checkpoint) -> None:
    expected = module.state_dict()
    missing, unexpected = expected.keys() - saved.student.keys(), saved.student.keys() - expected.keys()
    reshaped = [
        n for n in expected.keys() & saved.student.keys() if expected[n].shape != saved.student[n].shape
    ]
    if missing or unexpected or reshaped:
        example = next(iter([*missing, *unexpected, *reshaped]))
        raise CheckpointError(
            f"{saved.folder}: holds the weights of another model ({len(missing)} missing, {len(unexpected)} "
            f"unexpected, {len(reshaped)} of another shape, such as '{example}')"
        )
    module.load_state_dict(saved.student)


def restore_optimizer(engine: Engine, saved: Checkpoint) -> None:
    engine.load_optimizer_state(OptimizerState(int(saved.state["optimizer_steps"]), saved.optimizer))


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(BACKBONE_PREFIX): value for name, value in weights.items()}


def open_meter(request: Request, inspected: Inspected, place: cluster.Cluster, step: int) -> Meter | None:
    if not place.is_first:
        return None
    config = request.config
    exporter, url, problem = open_exporter(config.log.prometheus)
    if url:
        logger.info("metrics at %s", url)
    if problem:
        logger.warning("metrics are not served: %s", problem)
    return Meter(
        JsonLines(request.output_dir / "metrics.jsonl", resumed_at=step),
        exporter,
        build.headlines(config),
        every_steps=config.log.every_steps,
        num_steps=inspected.num_steps,
        global_batch=config.batch.global_size,
        images_per_epoch=inspected.split.num_samples,
    )


def open_folder(request: Request, inspected: Inspected) -> logging.Handler:
    """Make the run folder, sweep what a killed run left, write down what will run, and open its log."""
    run_dir = request.output_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(run_dir)
        (run_dir / "config.yaml").write_text(request.config.to_yaml())
        (run_dir / "environment.json").write_text(json.dumps(environment(), indent=1))
        handler = logging.FileHandler(run_dir / "train.log")
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be written ({error.strerror}); choose another --output-dir"
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    if inspected.resume_from and run_dir.resolve() in inspected.resume_from.resolve().parents:
        step = json.loads((inspected.resume_from / checkpoint.STATE).read_text())["step"]
        for folder in checkpoint.set_aside(run_dir, int(step)):
            logger.warning("a checkpoint beyond the one resumed from was renamed to %s", folder)
    return handler


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever wants to repeat the run."""
    packages = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy", "safetensors", "pydantic")
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": commit or None,
    }
