"""Training steps of lightly's parts, as its examples put them together: each view is encoded by itself."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models import utils
from lightly.models.modules import (
    DINOProjectionHead,
    MaskedVisionTransformerTIMM,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

if TYPE_CHECKING:
    from steps.peers import Bench
    from steps.turns import Step

MOMENTUM = 0.99


def averaged(*modules: nn.Module) -> list[nn.Module]:
    copies = [copy.deepcopy(module) for module in modules]
    for module in copies:
        deactivate_requires_grad(module)
    return copies


def simclr(bench: Bench) -> Step:
    backbone = bench.create()
    heads = bench.heads
    head = SimCLRProjectionHead(bench.width, heads["hidden_dim"], heads["out_dim"], heads["num_layers"])
    criterion, optimizer = NTXentLoss(temperature=0.1), bench.optimizer(backbone, head)

    def step() -> None:
        first, second = (head(backbone(view).flatten(start_dim=1)) for view in bench.views)
        criterion(first, second).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def moco_v2(bench: Bench) -> Step:
    backbone, out = bench.create(), bench.heads["out_dim"]
    projector = MoCoProjectionHead(bench.width, bench.width, out)
    slow_backbone, slow_projector = averaged(backbone, projector)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(bench.heads["queue_length"], out))
    optimizer = bench.optimizer(backbone, projector)

    def step() -> None:
        update_momentum(backbone, slow_backbone, m=MOMENTUM)
        update_momentum(projector, slow_projector, m=MOMENTUM)
        first, second = bench.views
        queries = projector(backbone(first).flatten(start_dim=1))
        with torch.no_grad():
            keys = slow_projector(slow_backbone(second).flatten(start_dim=1))
        criterion(queries, keys).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def moco_parts(bench: Bench) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Backbone, projector and predictor in the sizes of the third version."""
    hidden, out = bench.heads["hidden_dim"], bench.heads["out_dim"]
    projector = MoCoProjectionHead(bench.width, hidden, out, bench.heads["num_layers"], batch_norm=True)
    return bench.create(), projector, MoCoProjectionHead(out, hidden, out, 2, batch_norm=True)


def moco_v3(bench: Bench) -> Step:
    backbone, projector, predictor = moco_parts(bench)
    slow_backbone, slow_projector = averaged(backbone, projector)
    criterion, optimizer = NTXentLoss(temperature=0.2), bench.optimizer(backbone, projector, predictor)

    def step() -> None:
        update_momentum(backbone, slow_backbone, m=MOMENTUM)
        update_momentum(projector, slow_projector, m=MOMENTUM)
        queries = [predictor(projector(backbone(view).flatten(start_dim=1))) for view in bench.views]
        with torch.no_grad():
            keys = [slow_projector(slow_backbone(view).flatten(start_dim=1)) for view in bench.views]
        loss = 0.5 * (criterion(queries[0], keys[1]) + criterion(queries[1], keys[0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dino_parts(bench: Bench) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module, nn.Module]:
    """Backbone, head, the slow ones, the loss. The weight norm in the head forbids a plain copy of it."""
    sizes = [bench.heads[name] for name in ("hidden_dim", "bottleneck_dim", "out_dim")]
    backbone, head, slow_head = bench.create(), *(DINOProjectionHead(bench.width, *sizes) for _ in range(2))
    slow_head.load_state_dict(head.state_dict())
    deactivate_requires_grad(slow_head)
    return backbone, head, *averaged(backbone), slow_head, DINOLoss(sizes[-1])


def dino(bench: Bench) -> Step:
    backbone, head, slow_backbone, slow_head, criterion = dino_parts(bench)
    optimizer = bench.optimizer(backbone, head)

    def step() -> None:
        update_momentum(backbone, slow_backbone, m=MOMENTUM)
        update_momentum(head, slow_head, m=MOMENTUM)
        with torch.no_grad():
            targets = [slow_head(slow_backbone(view).flatten(start_dim=1)) for view in bench.views[:2]]
        outputs = [head(backbone(view).flatten(start_dim=1)) for view in bench.views]
        criterion(targets, outputs, epoch=0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Mae(nn.Module):
    """Encoder of the kept tokens, decoder of all, prediction of the hidden ones."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        from lightly.models.modules.masked_vision_transformer_decoder_timm import (
            MaskedVisionTransformerDecoderTIMM,
        )

        vit = bench.create()
        dim, depth, num_heads = (bench.heads[f"decoder_{name}"] for name in ("dim", "depth", "heads"))
        self.patch_px = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.embed = nn.Linear(bench.width, dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(vit.patch_embed.num_patches, dim, depth, num_heads)
        self.predict = nn.Linear(dim, 3 * self.patch_px**2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and normalised targets of the hidden patches: (B, n, 3 P^2) twice"""
        length = self.backbone.sequence_length
        kept, hidden = utils.random_token_mask((len(images), length), mask_ratio=0.75)
        shown = self.embed(self.backbone.encode(images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length))
        decoded = self.decoder(utils.set_at_index(tokens, kept, shown.type_as(tokens)))
        predicted = self.predict(utils.get_at_index(decoded, hidden))
        patches = utils.patchify(images, self.patch_px)
        return predicted, utils.normalize_mean_var(utils.get_at_index(patches, hidden - 1))


def mae(bench: Bench) -> Step:
    model = Mae(bench)
    criterion, optimizer = nn.MSELoss(), bench.optimizer(model)
    (images,) = bench.views

    def step() -> None:
        predicted, target = model(images)
        criterion(predicted, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
