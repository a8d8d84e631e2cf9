"""Everything that a plan tells, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.errors import ConfigError, UserError
from pretrain.plan import memory, recipe, schedule, timing
from pretrain.plan.backbone import encoder_of
from pretrain.plan.basis import basis_of
from pretrain.plan.flops import StepFlops, flops_of, site_of
from pretrain.plan.measured import Figure, Results
from pretrain.plan.memory import Memory
from pretrain.plan.network import Communication, communication_of
from pretrain.plan.parameters import Parameters, parameters_of
from pretrain.plan.recipe import Settings
from pretrain.plan.schedule import Saving
from pretrain.plan.timing import Machine, ScalingRow, StepTime

SECONDS_PER_DAY = 86400
NEEDS_IMAGES = ("exemplar", "cluster_labels")  # tasks that grow with the data


@dataclass(frozen=True)
class Question:
    """What the command line asks, besides the settings."""

    nodes: int
    machine: Machine
    num_images: int | None
    images_per_core_second: float
    disk_bytes_per_second: float
    node_hours: float  # mean time to a failure of one node
    host_bytes_per_second: float = schedule.HOST_COPY_BYTES_PER_SECOND
    results: Results | None = None  # that some of the numbers above are from


@dataclass(frozen=True)
class Layout:
    nodes: int
    gpus_per_node: int
    ranks: int
    global_batch: int
    micro_batch: int
    accumulation_steps: int
    stage: int
    recompute: bool
    precision: str


@dataclass(frozen=True)
class Feeding:
    """Images that the CPU cores have to decode."""

    images_per_second: float  # of all GPUs
    per_gpu: float
    per_node: float
    cores_per_gpu: float
    images_per_core_second: float
    decode_threads: int  # of a rank, as the config says


@dataclass(frozen=True)
class Length:
    num_images: int | None
    num_steps: int
    seconds: float  # of training, without saving, failures and evaluation
    gpu_hours: float


@dataclass(frozen=True)
class Advice:
    """Settings that fit."""

    stage: int | None  # None: nothing fits
    recompute: bool
    accumulation_steps: int
    why: str
    more: tuple[str, ...] = ()  # what would save time besides


@dataclass(frozen=True)
class Prediction:
    model: str
    layout: Layout
    gpu: str
    gpu_memory_bytes: float
    peak: str  # the denominator of the utilisation
    utilisation: float
    parameters: Parameters
    flops: StepFlops
    memory: list[Memory]  # of each stage, as the config is about recomputing
    memory_other: list[Memory]  # with recomputing, if the config has none, and the other way round
    unfused_attention_bytes: (
        float  # that attention would keep more without a fused kernel, nothing recomputed
    )
    advice: Advice
    step: StepTime
    communication: Communication
    network: str
    feeding: Feeding
    length: Length
    saving: Saving
    scaling: list[ScalingRow]
    is_counted: bool  # the backbone is in no table; it was counted on the module
    basis: tuple[Figure, ...]  # what of it was measured, and what assumed
    memory_error_ratio: float | None  # of predicted peaks, as measured on a GPU

    @property
    def images_per_second(self) -> float:
        return self.layout.global_batch / self.step.total


def fits(found: Memory, gpu_memory_bytes: float) -> bool:
    return found.peak + memory.RESERVE_BYTES <= gpu_memory_bytes


def predict(settings: Settings, asked: Question) -> Prediction:
    """UserError where the run could not be laid out so, or something has to be told first."""
    layout = _layout(settings, asked)
    num_images = schedule.images_of(settings, asked.num_images)
    tasks = recipe.tasks_of(settings)
    grows = next((name for name in NEEDS_IMAGES if name in tasks), None)
    if num_images is None and grows:
        raise UserError(f"tasks.{grows}: its size follows from the number of images; give --images N")
    num_steps = schedule.num_steps(settings, num_images)
    encoder = encoder_of(settings)
    site = site_of(settings, encoder, layout.ranks, num_images or 0)
    flops = flops_of(settings, encoder, site)
    parameters = parameters_of(settings, encoder, site)
    activity = memory.activity_of(settings, encoder, site)

    def memory_of(stage: int, recompute: bool, micro_batch: int = layout.micro_batch) -> Memory:
        return memory.memory_of(
            settings,
            encoder,
            parameters,
            activity,
            stage=stage,
            world_size=layout.ranks,
            micro_batch=micro_batch,
            recompute=recompute,
        )

    machine = asked.machine
    step = timing.step_time(
        settings,
        flops,
        encoder,
        parameters,
        machine,
        nodes=asked.nodes,
        micro_batch=layout.micro_batch,
        stage=layout.stage,
    )
    rate = layout.global_batch / step.total
    seconds = num_steps * step.total
    return Prediction(
        model=encoder.name,
        layout=layout,
        gpu=machine.gpu.name,
        gpu_memory_bytes=machine.gpu.memory_bytes,
        peak=machine.gpu.peak.name,
        utilisation=machine.utilisation_at(layout.micro_batch),
        parameters=parameters,
        flops=flops,
        memory=[memory_of(stage, layout.recompute) for stage in memory.STAGES],
        memory_other=[memory_of(stage, not layout.recompute) for stage in memory.STAGES],
        unfused_attention_bytes=layout.micro_batch * activity.unfused,
        advice=_advice(settings, layout, machine.gpu.memory_bytes, memory_of),
        step=step,
        communication=communication_of(
            settings,
            parameters,
            machine.gpu,
            machine.network,
            stage=layout.stage,
            nodes=asked.nodes,
            gpus_per_node=machine.gpus_per_node,
        ),
        network=machine.network.name,
        feeding=Feeding(
            rate,
            rate / layout.ranks,
            rate / layout.nodes,
            rate / layout.ranks / asked.images_per_core_second,
            asked.images_per_core_second,
            settings["data"]["decode_threads"],
        ),
        length=Length(num_images, num_steps, seconds, seconds * layout.ranks / 3600),
        saving=schedule.saving_of(
            settings,
            parameters.checkpoint_bytes,
            step.total,
            nodes=asked.nodes,
            disk_bytes_per_second=asked.disk_bytes_per_second,
            node_hours=asked.node_hours,
            host_bytes_per_second=asked.host_bytes_per_second,
        ),
        scaling=timing.scaling_table(
            settings,
            flops,
            encoder,
            parameters,
            machine,
            micro_batch=layout.micro_batch,
            stage=layout.stage,
        ),
        is_counted=encoder.is_counted,
        basis=basis_of(
            settings,
            machine,
            asked.results,
            nodes=asked.nodes,
            micro_batch=layout.micro_batch,
            host_bytes_per_second=asked.host_bytes_per_second,
        ),
        memory_error_ratio=asked.results.memory_error_ratio if asked.results else None,
    )


def _layout(settings: Settings, asked: Question) -> Layout:
    """ConfigError where the batch or the lanes cannot be shared by so many ranks; says how many can."""
    batch, lanes, engine = settings["batch"], settings["data"]["lanes"], settings["engine"]
    size, accumulation = batch["global_size"], batch["accumulation_steps"]
    per_node = asked.machine.gpus_per_node
    ranks = asked.nodes * per_node
    if size % (lanes * accumulation):
        unit = lanes * accumulation
        below = size // unit * unit
        raise ConfigError(
            f"batch.global_size: {size} is not divisible by data.lanes * batch.accumulation_steps = "
            f"{lanes} * {accumulation}; use {f'{below} or ' if below else ''}{below + unit}"
        )
    if engine["kind"] == "local" and ranks > 1:
        raise ConfigError(
            f"engine.kind: 'local' trains on one rank, and {ranks} are asked for; set engine.kind=deepspeed"
        )
    if lanes % ranks:
        fitting = [n for n in range(1, lanes // per_node + 1) if lanes % (n * per_node) == 0]
        nodes = (
            f"{', '.join(map(str, fitting))} nodes of {per_node} would do" if fitting else "fewer GPUs a node"
        )
        above = -(-lanes // ranks) * ranks
        raise ConfigError(
            f"data.lanes: {lanes} lanes cannot be shared equally by {asked.nodes} x {per_node} = {ranks} "
            f"ranks; {nodes}, or set data.lanes={above} and a batch.global_size that is a multiple of it"
        )
    return Layout(
        asked.nodes,
        per_node,
        ranks,
        size,
        size // accumulation // ranks,
        accumulation,
        memory.stage_of(settings),
        engine["recompute"],
        engine["precision"],
    )


def _advice(settings: Settings, layout: Layout, gpu_bytes: float, memory_of: Callable[..., Memory]) -> Advice:
    """Smaller micro batches come last: they leave a contrastive task fewer images to compare with."""
    steps, size, lanes = layout.accumulation_steps, layout.global_batch, settings["data"]["lanes"]
    as_set = memory_of(layout.stage, layout.recompute)
    if fits(as_set, gpu_bytes):
        hints = []
        if layout.recompute and fits(memory_of(layout.stage, False), gpu_bytes):
            hints.append("engine.recompute=false fits too, and nothing is computed twice")
        if (
            0 < layout.stage < 3
            and layout.ranks > 1
            and not memory.zero_settings(settings).get("overlap_comm")
        ):
            hints.append("engine.deepspeed.zero_optimization.overlap_comm=true hides sums of gradients")
        return Advice(layout.stage, layout.recompute, steps, "the config fits as it is", tuple(hints))
    optim = settings["optim"]
    needs_whole_tensors = optim["name"] == "lars" or (optim["clip"] == "tensor" and optim["clip_norm"] > 0)
    can_divide = layout.ranks > 1 and not needs_whole_tensors
    stages = [stage for stage in (1, 2, 3) if can_divide and stage > layout.stage]
    for recompute in (layout.recompute, True):
        for stage in (layout.stage, *stages):
            if fits(memory_of(stage, recompute), gpu_bytes):
                return Advice(stage, recompute, steps, "the first change that makes it fit")
    for more in range(steps + 1, size // lanes + 1):
        micro_batch = size // more // layout.ranks
        for stage in (layout.stage, *stages) if size % (lanes * more) == 0 else ():
            if fits(memory_of(stage, True, micro_batch), gpu_bytes):
                return Advice(stage, True, more, "the first change that makes it fit")
    return Advice(
        None, layout.recompute, steps, "no setting here fits; use GPUs with more memory or a smaller model"
    )
