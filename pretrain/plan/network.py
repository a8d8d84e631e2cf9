"""How long ranks talk in a step, by the alpha-beta model: a latency for each collective, a rate for bytes.

Rates are bus rates, as nccl-tests prints them: a ring of N ranks sums S bytes in 2 (N - 1) / N * S / rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.plan.hardware import Gpu
from pretrain.plan.memory import bucket_elements, zero_settings
from pretrain.plan.parameters import FP32, Parameters
from pretrain.plan.recipe import Settings

BF16 = 2
LATENCY_SECONDS = 40e-6  # of a collective inside a node
HIDDEN_RATIO = 0.9  # of the backward pass, under which sums can hide
SEEN_RATIO = 0.1  # of the sums, which never hides: the last bucket
GATHER_SECONDS = 0.2e-3  # of the small collectives of losses and metrics in a step
IN_SWITCH = ("H100", "H200", "GH200", "B200", "GB200")  # their switches sum; a ring reaches about 80 %
RING_RATIO = 0.8
PCIE_BYTES_PER_SECOND = 20e9


@dataclass(frozen=True)
class Network:
    """Between nodes."""

    name: str
    bytes_per_second_per_gpu: float  # effective; 0 where a node has its own rate
    bytes_per_second_per_node: float
    hop_seconds: float  # added for each doubling of the nodes, there and back

    def node_rate(self, gpus_per_node: int) -> float:
        return self.bytes_per_second_per_node or self.bytes_per_second_per_gpu * gpus_per_node


NETWORKS = {
    # one 400 Gb/s adapter for each GPU, 90 % of it
    "infiniband": Network("InfiniBand NDR, 400 Gb/s a GPU", 45e9, 0.0, 12e-6),
    # one 100 Gb/s adapter for each node, 90 % of it
    "ethernet": Network("Ethernet, 100 Gb/s a node", 0.0, 11.25e9, 50e-6),
}


@dataclass(frozen=True)
class Communication:
    """Of one optimizer step."""

    reduced_bytes: float  # gradients that are summed
    gathered_bytes: float  # weights that are collected
    reduce_seconds: float
    gather_seconds: float
    small_seconds: float
    rate: float  # bytes/s of the slowest link of the ring
    overlaps: bool  # sums begin while the backward pass goes on

    @property
    def seconds(self) -> float:
        return self.reduce_seconds + self.gather_seconds + self.small_seconds

    def exposed_seconds(self, backward_seconds: float) -> float:
        """What a step waits for; backward_seconds: of the last micro step."""
        reduce = self.reduce_seconds
        if self.overlaps:
            reduce = max(reduce - HIDDEN_RATIO * backward_seconds, SEEN_RATIO * reduce)
        return reduce + self.gather_seconds + self.small_seconds


def bus_rate(gpu: Gpu, network: Network, nodes: int, gpus_per_node: int) -> float:
    """Bytes/s, by the slowest part of the ring."""
    rates = []
    if gpus_per_node > 1 and gpu.bus_bytes_per_second:
        rates.append(gpu.bus_bytes_per_second)
    elif gpus_per_node > 1:
        ratio = 1.0 if gpu.name in IN_SWITCH else RING_RATIO
        rates.append(ratio * gpu.nvlink_bytes_per_second or PCIE_BYTES_PER_SECOND)
    if nodes > 1:
        rates.append(network.node_rate(gpus_per_node))
    return min(rates, default=math.inf)


def communication_of(
    settings: Settings,
    parameters: Parameters,
    gpu: Gpu,
    network: Network,
    *,
    stage: int,
    nodes: int,
    gpus_per_node: int,
) -> Communication:
    """What a step moves at a ZeRO stage.

    Stages 1 and 2 sum whole gradients as DeepSpeed does by default (`use_multi_rank_bucket_allreduce`), then
    collect the fp32 weights. Stage 2 sums in every micro step, the others once a step.
    """
    ranks = nodes * gpus_per_node
    zero, engine = zero_settings(settings), settings["engine"]
    is_bf16 = engine["precision"] == "bf16" and engine["gradient_reduction"] == "bf16"
    gradients = float((BF16 if is_bf16 else FP32) * parameters.trained)
    weights = float(FP32 * parameters.trained)
    rate = bus_rate(gpu, network, nodes, gpus_per_node)
    overlaps = bool(zero.get("overlap_comm", False)) or engine["kind"] == "local"
    if ranks == 1:
        return Communication(0.0, 0.0, 0.0, 0.0, 0.0, rate, overlaps)
    once = (ranks - 1) / ranks
    times = settings["batch"]["accumulation_steps"] if stage >= 2 else 1
    is_whole = stage < 3 and (
        stage == 0
        or not zero.get("reduce_scatter", True)
        or zero.get("use_multi_rank_bucket_allreduce", True)
    )
    latency = LATENCY_SECONDS + 2 * math.log2(nodes) * network.hop_seconds
    num_sums = math.ceil(parameters.trained / bucket_elements(settings, parameters))
    reduce = times * ((2 if is_whole else 1) * once * gradients / rate + num_sums * latency)
    num_gathers = 0
    if stage in (1, 2):
        num_gathers = 1
    elif stage == 3:
        is_kept = parameters.trained <= int(zero.get("stage3_max_live_parameters", 10**9))
        num_gathers = (1 if is_kept else 2) * settings["batch"]["accumulation_steps"]
    gather = num_gathers * (once * weights / rate + latency)
    return Communication(
        gradients * times, num_gathers * weights, reduce, gather, GATHER_SECONDS + latency, rate, overlaps
    )
