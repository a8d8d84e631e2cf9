"""Every metric that is published: one table, from which the exporter, the dashboards and the docs are made.

Names follow Prometheus: base units, `_total` on counters, ratios between 0 and 1. No metric has a label for
the run, its rank or its node: those belong to the target, and `targets.json` gives them to Prometheus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["count", "seconds", "bytes", "ratio", "per_second", "flops", "nats", "timestamp", "number"]

STEP_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    scope: of the whole run, published by rank 0 alone, or of each rank, published by every one.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: Unit
    help: str
    labels: tuple[str, ...] = ()
    scope: Literal["run", "rank"] = "run"


# the run
RUN_INFO = Metric(
    "pretrain_run_info", "gauge", "number", "Always 1; what runs is in the labels.",
    ("name", "model", "tasks", "version", "commit"),
)  # fmt: skip
STEP = Metric("pretrain_step", "gauge", "count", "Optimizer steps the run has taken, over all its starts.")
PLANNED_STEPS = Metric("pretrain_planned_steps", "gauge", "count", "Optimizer steps of the whole run.")
STEPS = Metric(
    "pretrain_steps_total", "counter", "count", "Optimizer steps of this process, skipped ones included."
)
IMAGES = Metric("pretrain_images_total", "counter", "count", "Images trained on, over all ranks.")
EPOCH = Metric("pretrain_epoch", "gauge", "number", "Passes over the data so far.")
LAST_STEP_TIME = Metric(
    "pretrain_last_step_timestamp_seconds", "gauge", "timestamp", "When the last step ended.", scope="rank"
)
IMAGES_PER_SECOND = Metric(
    "pretrain_images_per_second", "gauge", "per_second",
    "Images per second over all ranks, since the last log line.",
)  # fmt: skip
MODEL_FLOPS = Metric(
    "pretrain_model_flops_total", "counter", "flops",
    "Floating-point operations that the model needs, over all ranks; what is recomputed counts once.",
)  # fmt: skip
PEAK_FLOPS = Metric(
    "pretrain_peak_flops_per_second", "gauge", "flops",
    "What all devices of the run can do at most: the denominator of the utilisation.", ("source",),
)  # fmt: skip
MFU = Metric(
    "pretrain_mfu_ratio", "gauge", "ratio",
    "Model FLOP utilisation since the last log line: FLOPs of the model per second over the peak.",
)  # fmt: skip
GOODPUT = Metric(
    "pretrain_goodput_ratio", "gauge", "ratio",
    "Time in steps that count over all time since the run first began, restarts and waiting included.",
)  # fmt: skip

# losses and optimisation
LOSS = Metric(
    "pretrain_loss", "gauge", "number",
    "Loss of the last step; task 'total' is the balanced sum.", ("task",),
)  # fmt: skip
LOSS_WEIGHT = Metric(
    "pretrain_loss_weight", "gauge", "number", "Weight of a task's loss in the total.", ("task",)
)
TASK_METRIC = Metric(
    "pretrain_task_metric", "gauge", "number",
    "Pretext metric of the last step, such as an accuracy and its chance.", ("task", "metric"),
)  # fmt: skip
GRAD_NORM = Metric(
    "pretrain_gradient_norm", "gauge", "number", "Global gradient norm before clipping, of the last step."
)
TASK_GRAD_NORM = Metric(
    "pretrain_task_gradient_norm", "gauge", "number",
    "Norm of a task's weighted gradient in the shared parameters, where log.gradients asks for it.",
    ("task",),
)  # fmt: skip
TASK_GRAD_COSINE = Metric(
    "pretrain_task_gradient_cosine", "gauge", "number",
    "Cosine between the gradients of two tasks in the shared parameters; below 0 they pull apart.",
    ("task", "other"),
)  # fmt: skip
LEARNING_RATE = Metric("pretrain_learning_rate", "gauge", "number", "Learning rate of the last step.")
WEIGHT_DECAY = Metric("pretrain_weight_decay", "gauge", "number", "Weight decay of the last step.")
MOMENTUM = Metric("pretrain_teacher_momentum", "gauge", "ratio", "Momentum of the teacher's last update.")
NONFINITE_STEPS = Metric(
    "pretrain_nonfinite_steps_total", "counter", "count",
    "Steps skipped for a loss or gradient that was not finite.",
)  # fmt: skip
ANOMALIES = Metric(
    "pretrain_anomalies_total", "counter", "count",
    "What anomalies.jsonl notes: 'not finite', 'loss spike', 'collapse'.", ("kind",),
)  # fmt: skip
ROLLBACKS = Metric(
    "pretrain_rollbacks_total", "counter", "count", "Times this process went back to a checkpoint."
)

# time
STEP_SECONDS = Metric(
    "pretrain_step_seconds", "histogram", "seconds", "Wall time of an optimizer step.", scope="rank"
)
SECTION_SECONDS = Metric(
    "pretrain_section_seconds", "histogram", "seconds",
    "Time of a step's sections: data, transfer, views, teacher, forward, backward, step; of a checkpoint or "
    "evaluation between steps.",
    ("section",), scope="rank",
)  # fmt: skip
WORK_SECONDS = Metric(
    "pretrain_rank_work_seconds", "gauge", "seconds",
    "Time this rank worked in the last step before it first waited for the others.", scope="rank",
)  # fmt: skip
RANK_SPEED = Metric(
    "pretrain_rank_speed_ratio", "gauge", "number",
    "Work time of the other ranks over this one's: 1 is as fast, 0.5 half as fast.", scope="rank",
)  # fmt: skip
BACKBONE_CALLS = Metric(
    "pretrain_backbone_calls_total", "counter", "count", "Encoder passes of this rank.", scope="rank"
)
TEACHER_CALLS = Metric(
    "pretrain_teacher_calls_total", "counter", "count", "Encoder passes of this rank's teacher.",
    scope="rank",
)  # fmt: skip

# memory
DEVICE_MEMORY = Metric(
    "pretrain_device_memory_bytes", "gauge", "bytes",
    "Memory of this rank's GPU: 'allocated' and 'reserved' by torch, its 'peak', and 'total' of the device.",
    ("kind",), scope="rank",
)  # fmt: skip
RESIDENT_MEMORY = Metric(
    "pretrain_resident_memory_bytes", "gauge", "bytes",
    "Resident memory of this rank's processes: 'trainer' and 'loader'.", ("process",), scope="rank",
)  # fmt: skip

# data
DATA_WAIT = Metric(
    "pretrain_data_wait_seconds_total", "counter", "seconds", "Time this rank waited for batches.",
    scope="rank",
)  # fmt: skip
SKIPPED_SAMPLES = Metric(
    "pretrain_skipped_samples_total", "counter", "count",
    "Samples this rank replaced because they could not be used, by reason.", ("reason",), scope="rank",
)  # fmt: skip
SAMPLES_ALLOWED = Metric(
    "pretrain_skipped_samples_allowed", "gauge", "count",
    "How many samples the run may skip before it stops (data.max_bad_ratio).",
)  # fmt: skip
STORAGE_RETRIES = Metric(
    "pretrain_storage_retries_total", "counter", "count", "Reads of this rank that were tried again.",
    scope="rank",
)  # fmt: skip
SHARDS_OPENED = Metric(
    "pretrain_shards_opened_total", "counter", "count", "Shards this rank has opened.", scope="rank"
)
CACHE_READS = Metric(
    "pretrain_cache_reads_total", "counter", "count",
    "Shards this rank asked the node's cache for: 'hit' or 'miss'.", ("result",), scope="rank",
)  # fmt: skip

# what is saved, and what went wrong
CHECKPOINT_STEP = Metric("pretrain_checkpoint_step", "gauge", "count", "Step of the last checkpoint.")
CHECKPOINT_EVERY = Metric(
    "pretrain_checkpoint_every_steps", "gauge", "count", "Steps from one checkpoint to the next."
)
CHECKPOINT_TIME = Metric(
    "pretrain_checkpoint_timestamp_seconds", "gauge", "timestamp", "When the last checkpoint was written."
)
CHECKPOINT_SECONDS = Metric(
    "pretrain_checkpoint_seconds", "gauge", "seconds", "Time the last checkpoint took to write."
)
CHECKPOINT_STALL_SECONDS = Metric(
    "pretrain_checkpoint_stall_seconds", "gauge", "seconds",
    "Time the last checkpoint held up the training.",
)  # fmt: skip
CHECKPOINT_BYTES = Metric("pretrain_checkpoint_bytes", "gauge", "bytes", "Size of the last checkpoint.")
CHECKPOINT_FAILURES = Metric(
    "pretrain_checkpoint_failures_total", "counter", "count", "Checkpoints that could not be written."
)
MIRROR_FAILURES = Metric(
    "pretrain_mirror_failures_total", "counter", "count",
    "Checkpoints that could not be copied to the mirror.",
)  # fmt: skip
DISK_FREE = Metric("pretrain_disk_free_bytes", "gauge", "bytes", "Free space where the run folder lies.")
ATTEMPT = Metric("pretrain_attempt", "gauge", "count", "How often this run was started, this time included.")
RESTARTS = Metric(
    "pretrain_restarts_total", "counter", "count", "Starts of this run after its first, over its life."
)
PREEMPTIONS = Metric(
    "pretrain_preemptions_total", "counter", "count",
    "Starts of this run that ended on request, over its life.",
)  # fmt: skip

# what the representation is worth
FEATURE_STD = Metric(
    "pretrain_feature_std", "gauge", "ratio",
    "Spread of the directions of image features; 0 is a collapse, at most 1.",
)  # fmt: skip
EFFECTIVE_RANK = Metric(
    "pretrain_effective_rank", "gauge", "number",
    "Exponential of the entropy of the singular values of rank 0's features; 1 is a collapse.",
)  # fmt: skip
FEATURE_SIMILARITY = Metric(
    "pretrain_feature_similarity", "gauge", "number",
    "Mean cosine of the features of two views: of the 'same' image, and of 'different' ones.", ("images",),
)  # fmt: skip
TEACHER_ENTROPY = Metric(
    "pretrain_teacher_entropy_ratio", "gauge", "ratio",
    "Entropy of the teacher's assignment over its bound, ln K; 0 and 1 are collapses.", ("task",),
)  # fmt: skip
EVAL_ACCURACY = Metric(
    "pretrain_eval_accuracy_ratio", "gauge", "ratio",
    "Accuracy of the last evaluation on the way.", ("eval", "k"),
)  # fmt: skip

METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
BY_NAME = {metric.name: metric for metric in METRICS}
