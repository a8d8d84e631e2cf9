"""Training steps organised as solo-learn's `training_step`: lists of outputs over the views, and the average
of the slow network taken tensor by tensor after the optimizer's step.

The released package (1.0.2) wants torch 1.9 and Lightning 1.4, so the parts are lightly's. Its online linear
classifier is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steps.lightly_steps import SimCLRProjectionHead, averaged, dino_parts, moco_parts

if TYPE_CHECKING:
    from steps.peers import Bench
    from steps.turns import Step

MOMENTUM = 0.99


@torch.no_grad()
def follow(fast: nn.Module, slow: nn.Module) -> None:
    for new, old in zip(fast.parameters(), slow.parameters(), strict=True):
        old.data = MOMENTUM * old.data + (1 - MOMENTUM) * new.data


def one_similarity_matrix(rows: Tensor, temperature: float) -> Tensor:
    """NT-Xent over both views at once. (2B, d) -> ()"""
    rows = F.normalize(rows, dim=-1)
    logits = torch.einsum("if, jf -> ij", rows, rows) / temperature
    itself = torch.eye(len(rows), dtype=torch.bool)
    return F.cross_entropy(
        logits.masked_fill(itself, -torch.inf), torch.arange(len(rows)).roll(len(rows) // 2)
    )


def simclr(bench: Bench) -> Step:
    backbone, heads = bench.create(), bench.heads
    head = SimCLRProjectionHead(bench.width, heads["hidden_dim"], heads["out_dim"], heads["num_layers"])
    optimizer = bench.optimizer(backbone, head)

    def step() -> None:
        features = [backbone(view) for view in bench.views]
        one_similarity_matrix(torch.cat([head(of_view) for of_view in features]), 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_key(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(queries)))


def moco_v3(bench: Bench) -> Step:
    backbone, projector, predictor = moco_parts(bench)
    slow_backbone, slow_projector = averaged(backbone, projector)
    optimizer = bench.optimizer(backbone, projector, predictor)

    def step() -> None:
        queries = [predictor(projector(backbone(view))) for view in bench.views]
        with torch.no_grad():
            keys = [slow_projector(slow_backbone(view)) for view in bench.views]
        (own_key(queries[0], keys[1], 0.2) + own_key(queries[1], keys[0], 0.2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(backbone, slow_backbone)
        follow(projector, slow_projector)

    return step


def dino(bench: Bench) -> Step:
    backbone, head, slow_backbone, slow_head, criterion = dino_parts(bench)
    optimizer = bench.optimizer(backbone, head)

    def step() -> None:
        features = [backbone(view) for view in bench.views]
        with torch.no_grad():
            slow_features = [slow_backbone(view) for view in bench.views[:2]]
        outputs = [head(of_view) for of_view in features]
        with torch.no_grad():
            targets = [slow_head(of_view) for of_view in slow_features]
        criterion(targets, outputs, epoch=0).backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(backbone, slow_backbone)
        follow(head, slow_head)

    return step
