"""Memory of one rank, by what holds it: a prediction.

Bytes of tensors at the moment when most are alive. In the backward pass gradients come while what the forward
pass has kept goes, so both are never there in full: the larger counts, and what one block works with besides.
In the optimizer's step all gradients are there, and DeepSpeed's copies of them. Left out are the libraries
themselves and what an allocator loses between tensors: `RESERVE_BYTES`.

What DeepSpeed 0.19 keeps at each stage was read from its engine at work: the stages 1 and 2 step an fp32 copy
of a rank's share of the weights, though these are fp32 themselves; stage 3 keeps whole weights from the
forward to the backward pass as long as `stage3_max_live_parameters` allows. `benchmarks/plan_memory.py`
measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pretrain.plan import recipe
from pretrain.plan.backbone import CHANNELS, Encoder
from pretrain.plan.cost import Cost, total
from pretrain.plan.heads import Site, head
from pretrain.plan.parameters import FP32, Parameters
from pretrain.plan.recipe import Settings

BF16 = 2  # bytes
STAGES = (0, 1, 2, 3)
RESERVE_BYTES = 3 * 2**30  # of a GPU: CUDA context, NCCL, cuBLAS, gaps between tensors; assumed
SHARED_BUCKETS = 8  # of the gradients, where `reduce_bucket_size` is auto
SMALLEST_BUCKET = 1_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    teacher: float
    buffers: float  # buckets, whole weights in flight, queues, and bf16 copies of the weights
    inputs: float  # views of a micro batch
    activations: float  # kept for the backward pass
    working: float  # of the block that goes backward first, or of the optimizer's step, beyond the above
    at_rest: float  # between two steps, the views of the last one included
    peak: float  # less than the sum: gradients come while activations go


@dataclass(frozen=True)
class Activity:
    """What one image keeps, in bytes."""

    kept: float
    kept_recomputed: float  # with `engine.recompute`
    working: float  # gradients inside the block that keeps most
    working_recomputed: float  # and what that block keeps, made again
    unfused: float  # that plain attention, without a fused kernel, would keep more; 0 if not known


def activity_of(settings: Settings, encoder: Encoder, site: Site) -> Activity:
    low = _low(settings)
    heads = total(head(name, site) for name in recipe.tasks_of(settings))
    rest = _bytes(encoder.cost, low) - _bytes(encoder.blocks, low)
    largest = _bytes(encoder.largest, low)
    # The gradients of an MLP's two hidden layers and of what goes into the block: of the 16 widths of tokens
    # that a block keeps, 10; as much of what other backbones keep.
    working = largest * 10 / 16
    return Activity(
        kept=_bytes(encoder.cost, low) + _bytes(heads, low),
        kept_recomputed=rest + FP32 * encoder.block_inputs + _bytes(heads, low),
        working=working,
        working_recomputed=working + largest,
        unfused=_bytes(encoder.unfused, low),
    )


def _low(settings: Settings) -> int:
    return BF16 if settings["engine"]["precision"] == "bf16" else FP32


def _bytes(cost: Cost, low: int) -> float:
    return low * cost.saved + FP32 * cost.saved_fp32


def input_bytes(settings: Settings) -> float:
    """Of one image: its crops, its views clean and, where somebody reads it so, normalised. The views that go
    into the network are counted with what it keeps, unless it keeps them rounded."""
    per_pixel = 1 + FP32 * (1 + recipe.needs_whole(settings)) + (FP32 if _low(settings) == BF16 else 0)
    return float(sum(CHANNELS * view["size_px"] ** 2 * per_pixel for view in settings["views"].values()))


def zero_settings(settings: Settings) -> dict[str, Any]:
    """The section of the DeepSpeed settings that says how a model is divided."""
    return dict(settings["engine"]["deepspeed"].get("zero_optimization", {}))


def stage_of(settings: Settings) -> int:
    return 0 if settings["engine"]["kind"] == "local" else int(zero_settings(settings).get("stage", 0))


def bucket_elements(settings: Settings, parameters: Parameters) -> int:
    """As `engine.deepspeed_engine.resolve`."""
    asked = zero_settings(settings).get("reduce_bucket_size", "auto")
    if asked != "auto":
        return int(asked)
    return max(SMALLEST_BUCKET, parameters.trained // SHARED_BUCKETS)


def memory_of(
    settings: Settings,
    encoder: Encoder,
    parameters: Parameters,
    activity: Activity,
    *,
    stage: int,
    world_size: int,
    micro_batch: int,
    recompute: bool,
) -> Memory:
    share = parameters.trained / world_size
    divided = FP32 * share
    owned = FP32 * parameters.student if stage < 3 else divided + FP32 * parameters.frozen
    gradients = FP32 * parameters.trained if stage == 0 else divided
    optimizer = parameters.optimizer * (FP32 * parameters.trained if stage == 0 else divided)
    if stage:
        optimizer += divided  # the copy that is stepped
    zero = zero_settings(settings)
    num_buckets = 1 + bool(zero.get("overlap_comm", stage == 3))
    bucket = FP32 * min(bucket_elements(settings, parameters), parameters.trained) * num_buckets
    buffers = 2.0 * FP32 * parameters.buffers  # and a copy, for steps that are skipped
    if settings["engine"]["kind"] == "deepspeed" and stage:
        buffers += bucket
    if _low(settings) == BF16:
        buffers += BF16 * encoder.cost.matrices
    live = 0.0  # bytes of whole weights between the passes
    if stage == 3 and world_size > 1:
        live = FP32 * min(int(zero.get("stage3_max_live_parameters", 10**9)), parameters.trained)
        buffers += live
    inputs = micro_batch * input_bytes(settings)
    kept = micro_batch * (activity.kept_recomputed if recompute else activity.kept)
    in_block = micro_batch * (activity.working_recomputed if recompute else activity.working)
    copies = 0.0 if stage == 0 else divided
    teacher = FP32 * parameters.teacher
    always = owned + optimizer + teacher + buffers + inputs
    if stage == 3:
        always += gradients
    turn = in_block + (kept if stage == 3 else max(kept, gradients))
    step = copies if stage == 3 else gradients + copies
    return Memory(
        stage, owned, gradients, optimizer, teacher, buffers, inputs, kept, max(in_block, copies),
        at_rest=always - (live if stage == 3 else 0.0),
        peak=always + max(turn, step),
    )  # fmt: skip
