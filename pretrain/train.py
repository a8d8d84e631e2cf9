"""A training run, top to bottom: prepare the folder, build the parts, loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pretrain import build, checkpoint, cluster
from pretrain.checkpoint import Checkpoint
from pretrain.data.loader import Batch, Batches, open_batches
from pretrain.engine.engine import Engine, OptimizerState
from pretrain.errors import CheckpointError, TrainingError, UserError
from pretrain.metrics import names
from pretrain.metrics.exporter import open_exporter
from pretrain.metrics.meter import JsonLines, Meter
from pretrain.models.teacher import Teacher
from pretrain.preflight import Inspected, Request, describe, identity, inspect
from pretrain.randomness import bits
from pretrain.relabel import Relabeler
from pretrain.run_folder import open_folder
from pretrain.tasks.cluster_labels import ClusterLabelsTask
from pretrain.views.plan import in_places
from pretrain.views.prepare import Inputs, Recipe, prepare, with_labels

logger = logging.getLogger("pretrain")


def run(request: Request, place: cluster.Cluster) -> None:
    """Train to the end. Every rank calls this.

    Wrong input ends it before anything is started. Only where another launcher has started several ranks do
    they connect first, so that a problem of one (only rank 0 looks at the run folder) ends all of them.
    """
    inspected, log, problem = None, None, None
    try:
        inspected = inspect(request, place)
        log = open_folder(request, inspected) if place.is_first else None
    except UserError as error:
        if place.world_size == 1:
            raise
        problem = str(error)
    try:
        with cluster.connected(place):
            problem = cluster.first_said(problem)
            if problem is not None or inspected is None:
                raise UserError(problem or "a rank could not start")
            _run(request, inspected, place)
    finally:
        if log:
            logger.removeHandler(log)
            log.close()


def _run(request: Request, inspected: Inspected, place: cluster.Cluster) -> None:
    config, run_dir, device = request.config, request.output_dir, place.device
    resume_from, data_start_step = cluster.from_first((inspected.resume_from, inspected.data_start_step))
    inspected = replace(inspected, resume_from=resume_from, data_start_step=data_start_step)
    logger.info(describe(request, inspected, place))
    peers = cluster.peers(place)
    saved = checkpoint.read_checkpoint(inspected.resume_from) if inspected.resume_from else None
    step = int(saved.state["step"]) if saved else 0
    batches = open_batches(
        config.data,
        inspected.splits,
        in_places(config.views),
        seed=config.seed,
        batch_size=build.micro_step_batch(config),
        rank=place.rank,
        world_size=place.world_size,
        start_micro_step=(step - data_start_step) * config.batch.accumulation_steps,
        device=device,
        quarantine_path=run_dir / "quarantine.jsonl",
    )
    try:
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
            if data_start_step:
                logger.info("these data began at step %d", data_start_step)
        elif request.resume == "auto":
            logger.info("nothing to resume in %s: starting at step 0", run_dir)
        meter = open_meter(request, inspected, place, step)
        loop = Loop(request, inspected, place, engine, teacher, relabeler, batches, meter)
        del saved  # several times the model, and no longer needed
        if step >= inspected.num_steps:
            logger.info("nothing left to do: step %d of %d", step, inspected.num_steps)
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
        relabeler: Relabeler | None,
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
        self.relabeler = relabeler
        self.batches = batches
        self.meter = meter
        self.recipe: Recipe = build.recipe(config)
        self.num_steps = inspected.num_steps
        self.timetable = build.timetable(config, inspected.mixture.num_samples)
        self.identity = identity(config, inspected.splits)
        self.nonfinite_in_a_row = 0

    def train(self, step: int) -> None:
        while step < self.num_steps:
            self.train_step(step)
            step += 1
            if step % self.config.checkpoint.every_steps == 0 or step == self.num_steps:
                self.save(step)

    def train_step(self, step: int) -> None:
        """Take the step that follows `step` finished ones."""
        started, waited = time.perf_counter(), self.batches.wait_seconds
        # dropout and drop path, if a model has them, draw the same numbers after a resume
        torch.manual_seed(int(bits(self.config.seed, step, self.place.rank, 0, 1)))
        epoch = self.timetable.moment(step).epoch
        if self.relabeler and self.relabeler.due(epoch):
            self.relabeler.relabel(self.engine, epoch)
        if self.config.teacher and self.config.teacher.update == "before":
            self._update_teacher(step)
        inputs, tally = self._micro_inputs(step)
        knobs = self.timetable.knobs(step)
        output = self.engine.train_step(inputs, knobs, tally)
        if not output.skipped:
            self.engine.module.finish_step()
        values = {**output.values, "grad_norm": output.grad_norm, "lr": knobs.lr}
        for place, name in enumerate(("samples", "bad_samples", "storage_retries")):
            values[name] = values.pop(f"extra/{place}")
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
        self._guard(step + 1, output.skipped)

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

        def generate() -> Iterator[Inputs]:
            for micro in range(self.config.batch.accumulation_steps):
                batch = next(self.batches)
                micro_step = step * self.config.batch.accumulation_steps + micro
                digests.append(samples_digest(batch, micro_step, self.place.rank))
                epochs, ids = batch.epochs.to(device), batch.sample_ids.to(device)
                crops = [of_size.to(device) for of_size in batch.crops]
                inputs = prepare(self.recipe, self.config.seed, crops, epochs, ids, micro_step)
                inputs = with_labels(inputs, batch.labels.to(device), moment)
                if self.teacher:
                    with autocast:
                        inputs = module.consult(self.teacher, inputs)
                yield inputs

        def tally() -> Tensor:
            counts = [float(self.batches.num_bad), float(self.batches.num_retries)]
            counted = torch.tensor(counts, dtype=torch.float64, device=device)
            return torch.cat([torch.stack(digests).sum().to(device).unsqueeze(0), counted])

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
                "data_start_step": self.inspected.data_start_step,
                "num_samples": self.inspected.mixture.num_samples,
            }
            tensors: dict[str, Mapping[str, Tensor]] = {
                checkpoint.STUDENT: student,
                checkpoint.OPTIMIZER: optimizer.tensors,
            }
            if self.teacher:
                tensors[checkpoint.TEACHER] = {k: v.cpu() for k, v in self.teacher.state_dict().items()}
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
        images_per_epoch=inspected.mixture.num_samples,
    )
