"""The trained module: one backbone call on the stacked views, then every task reads its tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.models.backbone import TokenFill, encode
from pretrain.peers import ALONE, Peers
from pretrain.tasks.balance import Balance
from pretrain.tasks.contract import EncodedViews
from pretrain.tokens import TokenLayout
from pretrain.views.plan import PatchSets
from pretrain.views.prepare import Inputs

BACKBONE_PREFIX = "backbone."  # of the timm names in a checkpoint's weights


class MultiTask(nn.Module):
    """Backbone, task heads and the balance of their losses.

    `mask_token` and `no_position` are made only if a task needs them, so that no parameter stays without
    gradient. `num_backbone_calls` counts encoder passes since the module was made.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        layout: TokenLayout,
        tasks: Mapping[str, nn.Module],
        balance: Balance,
        view_names: tuple[str, ...],
        *,
        mask_token: bool,
        no_position: bool,
        recompute: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.layout = layout
        for name, task in tasks.items():
            assert not list(task.parameters(recurse=False)), f"{name}: parameters belong into a submodule"
        self.tasks = nn.ModuleDict(tasks)
        self.balance = balance
        self.view_names = view_names
        self.recompute = recompute
        self.peers = peers
        self.num_backbone_calls = 0
        self.mask_token = self._token() if mask_token else None
        self.no_position = self._token() if no_position else None

    def _token(self) -> nn.Parameter:
        """One learned vector (1, 1, D), three-dimensional as timm's class token, so it is decayed like it."""
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.backbone.embed_dim), std=0.02))

    def _fill(self, patches: PatchSets) -> TokenFill:
        def marked(index: Tensor) -> Tensor:
            none = torch.zeros(len(index), self.layout.num_patches, dtype=torch.bool, device=index.device)
            return none.scatter(1, index, True)

        return TokenFill(
            marked(patches.inpainting), self.mask_token, marked(patches.pairs.flatten(1)), self.no_position
        )

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """0-dimensional tensors: `total`, and per task `loss/T`, `weight/T` and `T/<metric>`."""
        self.num_backbone_calls += 1
        tokens = encode(
            self.backbone,
            inputs.images,
            self.layout,
            self._fill(inputs.plan.patches),
            recompute=self.recompute,
        )
        views = EncodedViews(self.view_names, self.layout, tokens.final, inputs.clean, inputs.plan)
        # not through __call__: ZeRO-3's hooks see tensors only, and the parameters are the heads'
        outputs = {name: task.forward(views, self.peers) for name, task in self.tasks.items()}
        total, weights = self.balance({name: output.loss for name, output in outputs.items()})
        named = {"total": total}
        for name, output in outputs.items():
            named[f"loss/{name}"] = output.loss.detach()
            named[f"weight/{name}"] = weights[name].detach()
            named |= {f"{name}/{metric}": value.detach() for metric, value in output.metrics.items()}
        return named
