"""Jigsaw: tell where the content of shuffled patches came from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import accuracy, cross_entropy
from pretrain.models.heads import mlp
from pretrain.peers import Peers
from pretrain.tasks.contract import EncodedViews, TaskConfig, TaskOutput, TaskSite
from pretrain.tokens import take

NUM_CELLS = 9  # of the 3 x 3 puzzle


class JigsawConfig(TaskConfig):
    # `slot`: patches anywhere are shuffled, and each tells the place its content came from;
    # `permset`: nine patches in a 3 x 3 layout, which together tell the permutation, out of a set
    mode: Literal["slot", "permset"] = "slot"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1275  # of the patches that are shuffled (slot mode)
    num_permutations: Annotated[int, Field(ge=2, le=10_000)] = 100  # in the set (permset mode)
    hidden_dim: Annotated[int, Field(gt=0)] = 512  # of the head (permset mode)


def patch_request(config: JigsawConfig, num_patches: int) -> dict[str, int | bool | str]:
    """What the plan must draw for this task, as fields of PatchConfig."""
    num_shuffled = max(2, round(config.ratio * num_patches)) if config.mode == "slot" else NUM_CELLS
    return {"jigsaw": num_shuffled, "jigsaw_mode": config.mode, "num_permutations": config.num_permutations}


class JigsawTask(nn.Module):
    """Classification of the source of each shuffled patch, or of the permutation (Noroozi and Favaro, 2016,
    arXiv:1603.09246).

    Metrics: `accuracy`; `chance`, 1 / N in slot mode, 1 / K in permset mode; in slot mode also
    `guess_among_shuffled`, 1 / (m - 1), the accuracy of a model that only finds out which m patches were
    shuffled, for none stays in its place.
    """

    def __init__(self, config: JigsawConfig, site: TaskSite) -> None:
        super().__init__()
        self.config = config
        if config.mode == "slot":
            self.head: nn.Module = nn.Linear(site.embed_dim, site.layout.num_patches)
        else:
            self.head = mlp([NUM_CELLS * site.embed_dim, config.hidden_dim, config.num_permutations])

    def forward(self, views: EncodedViews, peers: Peers) -> TaskOutput:
        sets = views.plan.patches
        tokens = take(views.layout.patches(views.tokens), sets.jigsaw)  # (M, m, D)
        if self.config.mode == "permset":
            return self._classify(tokens.flatten(1), sets.jigsaw_class)
        output = self._classify(tokens.flatten(0, 1), sets.jigsaw_source.flatten())
        guess = output.loss.new_full((), 1 / (sets.jigsaw.shape[1] - 1))
        return TaskOutput(output.loss, {**output.metrics, "guess_among_shuffled": guess})

    def _classify(self, features: Tensor, labels: Tensor) -> TaskOutput:
        logits = self.head(features)
        loss = cross_entropy(logits, labels)
        chance = loss.new_full((), 1 / logits.shape[1])
        return TaskOutput(loss, {"accuracy": accuracy(logits, labels), "chance": chance})
