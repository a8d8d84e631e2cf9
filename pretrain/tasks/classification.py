"""Classification: tell the class of each image, from labels; for training jointly with pretext tasks."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import fp32, global_mean
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskConfig, TaskOutput, TaskSite


class ClassificationConfig(TaskConfig):
    num_classes: Annotated[int, Field(ge=2)]
    feature: Literal["class", "mean_patch"] = "class"  # the class token, or the mean of the patch tokens
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


def unsuited(config: ClassificationConfig, surroundings: Surroundings) -> str | None:
    if config.feature == "class" and not surroundings.layout.has_class_token:
        return "reads the class token, which this model does not have; set feature: mean_patch"
    return None


@fp32
def summed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Over the rows that have a label. logits (M, K), labels int64 (M,), -1 for none -> ()"""
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing)


class ClassificationTask(nn.Module):
    """Softmax classification by one linear layer.

    Images without a label are skipped; the mean is over the views with one on all ranks. The head runs for
    every view, so its gradient exists (as zeros) even where all were skipped.
    Metrics: `accuracy`; `chance`, 1 / K; `labelled`, the ratio of views that have a label.
    """

    def __init__(self, config: ClassificationConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(site.embed_dim, config.num_classes)

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        assert views.labels is not None
        labels = views.labels.repeat(len(views.names))  # (M,)
        is_class = self.config.feature == "class"
        patches = views.layout.patches(views.tokens)
        feature = views.layout.class_token(views.tokens) if is_class else patches.mean(dim=1)
        logits = self.head(feature)  # (M, K)
        count = (labels >= 0).sum()
        summed = summed_cross_entropy(logits, labels, self.config.label_smoothing)
        loss = global_mean(summed, count, peers)
        num_correct = (logits.detach().argmax(dim=1) == labels).sum().to(loss.dtype)
        metrics = {
            "accuracy": global_mean(num_correct, count, peers),
            "chance": loss.new_full((), 1 / self.config.num_classes),
            "labelled": count / len(labels),
        }
        return TaskOutput(loss, metrics)
