"""A training run, top to bottom: take the folder, build the parts, loop."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import attempts, build, checkpoint, cluster, mirror, preempt
from pretrain.attempts import Attempt
from pretrain.checkpoint import Checkpoint
from pretrain.config import RunConfig
from pretrain.data.loader import Batch, Batches, open_batches
from pretrain.engine.deepspeed_engine import zero_stage
from pretrain.engine.engine import Engine, OptimizerState, check_without_gradient
from pretrain.errors import EXIT_FAILED, CheckpointError, PreemptedError, TrainingError, UserError
from pretrain.guard import Verdict, checksum, deviants
from pretrain.memory import is_out_of_memory, out_of_memory_report
from pretrain.metrics import names
from pretrain.metrics.exporter import open_exporter
from pretrain.metrics.meter import JsonLines, Meter
from pretrain.models.teacher import Teacher
from pretrain.oversight import ANOMALIES, Oversight
from pretrain.passed_over import PassedOver, passed_over_from_json
from pretrain.preempt import PreemptConfig, Preemption
from pretrain.preflight import Inspected, Request, describe, identity, inspect
from pretrain.randomness import bits
from pretrain.relabel import Relabeler
from pretrain.run_folder import begin_attempt, open_folder
from pretrain.saving import Saver
from pretrain.tasks.cluster_labels import ClusterLabelsTask
from pretrain.views.plan import in_places
from pretrain.views.prepare import Inputs, Recipe, prepare, with_labels
from pretrain.watchdog import Watchdog, WatchdogConfig
from pretrain.work_time import WorkTime

logger = logging.getLogger("pretrain")

HEALTH = "health"
ROLLBACKS = "rollbacks.json"  # what is passed over, and how often the run went back
# what every rank adds to a step's one collective, before the work seconds of each rank
TALLIED = ("samples", "bad_samples", "storage_retries", "stop", "write_failures")


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
                raise TrainingError(f"rank {place.rank}: {_lost_peer(error)}") from error


def _stop_listening(preemption: Preemption, error: BaseException | None) -> None:
    """Unless the run was preempted: then the signals that follow must not change the exit code."""
    if not isinstance(error, PreemptedError):
        preemption.close()


def _lost_peer(error: BaseException) -> str:
    said = str(error).splitlines()[0][:120]
    return (
        f"another rank has ended or does not answer ({said}); its own messages, or those of its node, say why"
    )


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
        went_back = _read_rollbacks(run_dir, saved, data_start_step)
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
        engine = build.engine(config, module, peers)
        if saved:
            restore_optimizer(engine, saved)
            logger.info("resumed from %s at step %d", saved.folder, step)
            for line in inspected.changes.safe if inspected.changes else ():
                logger.info("changed since then: %s", line)
            if data_start_step:
                logger.info("these data began at step %d", data_start_step)
        elif request.resume == "auto":
            logger.info("nothing to resume in %s: starting at step 0", run_dir)
        meter = open_meter(request, inspected, place, step, attempt.number)
        exporter = meter.exporter if meter else None
        saver = Saver(run_dir, config, attempt.number, place.is_first, exporter)
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


class Loop:
    """The loop and what it keeps between steps."""

    def __init__(
        self,
        request: Request,
        inspected: Inspected,
        place: cluster.Cluster,
        engine: Engine,
        teacher: Teacher | None,
        relabeler: Relabeler | None,
        batches: Batches,
        meter: Meter | None,
        *,
        watchdog: Watchdog | None = None,
        preemption: Preemption | None = None,
        work_time: WorkTime | None = None,
        saver: Saver | None = None,
        reopen: Callable[[int], Batches] | None = None,
    ) -> None:
        config = request.config
        self.config = config
        self.run_dir = request.output_dir
        self.inspected = inspected
        self.place = place
        self.engine = engine
        self.teacher = teacher
        self.relabeler = relabeler
        self.batches = batches
        self.meter = meter
        self.watchdog = watchdog or Watchdog(WatchdogConfig(enabled=False), 0, 1, self.run_dir)
        self.preemption = preemption or Preemption(PreemptConfig())
        self.work_time = work_time or WorkTime(place.device)
        self.saver = saver
        self.reopen = reopen
        self.recipe: Recipe = build.recipe(config)
        self.num_steps = inspected.num_steps
        self.timetable = build.timetable(config, inspected.mixture.num_samples)
        self.identity = identity(config, inspected.splits)
        path = self.run_dir / ANOMALIES if place.is_first and saver else None
        hosts = cluster.from_all(cluster.host_name())
        self.oversight = Oversight(
            config.guard,
            place.world_size,
            path,
            lambda rank: f" ({hosts[rank]})" if len(set(hosts)) > 1 else "",
        )
        self.passed_over = PassedOver()
        self._data_step: int | None = None  # that the loader gives next
        self._sample_ids: list[Tensor] = []  # of the step under way
        self._values: dict[str, float] = {}  # of the last step
        self._current = 0  # the step under way
        self._verdict: Verdict = "go on"
        self._is_audited = False
        self._stop: str | None = None  # why all ranks are to stop after this step
        # ZeRO-3 gathers parameters while it goes forward, so ranks meet as it begins
        meets_early = zero_stage_of(config) == 3
        engine.module.register_forward_pre_hook(lambda *_: self.work_time.meet() if meets_early else None)
        engine.module.register_forward_hook(lambda *_: self._go_backward())

    def train(self, step: int) -> None:
        try:
            self._train(step)
        except Exception as error:
            explanation = self._explanation(error, self._current)
            if explanation is None:
                raise
            raise TrainingError(explanation) from error

    def _train(self, step: int) -> None:
        started_at = saved_at = step
        while step < self.num_steps:
            self.train_step(step)
            if step == started_at:
                self.watchdog.started()
            if self._verdict == "rollback":
                step = saved_at = self._go_back()
            else:
                step += 1
            self._compare_ranks(step)
            if step % self.config.checkpoint.every_steps == 0 or step == self.num_steps or self._stop:
                if step != saved_at:
                    self.save(step)
                saved_at = step
            elif self.saver:
                self.saver.report()
            if self._stop and step < self.num_steps:
                self._end_early(step, self._stop)
        if self.saver:
            with self.watchdog.section("checkpoint", step - 1):
                self.saver.finish()

    def train_step(self, step: int) -> None:
        """Take the step that follows `step` finished ones."""
        started, waited = time.perf_counter(), self.batches.wait_seconds
        self._current = step
        self.watchdog.enter("data", step)
        self.work_time.begin()
        # dropout and drop path, if a model has them, draw the same numbers after a resume
        torch.manual_seed(int(bits(self.config.seed, step, self.place.rank, 0, 1)))
        epoch = self.timetable.moment(step).epoch
        if self.relabeler and self.relabeler.due(epoch):
            with self.watchdog.section("evaluation", step):
                self.relabeler.relabel(self.engine, epoch)
        if self.config.teacher and self.config.teacher.update == "before":
            self._update_teacher(step)
        inputs, tally = self._micro_inputs(step)
        knobs = self.timetable.knobs(step)
        output = self.engine.train_step(inputs, knobs, tally)
        if not self._is_audited:
            silent = [
                f"tasks.{name}.*"
                for name, task in self.engine.module.tasks.items()
                if getattr(task, "starts_silent", False)
            ]
            allowed = [*self.config.engine.allow_without_gradient, *silent]
            check_without_gradient(self.engine.without_gradient(), allowed)
            self._is_audited = True
        if not output.skipped:
            self.engine.module.finish_step()
        values = {**output.values, "grad_norm": output.grad_norm, "lr": knobs.lr}
        agreed = {name: values.pop(f"extra/{place}") for place, name in enumerate(TALLIED)}
        work_seconds = [values.pop(f"extra/{len(TALLIED) + rank}") for rank in range(self.place.world_size)]
        self._stop = preempt.decode(agreed.pop("stop"), self.place.world_size)
        write_failures = agreed.pop("write_failures")
        values |= agreed
        values["backbone_calls"] = float(self.engine.module.num_backbone_calls)
        if self.teacher and self.timetable.momentum:
            values["momentum"] = self.timetable.momentum(step)
            values["teacher_calls"] = float(self.teacher.num_calls)
            if self.config.teacher and self.config.teacher.update == "after" and not output.skipped:
                self._update_teacher(step)
        if self.meter:
            self.meter.record(
                step + 1,
                values,
                skipped=output.skipped,
                seconds=time.perf_counter() - started,
                wait_seconds=self.batches.wait_seconds - waited,
            )
        self._values = values
        self._verdict = self.oversight.saw(step, output, work_seconds, self._all_sample_ids)
        if self.meter and (step + 1) % self.config.log.every_steps == 0:
            self.meter.publish_ranks(self.oversight.stragglers.scores())
        if self.saver:
            self.saver.check(write_failures)

    def _update_teacher(self, step: int) -> None:
        assert self.teacher is not None
        assert self.timetable.momentum is not None
        module = self.engine.module

        def student() -> Iterator[tuple[str, Tensor]]:
            for part in self.teacher.parts:  # type: ignore[union-attr]
                for name, value in self.engine.student(module.get_submodule(part)):
                    yield f"{part}.{name}", value

        self.teacher.update(student(), self.timetable.momentum(step))

    def _micro_inputs(self, step: int) -> tuple[Iterator[Inputs], Callable[[], Tensor]]:
        """Inputs of the micro steps, made one at a time, and what they add up to once they are all made."""
        device, module = self.place.device, self.engine.module
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.config.engine.precision == "bf16")
        moment = self.timetable.moment(step)
        digests: list[Tensor] = []
        self._sample_ids = []
        start = self.inspected.data_start_step
        data_step = self.passed_over.data_step(step - start)
        self._pass_over(data_step)

        def generate() -> Iterator[Inputs]:
            for micro in range(self.config.batch.accumulation_steps):
                self.watchdog.enter("data", step)
                batch = next(self.batches)
                self.watchdog.enter("forward", step)
                micro_step = (start + data_step) * self.config.batch.accumulation_steps + micro
                digests.append(samples_digest(batch, micro_step, self.place.rank))
                self._sample_ids.append(batch.sample_ids.clone())  # its memory is the loader's
                epochs, ids = batch.epochs.to(device), batch.sample_ids.to(device)
                crops = [of_size.to(device) for of_size in batch.crops]
                inputs = prepare(self.recipe, self.config.seed, crops, epochs, ids, micro_step)
                inputs = with_labels(inputs, batch.labels.to(device), moment)
                if self.teacher:
                    with autocast:
                        inputs = module.consult(self.teacher, inputs)
                yield inputs

        def tally() -> Tensor:
            self.watchdog.enter("step", step)
            failures = self.saver.failures_in_a_row if self.saver else 0
            counts = [float(self.batches.num_bad), float(self.batches.num_retries), self.preemption.code()]
            work_seconds = [0.0] * self.place.world_size
            work_seconds[self.place.rank] = self.work_time.seconds
            own = torch.tensor([*counts, float(failures), *work_seconds], dtype=torch.float64, device=device)
            return torch.cat([torch.stack(digests).sum().to(device).unsqueeze(0), own])

        return generate(), tally

    def _go_backward(self) -> None:
        self.work_time.meet()
        self.watchdog.enter("backward", self._current)

    def _pass_over(self, data_step: int) -> None:
        """Draw and drop the batches between what was used last and what is due."""
        due, self._data_step = self._data_step, data_step + 1
        for _ in range(
            (data_step - (data_step if due is None else due)) * self.config.batch.accumulation_steps
        ):
            next(self.batches)

    def _all_sample_ids(self) -> list[int]:
        """Of the step under way, on every rank, in the order of the global batch's micro steps."""
        of_ranks = cluster.from_all([ids.tolist() for ids in self._sample_ids])
        return [sample for micro in zip(*of_ranks, strict=True) for ids in micro for sample in ids]

    def _go_back(self) -> int:
        """Continue, in place, from the last checkpoint before what went wrong, and pass over its samples.

        Returns the number of steps it goes on from.
        """
        assert self.saver is not None
        assert self.reopen is not None
        bad = self.oversight.first_bad_step
        with self.watchdog.section("checkpoint", self._current):
            folder = self.saver.newest_up_to(bad)
            if folder is None:
                raise TrainingError(
                    f"step {self._current + 1}: there is no checkpoint to go back to; lower optim.base_lr or "
                    "set engine.precision=fp32, or save more often with checkpoint.every_steps"
                )
            saved = checkpoint.read_checkpoint(folder)
            start, step = self.inspected.data_start_step, int(saved.state["step"])
            self.passed_over = self.passed_over.add(bad - start, self._current - start)
            self.oversight.went_back(step, saved.state.get("guard"))
            problem = self._note_rollback(step) if self.place.is_first else None
            problem = cluster.from_first(problem)
            if problem:
                raise TrainingError(problem)
            self.engine.load_weights(saved.student)
            restore_optimizer(self.engine, saved)
            if self.teacher and saved.teacher:
                self.teacher.load_state_dict(saved.teacher)
            self._data_step = self.passed_over.data_step(step - start)
            self.batches = self.reopen(self._data_step)
        if self.meter:
            self.meter.go_back(step)
        logger.warning(
            "went back to step %d (%s); the samples of steps %d to %d are passed over (%d of %d times)",
            step,
            folder,
            bad + 1,
            self._current + 1,
            self.oversight.num_rollbacks,
            self.config.guard.max_rollbacks,
        )
        return step

    def _note_rollback(self, step: int) -> str | None:
        """Leave the folder so that a start in the very next moment does the same; says why it could not."""
        assert self.saver is not None
        try:
            self.saver.forget_after(
                step
            )  # first: what is passed over is only right from before the bad steps
            _write_rollbacks(
                self.run_dir,
                self.oversight.num_rollbacks,
                self.passed_over,
                self.inspected.data_start_step,
            )
        except OSError as error:
            return f"{self.run_dir}: cannot be written ({error.strerror}), so the run cannot go back"
        return None

    def _compare_ranks(self, step: int) -> None:
        """Every so often: the weights that all ranks should share are the same, bit by bit."""
        every = self.config.guard.checksum_every_steps
        if every is None or step % every or self.place.world_size == 1:
            return
        shared = [("buffers." + name, value) for name, value in self.engine.module.named_buffers()]
        if zero_stage_of(self.config) < 3:
            shared += list(self.engine.module.named_parameters())
        if self.teacher:
            shared += [(f"teacher.{name}", value) for name, value in self.teacher.state_dict().items()]
        wrong = deviants(cluster.from_all(checksum(shared)))
        if wrong:
            raise TrainingError(
                f"step {step}: the weights of rank {cluster.ranges(wrong)} are not those of the others; a "
                "device or its memory may be faulty: keep the run off it, and continue with --resume auto"
            )

    def _explanation(self, error: Exception, step: int) -> str | None:
        """What an error of a library means, in one line; None for one that is not known."""
        config, where = self.config, f"step {step + 1}, rank {self.place.rank}"
        if is_out_of_memory(error):
            told = out_of_memory_report(
                error,
                device=self.place.device,
                global_batch=config.batch.global_size,
                accumulation_steps=config.batch.accumulation_steps,
                world_size=self.place.world_size,
                lanes=config.data.lanes,
                recompute=config.engine.recompute,
                zero_stage=zero_stage_of(config) if config.engine.kind == "deepspeed" else None,
            )
            return f"{where}: {told}"
        if self.place.world_size > 1 and cluster.is_lost_peer(error):
            return f"{where}: {_lost_peer(error)}"
        return None

    def _end_early(self, step: int, reason: str) -> None:
        """All is saved; whoever asked has the run started again, or not."""
        if self.saver:
            with self.watchdog.section("checkpoint", step - 1):
                self.saver.finish(wait_for_mirror=False)  # the next attempt brings it what it lacks
        self.preemption.leave()
        job = cluster.slurm_job()
        told = ""
        if job and preempt.should_requeue(reason, self.config.preempt):
            problem = cluster.from_first(cluster.requeue(job) if self.place.is_first else None)
            told = (
                f"; {job.name} could not be requeued: {problem}" if problem else f"; {job.name} was requeued"
            )
        raise PreemptedError(f"{reason}: saved at step {step} of {self.num_steps}{told}", step)

    def save(self, step: int) -> None:
        """Hand a copy of the state to be written."""
        if self.saver is None:
            return
        with self.watchdog.section("checkpoint", step - 1):  # ranks ahead count that step already
            self.saver.save(step, self.engine, self.teacher, self._state(), self._values)

    def _state(self) -> dict[str, Any]:
        return {
            "world_size": self.place.world_size,
            "registers": list(self.engine.module.layout.registers),
            "identity": self.identity,
            "data_start_step": self.inspected.data_start_step,
            "num_samples": self.inspected.mixture.num_samples,
            "guard": self.oversight.state(),
            "passed_over": self.passed_over.to_json(),
        }


def zero_stage_of(config: RunConfig) -> int:
    """0 for the local engine."""
    return 0 if config.engine.kind == "local" else zero_stage(config.engine)


def _read_rollbacks(run_dir: Path, saved: Checkpoint | None, data_start_step: int) -> tuple[int, PassedOver]:
    """How often this run went back, and the data it passes over since; those of other data do not count."""
    num_rollbacks, passed_over = 0, PassedOver()
    if saved is not None and saved.state.get("data_start_step", 0) == data_start_step:
        passed_over = passed_over_from_json(saved.state.get("passed_over"))
    with suppress(OSError):
        try:
            noted = json.loads((run_dir / ROLLBACKS).read_text())
            num_rollbacks = int(noted["rollbacks"])
            if noted["data_start_step"] == data_start_step:
                passed_over = passed_over_from_json(noted["passed_over"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{run_dir / ROLLBACKS}: is damaged; remove it to pass over nothing"
            ) from None
    return num_rollbacks, passed_over


def _write_rollbacks(run_dir: Path, num: int, passed_over: PassedOver, data_start_step: int) -> None:
    """Beside the checkpoints: that which the run goes back to knows nothing of it."""
    noted = {"rollbacks": num, "passed_over": passed_over.to_json(), "data_start_step": data_start_step}
    path = run_dir / ROLLBACKS
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(noted))
    new.replace(path)


def samples_digest(batch: Batch, micro_step: int, rank: int) -> Tensor:
    """A number that depends on every sample, its epoch and its place in the global batch: float64 ().

    The sum over ranks is the same however many ranks share the batch, and exact: 32 bits a sample.
    """
    first = rank * len(batch.sample_ids)
    places = torch.arange(first, first + len(batch.sample_ids), device=batch.sample_ids.device)
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


def open_meter(
    request: Request, inspected: Inspected, place: cluster.Cluster, step: int, attempt: int
) -> Meter | None:
    if not place.is_first:
        return None
    config = request.config
    exporter, url, problem = open_exporter(config.log.prometheus)
    exporter.set(names.ATTEMPT, attempt)
    if url:
        logger.info("metrics at %s", url)
    if problem:
        logger.warning("metrics are not served: %s", problem)
    lines = JsonLines(request.output_dir / "metrics.jsonl", resumed_at=step)
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
    )
