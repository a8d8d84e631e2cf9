"""A training run, top to bottom: take the folder, meet the other ranks, build the parts, loop."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pretrain import __version__, attempts, build, checkpoint, cluster, mirror
from pretrain.attempts import Attempt
from pretrain.checkpoint import Checkpoint
from pretrain.checkpoint_writer import free_bytes
from pretrain.data.loader import Batches, open_batches
from pretrain.data.quarantine import num_allowed
from pretrain.engine.monitors import open_monitors
from pretrain.errors import EXIT_FAILED, CheckpointError, PreemptedError, TrainingError, UserError
from pretrain.final_export import export_at_end
from pretrain.loop import Loop, lost_peer, restore_optimizer
from pretrain.metrics import names
from pretrain.metrics.exporter import Exporter, open_exporter
from pretrain.metrics.meter import JsonLines, Meter, Work
from pretrain.metrics.rank_meter import RankMeter
from pretrain.metrics.server import Health
from pretrain.metrics.targets import Target, remove_targets, target_files, write_targets
from pretrain.online_knn import OnlineKnn
from pretrain.oversight import KINDS
from pretrain.preempt import Preemption
from pretrain.preflight import Inspected, Request, describe, inspect
from pretrain.relabel import Relabeler
from pretrain.rollbacks import read_rollbacks
from pretrain.run_folder import begin_attempt, environment, open_folder
from pretrain.saving import SETTLE_SECONDS, Saver
from pretrain.tasks.cluster_labels import ClusterLabelsTask
from pretrain.utilisation import model_work
from pretrain.views.plan import in_places
from pretrain.watchdog import Watchdog
from pretrain.work_time import WorkTime

logger = logging.getLogger("pretrain")

HEALTH = "health"


def run(request: Request, place: cluster.Cluster) -> None:
    """Train to the end. Every rank calls this.

    Wrong input ends it before anything is started. Only where another launcher has started several ranks do
    they connect first, so that a problem of one (only rank 0 looks at the run folder) ends all of them.
    PreemptedError: it was asked to stop, has saved its state, and can be started again.
    """
    config = request.config
    job = cluster.slurm_job()
    asks_slurm = place.is_first and job is not None and config.preempt.before_end_seconds is not None
    preemption = Preemption(config.preempt, cluster.job_seconds_left(job) if asks_slurm and job else None)
    preemption.install()
    inspected, attempt = None, None
    problem: Exception | None = None
    with ExitStack() as closing:
        closing.push(lambda kind, error, trace: _stop_listening(preemption, error))
        try:
            inspected = inspect(request, place)
            if place.is_first:
                inspected, attempt = _take_folder(request, inspected, place, closing)
        except (UserError, TrainingError) as error:
            if place.world_size == 1:
                raise
            problem = error
        with cluster.connected(place, config.cluster):
            problem = cluster.first_said(problem)
            if problem is not None:
                raise problem
            assert inspected is not None, "a rank that could not look has said why"
            number = cluster.from_first(attempt.number if attempt else 0)
            if attempt is None:
                attempt = attempts.joined(request.output_dir, number)
                closing.callback(attempt.finish, "done", 0)  # which only stops its watching
                attempt.watch(_fenced)
            try:
                _run(request, inspected, place, attempt, preemption)
            except RuntimeError as error:
                if place.world_size == 1 or not cluster.is_lost_peer(error):
                    raise
                raise TrainingError(f"rank {place.rank}: {lost_peer(error)}") from error


def _stop_listening(preemption: Preemption, error: BaseException | None) -> None:
    """Unless the run was preempted: then the signals that follow must not change the exit code."""
    if not isinstance(error, PreemptedError):
        preemption.close()


def _take_folder(
    request: Request, inspected: Inspected, place: cluster.Cluster, closing: ExitStack
) -> tuple[Inspected, Attempt]:
    """Hold the run folder as a new attempt, and look again at what another may have written meanwhile."""
    run_dir, config, job = request.output_dir, request.config, cluster.slurm_job()
    goes_on = request.resume == "auto"
    if goes_on:
        newest = checkpoint.step_of(inspected.resume_from) if inspected.resume_from else 0
        attempts.check_progress(run_dir, newest, config.guard.max_idle_attempts)
    before = checkpoint.list_checkpoints(run_dir)
    owner = attempts.this_process(job.name if job else None, job.restart if job else 0)
    attempt = begin_attempt(run_dir, owner)
    attempt.watch(_fenced)  # and beat: fetching from a mirror and waiting for ranks may take minutes
    outcome: list[Any] = [
        "failed",
        checkpoint.origin(inspected.resume_from)[1] if inspected.resume_from else 0,
    ]

    def finish(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PreemptedError):
            outcome[:] = ["preempted", error.step]
        elif error is None:
            outcome[:] = ["done", inspected.num_steps]
        attempt.finish(*outcome)

    closing.push(finish)
    asks_mirror = goes_on and (not before or inspected.resume_from != before[0])
    if config.checkpoint.mirror:
        _open_mirror(config.checkpoint.mirror, run_dir, inspected.resume_from, goes_on, asks_mirror)
    changed = checkpoint.list_checkpoints(run_dir) != before  # another attempt may have written meanwhile
    if goes_on and (changed or (config.checkpoint.mirror and asks_mirror)):
        inspected = inspect(replace(request, mirror_was_asked=True), place)
    log = open_folder(request, inspected, attempt)

    def close_log(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:  # the command line tells it after this log is closed
            is_known = isinstance(error, (UserError, TrainingError, PreemptedError))
            thrown = None if is_known else (type(error), error, error.__traceback__)
            log.handle(
                logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "stopped: %s", (error,), thrown)
            )
        logger.removeHandler(log)
        log.close()

    closing.push(close_log)
    return inspected, attempt


def _open_mirror(address: str, run_dir: Path, resume_from: Path | None, goes_on: bool, asks: bool) -> None:
    """Make sure that the mirror is this run's, and fetch what is newer than its newest whole checkpoint."""
    step, lineage = checkpoint.step_of(resume_from) if resume_from else -1, attempts.lineage(run_dir)
    pulled = None
    try:
        mirror.claim(address, run_dir, may_become=goes_on)
        if asks:
            pulled = mirror.pull_newest(
                address, run_dir, lambda attempt, at: at > step and lineage.allows(attempt, at)
            )
    except mirror.MirrorError as error:
        if resume_from is None:
            raise  # what is there may be all that is left of the run
        logger.warning("%s; the run goes on without its mirror for now", error)
    if pulled:
        held = f"nothing whole after step {step}" if resume_from else "no whole checkpoint"
        logger.info("%s has %s: %s was fetched from %s", run_dir, held, pulled.name, address)


def _fenced(newer: str) -> None:
    """Called from a thread: end at once, so that nothing more is written."""
    sys.stderr.write(f"pretrain: {newer} has taken over this run; ends\n")
    sys.stderr.flush()
    os._exit(EXIT_FAILED)


def _facts(request: Request, inspected: Inspected) -> dict[str, str]:
    """What all ranks must have in common."""
    settings = hashlib.sha256(request.config.to_yaml().encode()).hexdigest()[:12]
    data = {
        f"index of {split.manifest.folder} ({split.name})": split.manifest.hash for split in inspected.splits
    }
    return {**cluster.versions(), "configuration": settings, **data}


def _run(
    request: Request, inspected: Inspected, place: cluster.Cluster, attempt: Attempt, preemption: Preemption
) -> None:
    config, run_dir, device = request.config, request.output_dir, place.device
    resume_from, data_start_step = cluster.from_first((inspected.resume_from, inspected.data_start_step))
    inspected = replace(inspected, resume_from=resume_from, data_start_step=data_start_step)
    logger.info(describe(request, inspected, place))
    for line in inspected.warnings if place.is_first else ():
        logger.warning("%s", line)
    cluster.agree(_facts(request, inspected))
    with ExitStack() as closing:
        folder = run_dir / HEALTH / f"attempt-{attempt.number:04d}"
        watchdog = Watchdog(config.watchdog, place.rank, place.world_size, folder)
        closing.callback(watchdog.close)
        work_time = WorkTime(device)
        peers = work_time.watching(cluster.peers(place))
        saved = checkpoint.read_checkpoint(resume_from) if resume_from else None
        step = int(saved.state["step"]) if saved else 0
        went_back = read_rollbacks(run_dir, saved, data_start_step)
        num_rollbacks, passed_over = cluster.from_first(went_back)

        def open_at(data_step: int) -> Batches:
            return open_batches(
                config.data,
                inspected.splits,
                in_places(config.views),
                seed=config.seed,
                batch_size=build.micro_step_batch(config),
                rank=place.rank,
                world_size=place.world_size,
                start_micro_step=data_step * config.batch.accumulation_steps,
                device=device,
                quarantine_path=run_dir / "quarantine.jsonl",
            )

        loader: list[Batches] = [open_at(passed_over.data_step(step - data_start_step))]

        def close_loader() -> None:
            while loader:
                loader.pop().close()

        closing.callback(close_loader)

        def reopen(data_step: int) -> Batches:
            close_loader()
            loader.append(open_at(data_step))
            return loader[-1]

        module = build.module(config, peers, device, inspected.mixture.num_samples)
        if saved:
            load_weights(module, saved)
        teacher = module.make_teacher() if config.teacher else None
        if teacher and saved and saved.teacher:
            teacher.load_state_dict(saved.teacher)
        relabeler = None
        if "cluster_labels" in module.tasks:
            task, num_samples = module.tasks["cluster_labels"], inspected.mixture.num_samples
            assert isinstance(task, ClusterLabelsTask)
            relabeler = Relabeler(config, task, module.backbone, inspected.splits, num_samples, peers, device)
        online_knn = None
        if config.online_knn:
            lengths = inspected.num_steps, inspected.mixture.num_samples
            online_knn = OnlineKnn(config, module.backbone, *lengths, peers)
        engine = build.engine(config, module, peers, teacher)
        if saved:
            restore_optimizer(engine, saved)
            logger.info("resumed from %s at step %d", saved.folder, step)
            for line in inspected.changes.safe if inspected.changes else ():
                logger.info("changed since then: %s", line)
            if data_start_step:
                logger.info("these data began at step %d", data_start_step)
        elif request.resume == "auto":
            logger.info("nothing to resume in %s: starting at step 0", run_dir)
        exporter, rank_meter = open_metrics(request, place, closing)
        work = model_work(config, place, inspected.mixture.num_samples)
        meter = None
        if place.is_first:
            monitors = open_monitors(config.log.tensorboard, config.log.wandb, run_dir, attempt.number)
            if monitors:
                closing.callback(monitors.close)
            meter = open_meter(request, inspected, exporter, step, attempt.number, work)
            meter.also = monitors.write if monitors else None
        saver = Saver(run_dir, config, attempt.number, place.is_first, exporter if meter else None)
        loop = Loop(
            request,
            inspected,
            place,
            engine,
            teacher,
            relabeler,
            loader[0],
            meter,
            watchdog=watchdog,
            preemption=preemption,
            work_time=work_time,
            saver=saver,
            reopen=reopen,
            online_knn=online_knn,
            rank_meter=rank_meter,
        )
        loop.passed_over, loop.oversight.num_rollbacks = passed_over, num_rollbacks
        if saved and "guard" in saved.state:
            loop.oversight.load(saved.state["guard"])
        del saved  # several times the model, and no longer needed
        if step >= inspected.num_steps:
            logger.info("nothing left to do: step %d of %d", step, inspected.num_steps)
        try:
            loop.train(step)
        except BaseException:
            saver.abandon()
            raise
        if config.export.at_end:
            with watchdog.section("checkpoint", inspected.num_steps - 1):
                seconds = min(SETTLE_SECONDS, config.watchdog.checkpoint_seconds / 2)
                export_at_end(run_dir, place.is_first, seconds)


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


def open_metrics(request: Request, place: cluster.Cluster, closing: ExitStack) -> tuple[Exporter, RankMeter]:
    """Let this rank answer Prometheus, and write down where all of them do; every rank calls this."""
    config = request.config.log.prometheus
    health = Health(config.unhealthy_after_seconds)
    exporter, serving, problem = open_exporter(
        config, health, is_first=place.is_first, local_rank=place.local_rank
    )
    if serving:
        closing.callback(serving.close)
        logger.info("metrics at %s/metrics", serving.url)
    elif problem:
        logger.warning("metrics of rank %d are not served: %s", place.rank, problem)
    own = Target(place.rank, cluster.host_name(), config.address, serving.port) if serving else None
    targets = [target for target in cluster.from_all(own) if target]
    if place.is_first and targets:
        for path in target_files(request.output_dir, config.targets_dir):
            text = write_targets(path, request.output_dir.resolve().name, targets)
            if text:
                closing.callback(remove_targets, path, text)
    return exporter, RankMeter(exporter, health, place.device)


def open_meter(
    request: Request,
    inspected: Inspected,
    exporter: Exporter,
    step: int,
    attempt: int,
    work: Work | None = None,
) -> Meter:
    """Of rank 0."""
    config, run_dir = request.config, request.output_dir
    publish_start(exporter, request, inspected, attempt)
    lines = JsonLines(run_dir / "metrics.jsonl", resumed_at=step)
    if lines.num_taken_again:
        logger.info("%d steps beyond the checkpoint are taken again", lines.num_taken_again)
    return Meter(
        lines,
        exporter,
        build.headlines(config),
        every_steps=config.log.every_steps,
        num_steps=inspected.num_steps,
        global_batch=config.batch.global_size,
        images_per_epoch=inspected.mixture.num_samples,
        attempt=attempt,
        work=work,
    )


def publish_start(exporter: Exporter, request: Request, inspected: Inspected, attempt: int) -> None:
    """What is known before the first step."""
    config, run_dir = request.config, request.output_dir
    exporter.set(names.ATTEMPT, attempt)
    exporter.add(names.RESTARTS, attempt - 1)
    exporter.add(names.PREEMPTIONS, attempts.num_preempted(run_dir))
    exporter.add(names.NONFINITE_STEPS, 0)
    for kind in KINDS:  # a counter that first appears when it is raised has no rise to be seen
        exporter.add(names.ANOMALIES, 0, kind)
    exporter.set(names.CHECKPOINT_EVERY, config.checkpoint.every_steps)
    if inspected.resume_from:
        exporter.set(names.CHECKPOINT_STEP, checkpoint.step_of(inspected.resume_from))
    free = free_bytes(run_dir)
    if free is not None:
        exporter.set(names.DISK_FREE, free)
    num_samples = inspected.mixture.num_samples
    exporter.set(names.SAMPLES_ALLOWED, num_allowed(config.data.max_bad_ratio, num_samples))
    commit = str(environment()["commit"] or "unknown")[:12]
    tasks = ",".join(config.tasks.enabled())
    exporter.set(names.RUN_INFO, 1, run_dir.resolve().name, config.model.name, tasks, __version__, commit)
