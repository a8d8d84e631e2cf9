"""How long a step takes, by FLOPs, a stated utilisation and the talking, and how it scales: predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.plan.backbone import Encoder
from pretrain.plan.flops import StepFlops
from pretrain.plan.hardware import Gpu
from pretrain.plan.measured import between
from pretrain.plan.network import Communication, Network, communication_of
from pretrain.plan.parameters import Parameters
from pretrain.plan.recipe import Settings

# least width -> model FLOPs over the dense peak: a roofline model of blocks that are not compiled, on an H200
# (products at 75 % of what is measured of them, the rest at the speed of memory); no measurement
USUAL_UTILISATION = {0: 0.25, 768: 0.35, 1024: 0.39, 1280: 0.41}
JITTER_RATIO = 0.02  # standard deviation of a rank's step time
STEPPED_BYTES = 30  # of memory that AdamW reads and writes for each parameter
WORLDS = tuple(2**power for power in range(11))  # 1 to 1024 ranks


@dataclass(frozen=True)
class Machine:
    """Where the run is to be."""

    gpu: Gpu
    network: Network
    gpus_per_node: int
    utilisation: float
    # of whole steps, the optimizer's part included: (images of a micro step, utilisation), growing
    measured: tuple[tuple[int, float], ...] = ()

    def utilisation_at(self, micro_batch: float) -> float:
        return between(self.measured, micro_batch) if self.measured else self.utilisation


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step."""

    compute: float  # all micro steps, at the stated utilisation
    jitter: float  # for the slowest of all ranks
    communication: float  # all of it
    exposed: float  # what of it the step waits for
    optimizer: float  # 0 where it is part of what was measured

    @property
    def total(self) -> float:
        return self.compute + self.jitter + self.exposed + self.optimizer


def usual_utilisation(dim: int) -> float:
    return next(ratio for least, ratio in reversed(USUAL_UTILISATION.items()) if dim >= least)


def executed_flops(flops: StepFlops, encoder: Encoder, recompute: bool) -> float:
    """Of one image, what is computed twice included."""
    return flops.train + (encoder.blocks.forward if recompute else 0.0)


def step_time(
    settings: Settings,
    flops: StepFlops,
    encoder: Encoder,
    parameters: Parameters,
    machine: Machine,
    *,
    nodes: int,
    micro_batch: float,
    stage: int,
    gpus_per_node: int | None = None,
) -> StepTime:
    per_node = gpus_per_node or machine.gpus_per_node
    ranks = nodes * per_node
    accumulation = settings["batch"]["accumulation_steps"]
    rate = machine.gpu.dense_flops_per_second * machine.utilisation_at(micro_batch)
    executed = executed_flops(flops, encoder, settings["engine"]["recompute"])
    of_micro_step = micro_batch * executed / rate
    talk: Communication = communication_of(
        settings,
        parameters,
        machine.gpu,
        machine.network,
        stage=stage,
        nodes=nodes,
        gpus_per_node=per_node,
    )
    backward = of_micro_step * (flops.train - flops.student_forward - flops.teacher_forward) / flops.train
    compute = accumulation * of_micro_step
    stepped = parameters.trained / (ranks if stage else 1)
    return StepTime(
        compute=compute,
        jitter=compute * JITTER_RATIO * math.sqrt(2 * math.log(ranks)),
        communication=talk.seconds,
        exposed=talk.exposed_seconds(backward),
        optimizer=0.0 if machine.measured else STEPPED_BYTES * stepped / machine.gpu.memory_bytes_per_second,
    )


@dataclass(frozen=True)
class ScalingRow:
    """A number of ranks. None where the batch or the lanes cannot be shared by so many."""

    ranks: int
    nodes: int
    weak_images_per_second: float  # each rank with the micro batch of the plan
    weak_efficiency: float  # against as many single ranks
    strong_micro_batch: int | None  # of the config's global batch
    strong_images_per_second: float | None
    strong_efficiency: float | None


def scaling_table(
    settings: Settings,
    flops: StepFlops,
    encoder: Encoder,
    parameters: Parameters,
    machine: Machine,
    *,
    micro_batch: int,
    stage: int,
) -> list[ScalingRow]:
    batch, lanes = settings["batch"], settings["data"]["lanes"]
    accumulation, size = batch["accumulation_steps"], batch["global_size"]

    def rate(ranks: int, images: float) -> float:
        per_node = min(ranks, machine.gpus_per_node)
        step = step_time(
            settings,
            flops,
            encoder,
            parameters,
            machine,
            nodes=-(-ranks // per_node),
            micro_batch=images,
            stage=stage,
            gpus_per_node=per_node,
        )
        return float(ranks * images * accumulation / step.total)

    alone, together = rate(1, micro_batch), rate(1, size / accumulation)
    rows = []
    for ranks in WORLDS:
        weak = rate(ranks, micro_batch)
        share, rest = divmod(size, accumulation * ranks)
        strong = rate(ranks, share) if share and not rest and lanes % ranks == 0 else None
        rows.append(
            ScalingRow(
                ranks,
                -(-ranks // machine.gpus_per_node),
                weak,
                weak / (ranks * alone),
                share if strong else None,
                strong,
                strong / (ranks * together) if strong else None,
            )
        )
    return rows
