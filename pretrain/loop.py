"""The training loop: steps, checkpoints, going back, and what may end it early."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain import build, checkpoint, cluster, preempt
from pretrain.checkpoint import Checkpoint
from pretrain.config import RunConfig
from pretrain.conflict import compare_gradients, shared_parameters
from pretrain.data.loader import Batch, Batches
from pretrain.engine.deepspeed_engine import zero_stage
from pretrain.engine.engine import Engine, OptimizerState, StepResult, check_without_gradient
from pretrain.errors import PreemptedError, TrainingError
from pretrain.garbage import collect, collected_on_time
from pretrain.guard import Verdict, checksum, deviants
from pretrain.memory import is_out_of_memory, out_of_memory_report
from pretrain.metrics.meter import Meter
from pretrain.metrics.rank_meter import RankMeter
from pretrain.models.teacher import Teacher
from pretrain.online_knn import OnlineKnn
from pretrain.oversight import ANOMALIES, KINDS, Oversight
from pretrain.passed_over import PassedOver
from pretrain.preempt import PreemptConfig, Preemption
from pretrain.preflight import Inspected, Request, identity
from pretrain.randomness import bits
from pretrain.relabel import Relabeler
from pretrain.rollbacks import write_rollbacks
from pretrain.saving import Saver
from pretrain.section_time import SectionTime, stopwatch
from pretrain.views.prepare import Inputs, Recipe, prepare, with_labels
from pretrain.watchdog import Watchdog, WatchdogConfig
from pretrain.work_time import WorkTime

logger = logging.getLogger("pretrain")

# what every rank adds to a step's one collective, before the work seconds of each rank
TALLIED = ("samples", "bad_samples", "storage_retries", "stop", "write_failures")


@dataclass(frozen=True)
class Taken:
    """A step that was taken, and what is known of it without its numbers."""

    step: int
    result: StepResult
    known: dict[str, float]
    sample_ids: list[Tensor]
    seconds: float
    wait_seconds: float
    sections: dict[str, float]


def reads_late(device: torch.device) -> bool:
    """Whether the numbers of a step are read when the next one has been handed to the device.

    A GPU is then never without work. What follows from the numbers follows one step later, on all ranks.
    """
    return device.type == "cuda"


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
        online_knn: OnlineKnn | None = None,
        rank_meter: RankMeter | None = None,
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
        self.section_time = SectionTime(place.device)
        self.rank_meter = rank_meter
        self.saver = saver
        self.reopen = reopen
        self.online_knn = online_knn
        self.recipe: Recipe = build.recipe(config, place.device)
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
            self._noted,
        )
        self.passed_over = PassedOver()
        self._data_step: int | None = None  # that the loader gives next
        self._sample_ids: list[Tensor] = []  # of the step under way
        self._inputs: Inputs | None = None  # of its last micro step, where its gradients are compared
        self._values: dict[str, float] = {}  # of the last step
        self._current = 0  # the step under way
        self._judged = 0  # the last step whose numbers were read
        self._taken: Taken | None = None  # the step whose numbers are still to be read
        self._reads_late = reads_late(place.device)
        self._verdict: Verdict = "go on"
        self._is_audited = False
        self._stop: str | None = None  # why all ranks are to stop after this step
        # ZeRO-3 gathers parameters while it goes forward, so ranks meet as it begins
        meets_early = zero_stage_of(config) == 3
        engine.module.register_forward_pre_hook(lambda *_: self.work_time.meet() if meets_early else None)
        engine.module.register_forward_hook(lambda *_: self._go_backward())

    def train(self, step: int) -> None:
        try:
            with collected_on_time():
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
            if self._verdict == "go on" and (self._stop or self._saves_at(step + 1)):
                self._look_back()
            if self._verdict == "rollback":
                step = saved_at = self._go_back()
            else:
                step += 1
            collect(step)
            self._compare_ranks(step)
            if self._saves_at(step) or self._stop:
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

    def _saves_at(self, step: int) -> bool:
        return step % self.config.checkpoint.every_steps == 0 or step == self.num_steps

    def train_step(self, step: int) -> None:
        """Take the step that follows `step` finished ones."""
        started, waited = time.perf_counter(), self.batches.wait_seconds
        self._current = step
        self.watchdog.enter("data", step)
        self.work_time.begin()
        self.engine.module.measures_rank = self._looks_closer(step)
        # dropout and drop path, if a model has them, draw the same numbers after a resume
        torch.manual_seed(int(bits(self.config.seed, step, self.place.rank, 0, 1)))
        epoch = self.timetable.moment(step).epoch
        if self.relabeler and self.relabeler.due(epoch):
            with self.watchdog.section("evaluation", step):
                self.relabeler.relabel(self.engine, epoch)
        if self.config.teacher and self.config.teacher.update == "before":
            self.section_time.enter("teacher")
            self._update_teacher(step)
        inputs, tally = self._micro_inputs(step)
        knobs = self.timetable.knobs(step)
        result = self.engine.train_step(inputs, knobs, tally)
        if not self._is_audited:
            silent = [
                f"tasks.{name}.*"
                for name, task in self.engine.module.tasks.items()
                if getattr(task, "starts_silent", False)
            ]
            allowed = [*self.config.engine.allow_without_gradient, *silent]
            check_without_gradient(self.engine.without_gradient(), allowed)
            self._is_audited = True
        known = {"lr": knobs.lr, "weight_decay": knobs.weight_decay}
        known["backbone_calls"] = float(self.engine.module.num_backbone_calls)
        if self.teacher and self.timetable.momentum:
            known["momentum"] = self.timetable.momentum(step)
            known["teacher_calls"] = float(self.teacher.num_calls)
            if self.config.teacher and self.config.teacher.update == "after":
                self.section_time.enter("teacher")
                self._update_teacher(step, result)
        if self._reads_late:
            self._look_back()
        sections = self.section_time.finish()
        seconds, wait_seconds = time.perf_counter() - started, self.batches.wait_seconds - waited
        known |= self._measure_knn(step)
        self._compare_gradients(step)
        self._taken = Taken(step, result, known, self._sample_ids, seconds, wait_seconds, sections)
        if not self._reads_late:
            self._look_back()

    def _look_back(self) -> None:
        """Read the numbers of the step that was taken last and not yet judged, and tell all who watch."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        step, output = taken.step, taken.result.read()
        values = {**output.values, "grad_norm": output.grad_norm, **taken.known}
        agreed = {name: values.pop(f"extra/{place}") for place, name in enumerate(TALLIED)}
        work_seconds = [values.pop(f"extra/{len(TALLIED) + rank}") for rank in range(self.place.world_size)]
        self._stop = preempt.decode(agreed.pop("stop"), self.place.world_size)
        write_failures = agreed.pop("write_failures")
        values |= agreed
        if self.meter:
            self.meter.record(
                step + 1,
                values,
                skipped=output.skipped,
                seconds=taken.seconds,
                wait_seconds=taken.wait_seconds,
                sections=taken.sections,
            )
        if self.rank_meter:
            calls = {"backbone": values["backbone_calls"], "teacher": values.get("teacher_calls", 0.0)}
            read, process_ids = self.batches.counts, self.batches.process_ids
            times = taken.seconds, taken.wait_seconds, taken.sections
            self.rank_meter.record(step + 1, *times, read, process_ids, calls)
        self._values = values
        self._judged = step
        self._verdict = self.oversight.saw(
            step, output, work_seconds, lambda: self._all_sample_ids(taken.sample_ids)
        )
        if (step + 1) % self.config.log.every_steps == 0:
            self._publish_speeds(work_seconds)
        if self.saver:
            self.saver.check(write_failures)

    def _looks_closer(self, step: int) -> bool:
        """Whether this step also measures what is too dear for every one."""
        return step == 0 or (step + 1) % self.config.log.health_every_steps == 0

    def _publish_speeds(self, work_seconds: Sequence[float]) -> None:
        speeds, own = self.oversight.stragglers.scores(), self.place.rank
        if self.rank_meter:
            self.rank_meter.publish_speed(work_seconds[own], speeds[own])
        if self.meter and len(speeds) > 1:
            slowest = min(range(len(speeds)), key=speeds.__getitem__)
            self.meter.note({"slowest_rank": slowest, "slowest_rank_speed": round(speeds[slowest], 3)})

    def _noted(self, kind: str) -> None:
        if self.meter and kind in KINDS:
            self.meter.publish_anomaly(kind)

    def _measure_knn(self, step: int) -> dict[str, float]:
        """Where it is due; its time is not the step's."""
        if self.online_knn is None or not self.online_knn.due(step + 1):
            return {}
        with self.watchdog.section("evaluation", step), stopwatch() as seconds:
            found = self.online_knn.measure(self.engine, self.teacher)
        if self.rank_meter:
            self.rank_meter.section("evaluation", seconds[0], step + 1)
        if self.meter and found:
            self.meter.publish_evaluation("knn", self.online_knn.config.k, found["knn_top1_ratio"])
        return found

    def _compares_gradients(self, step: int) -> bool:
        asked = self.config.log.gradients
        return (
            asked is not None
            and (step + 1) % asked.every_steps == 0
            and len(self.engine.module.tasks) > 1
            and zero_stage_of(self.config) < 3
        )

    def _compare_gradients(self, step: int) -> None:
        """Where it is due; its time is not the step's."""
        inputs, self._inputs = self._inputs, None
        if inputs is None or self.config.log.gradients is None:
            return
        parameters = shared_parameters(self.engine.module.backbone, self.config.log.gradients.of)
        with self.watchdog.section("evaluation", step), stopwatch() as seconds:
            found = compare_gradients(self.engine.module, inputs, parameters, self.config.engine.precision)
        if self.rank_meter:
            self.rank_meter.section("evaluation", seconds[0], step + 1)
        if self.meter:
            self.meter.publish_gradients(found)

    def _update_teacher(self, step: int, after: StepResult | None = None) -> None:
        """after: the step it follows, if any; where that was skipped, the teacher stays where it is."""
        assert self.teacher is not None
        assert self.timetable.momentum is not None
        module = self.engine.module

        def student() -> Iterator[tuple[str, Tensor]]:
            for part in self.teacher.parts:  # type: ignore[union-attr]
                for name, value in self.engine.student(module.get_submodule(part)):
                    yield f"{part}.{name}", value

        if after is not None and not self._reads_late and after.read().skipped:
            return
        unless = after.skipped if after is not None and self._reads_late else None
        is_whole = zero_stage_of(self.config) < 3
        self.teacher.update(student(), self.timetable.momentum(step), unless, at_once=is_whole)

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
                self.section_time.enter("data")
                batch = next(self.batches)
                self.watchdog.enter("forward", step)
                self.section_time.enter("transfer")
                micro_step = (start + data_step) * self.config.batch.accumulation_steps + micro
                digests.append(samples_digest(batch, micro_step, self.place.rank))
                self._sample_ids.append(batch.sample_ids.clone())  # its memory is the loader's
                epochs, ids = batch.epochs.to(device), batch.sample_ids.to(device)
                crops = [of_size.to(device) for of_size in batch.crops]
                self.section_time.enter("views")
                inputs = prepare(self.recipe, self.config.seed, crops, epochs, ids, micro_step)
                inputs = with_labels(inputs, batch.labels.to(device), moment)
                if self.teacher:
                    self.section_time.enter("teacher")
                    with autocast:
                        inputs = module.consult(self.teacher, inputs)
                self.section_time.enter("forward")
                self._inputs = inputs if self._compares_gradients(step) else None
                yield inputs

        def tally() -> Tensor:
            self.watchdog.enter("step", step)
            self.section_time.enter("step")
            failures = self.saver.failures_in_a_row if self.saver else 0
            read = self.batches.counts
            counts = [float(read.num_bad), float(read.num_retries), self.preemption.code()]
            work_seconds = [0.0] * self.place.world_size
            work_seconds[self.place.rank] = self.work_time.seconds
            own = brought([*counts, float(failures), *work_seconds], device)
            return torch.cat([torch.stack(digests).sum().to(device).unsqueeze(0), own])

        return generate(), tally

    def _go_backward(self) -> None:
        self.work_time.meet()
        self.watchdog.enter("backward", self._current)
        self.section_time.enter("backward")

    def _pass_over(self, data_step: int) -> None:
        """Draw and drop the batches between what was used last and what is due."""
        due, self._data_step = self._data_step, data_step + 1
        for _ in range(
            (data_step - (data_step if due is None else due)) * self.config.batch.accumulation_steps
        ):
            next(self.batches)

    def _all_sample_ids(self, own: Sequence[Tensor]) -> list[int]:
        """Of a step, on every rank, in the order of the global batch. own: of each micro step, (B,)"""
        of_ranks = cluster.from_all([ids.tolist() for ids in own])
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
                    f"step {self._judged + 1}: there is no checkpoint to go back to; lower optim.base_lr or "
                    "set engine.precision=fp32, or save more often with checkpoint.every_steps"
                )
            saved = checkpoint.read_checkpoint(folder)
            start, step = self.inspected.data_start_step, int(saved.state["step"])
            self.passed_over = self.passed_over.add(bad - start, self._judged - start)
            self._taken = None  # trained on weights that are gone; its samples come again
            self._verdict = "go on"
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
            self._judged + 1,
            self.oversight.num_rollbacks,
            self.config.guard.max_rollbacks,
        )
        return step

    def _note_rollback(self, step: int) -> str | None:
        """Leave the folder so that a start in the very next moment does the same; says why it could not."""
        assert self.saver is not None
        try:
            # first: what is passed over is only right from before the bad steps
            self.saver.forget_after(step)
            write_rollbacks(
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
            return f"{where}: {lost_peer(error)}"
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
        # ranks ahead count that step already
        with self.watchdog.section("checkpoint", step - 1), stopwatch() as seconds:
            self.saver.save(step, self.engine, self.teacher, self._state(), self._values)
        if self.rank_meter:
            self.rank_meter.section("checkpoint", seconds[0], step)

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


def brought(numbers: Sequence[float], device: torch.device) -> Tensor:
    """float64 (n,) on the device, which is not waited for."""
    host = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def zero_stage_of(config: RunConfig) -> int:
    """0 for the local engine."""
    return 0 if config.engine.kind == "local" else zero_stage(config.engine)


def restore_optimizer(engine: Engine, saved: Checkpoint) -> None:
    engine.load_optimizer_state(OptimizerState(int(saved.state["optimizer_steps"]), saved.optimizer))


def samples_digest(batch: Batch, micro_step: int, rank: int) -> Tensor:
    """A number that depends on every sample, its epoch and its place in the global batch: float64 ().

    The sum over ranks is the same however many ranks share the batch, and exact: 32 bits a sample.
    """
    first = rank * len(batch.sample_ids)
    places = torch.arange(first, first + len(batch.sample_ids), device=batch.sample_ids.device)
    state = bits(micro_step, batch.epochs, batch.sample_ids * (1 << 20) + places, 0, 1)
    return ((state >> 32) & 0xFFFFFFFF).double().sum()


def lost_peer(error: BaseException) -> str:
    said = str(error).splitlines()[0][:120]
    return (
        f"another rank has ended or does not answer ({said}); its own messages, or those of its node, say why"
    )
