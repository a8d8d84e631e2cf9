"""Every metric that is published: one table, read by the exporter and checked against dashboards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


STEPS = Metric("pretrain_steps_total", "counter", "Optimizer steps, skipped ones included.")
IMAGES = Metric("pretrain_images_total", "counter", "Images trained on, over all ranks.")
EPOCH = Metric("pretrain_epoch", "gauge", "Passes over the data so far.")
LOSS = Metric("pretrain_loss", "gauge", "Loss of the last step; task 'total' is the balanced sum.", ("task",))
LOSS_WEIGHT = Metric("pretrain_loss_weight", "gauge", "Weight of a task's loss in the total.", ("task",))
TASK_METRIC = Metric("pretrain_task_metric", "gauge", "Pretext metric of the last step.", ("task", "metric"))
GRAD_NORM = Metric("pretrain_gradient_norm", "gauge", "Global gradient norm before clipping.")
LEARNING_RATE = Metric("pretrain_learning_rate", "gauge", "Learning rate of the last step.")
MOMENTUM = Metric("pretrain_teacher_momentum", "gauge", "Momentum of the teacher's last update.")
STEP_SECONDS = Metric("pretrain_step_seconds", "histogram", "Wall time of an optimizer step.")
DATA_WAIT = Metric("pretrain_data_wait_seconds_total", "counter", "Time the trainer waited for batches.")
IMAGES_PER_SECOND = Metric(
    "pretrain_images_per_second", "gauge", "Images per second over all ranks, since the last log line."
)
BACKBONE_CALLS = Metric("pretrain_backbone_calls_total", "counter", "Encoder passes of this rank.")
TEACHER_CALLS = Metric("pretrain_teacher_calls_total", "counter", "Encoder passes of this rank's teacher.")
SKIPPED_STEPS = Metric(
    "pretrain_nonfinite_steps_total", "counter", "Steps skipped for a loss or gradient that was not finite."
)
BAD_SAMPLES = Metric(
    "pretrain_bad_samples_total",
    "counter",
    "Samples of all ranks replaced because they could not be decoded.",
)
STORAGE_RETRIES = Metric(
    "pretrain_storage_retries_total", "counter", "Reads of all ranks that were tried again."
)
CHECKPOINT_SECONDS = Metric("pretrain_checkpoint_seconds", "gauge", "Time the last checkpoint took to write.")
CHECKPOINT_STALL_SECONDS = Metric(
    "pretrain_checkpoint_stall_seconds", "gauge", "Time the last checkpoint held up the training."
)
CHECKPOINT_FAILURES = Metric(
    "pretrain_checkpoint_failures_total", "counter", "Checkpoints that could not be written."
)
MIRROR_FAILURES = Metric(
    "pretrain_mirror_failures_total", "counter", "Checkpoints that could not be copied to the mirror."
)
ATTEMPT = Metric("pretrain_attempt", "gauge", "How often this run was started, this time included.")
ROLLBACKS = Metric("pretrain_rollbacks_total", "counter", "Times this process went back to a checkpoint.")
RANK_SPEED = Metric(
    "pretrain_rank_speed_ratio",
    "gauge",
    "Work time of the other ranks over its own; 1 is as fast.",
    ("rank",),
)
FEATURE_STD = Metric(
    "pretrain_feature_std", "gauge", "Spread of the directions of image features; 0 is a collapse, at most 1."
)
EVAL_ACCURACY = Metric(
    "pretrain_eval_accuracy_ratio", "gauge", "Accuracy of the last evaluation on the way.", ("eval", "k")
)
CHECKPOINT_STEP = Metric("pretrain_checkpoint_step", "gauge", "Step of the last checkpoint.")

METRICS = (
    STEPS, IMAGES, EPOCH, LOSS, LOSS_WEIGHT, TASK_METRIC, GRAD_NORM, LEARNING_RATE, MOMENTUM, STEP_SECONDS,
    DATA_WAIT, IMAGES_PER_SECOND, BACKBONE_CALLS, TEACHER_CALLS, SKIPPED_STEPS, BAD_SAMPLES,
    STORAGE_RETRIES, CHECKPOINT_SECONDS, CHECKPOINT_STALL_SECONDS, CHECKPOINT_FAILURES, MIRROR_FAILURES,
    ATTEMPT, ROLLBACKS, RANK_SPEED, FEATURE_STD, EVAL_ACCURACY, CHECKPOINT_STEP,
)  # fmt: skip
